"""A recipe: YAML and `key=value` overrides become one checked settings model; every mistake is named with its place.

Relative paths in a recipe are relative to the working directory, wherever the recipe file lies.
"""

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from irlign.errors import ConfigError
from irlign.mistakes import Key, did_you_mean, either, explain, keys_of


class Settings(BaseModel):
    """The base of all settings models: an unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())


RECIPES = (".yaml", ".yml", ".json")  # a bare word that ends so is a recipe
# Keys of other libraries' settings that hold a secret, and where it belongs.
SECRETS = {**dict.fromkeys(("hub_token", "push_to_hub_token", "hf_token", "token"), "HF_TOKEN"), "api_key": "the variable that holds it"}
_SECRET = re.compile(rf"\b({'|'.join(SECRETS)})(\s*[:=]\s*)[^\s,}}]+")


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    if found := [key for key in values if key in SECRETS and isinstance(values[key], str)]:
        stored = "would be stored with the run, in recipe.yaml and the manifest"
        raise ValueError(f"{found[0]} {stored}: leave it out, and set {SECRETS[found[0]]}")
    return values


PassOn = Annotated[dict[str, Any], AfterValidator(_without_secrets)]  # settings that are handed on as they are
Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars mean what they look like: `1e-4` is a number; `on`, `no`, dates and `010` are text.

    A bool field still takes yes/no/on/off, and a number field takes `010`: the settings model reads those words itself.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":", 1)[-1] in ("null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this loader or a YAML 1.1 reader would take it for something else."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {  # type: ignore[misc]
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))


def load_recipe(model: type[Model], source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Model:
    """The recipe in a YAML file or a mapping, with overrides applied, as an instance of `model`.

    Overrides are `sft.learning_rate=1e-4`, `--sft.learning_rate=1e-4` or `--sft.learning_rate 1e-4`, later ones win; a
    key that stands in one section only needs no section. Raises one ConfigError for all problems.
    """
    values: dict[str, Any] = {}
    places: dict[Key, str] = {}
    path = None if isinstance(source, Mapping) else source
    if isinstance(source, Mapping):
        values = dict(source)
    elif source is not None:
        values, places = _read_yaml(Path(source))
    for text, key, value in parse_overrides(model, overrides):
        assign(values, key, value)
        shown = _SECRET.sub(r"\1\2...", text)
        places = {k: v for k, v in places.items() if k[: len(key)] != key} | {key: f"override {shown}"}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(model, error, places, str(path) if path is not None else None) from None


def dump_recipe(recipe: BaseModel | Mapping[str, Any]) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to the same values."""
    values = recipe.model_dump(mode="json") if isinstance(recipe, BaseModel) else dict(recipe)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def parse_seeds(value: object) -> list[int]:
    """`0..4` (both ends included), `0,3,5`, a number or a list, as distinct seeds of at least 0. Raises ConfigError."""
    try:
        if isinstance(value, str) and ".." in value:
            first, last = (int(end) for end in value.split(".."))
            seeds = list(range(first, last + 1))
        elif isinstance(value, str):
            seeds = [int(part) for part in value.strip(" []").split(",")]
        else:
            items = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
                raise ValueError
            seeds = [int(str(item)) for item in items]
    except ValueError:
        raise ConfigError(f"{value!r} is no list of seeds", where="seeds", do="write 0..4, 0,3,5 or [0, 3, 5]") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        what = "names no seed" if not seeds else "has a negative seed" if min(seeds) < 0 else "names a seed twice"
        raise ConfigError(f"{value!r} {what}", where="seeds", do="write 0..4, 0,3,5 or [0, 3, 5]")
    return seeds


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """The mapping in a recipe file, and `file:line` of every key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 3)
        raise ConfigError("no such recipe", where=path, do=did_you_mean([str(path.parent / n) for n in near])) from None
    except IsADirectoryError:
        raise ConfigError("is a folder, not a recipe", where=path, do="give the .yaml file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the recipe cannot be read: {reason}", where=path) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[Key, str] = {}
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, path, (), places)
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"this is not YAML: {error.problem}", where=where, do="check colons, quotes and indentation here") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"this is not YAML: {str(error).splitlines()[0]}", where=path) from None
    if values is None:
        raise ConfigError("the recipe is empty", where=path, do="write `key: value` lines; `irlign schema` lists the keys")
    if not isinstance(values, dict):
        raise ConfigError(f"a recipe is a mapping of keys to values, this is a {type(values).__name__}", where=path)
    return values, places


def _note_lines(node: yaml.MappingNode, path: Path, prefix: Key, places: dict[Key, str]) -> None:
    """Fill `places` with the line of every key below `node`; a key given twice is a ConfigError."""
    own: set[str] = set()
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in own:
            first = places[(*prefix, key)].rsplit(":", 1)[-1]
            raise ConfigError(f"{'.'.join((*prefix, key))} is given twice, first in line {first}", where=f"{path}:{line}", do="keep one")
        own.add(key)
        places[(*prefix, key)] = f"{path}:{line}"
        if isinstance(value_node, yaml.MappingNode) and len(prefix) < 20:
            _note_lines(value_node, path, (*prefix, key), places)


def parse_overrides(model: type[BaseModel], overrides: Sequence[str]) -> Iterator[tuple[str, Key, Any]]:
    """Each override as its text, its full key and its value."""
    rest = list(overrides)
    while rest:
        text = item = rest.pop(0)
        key, equals, value = item.partition("=")
        if not equals and item.startswith("--") and len(item) > 2:
            # As in TRL: `--key value`, and `--key` alone for true.
            lone = not rest or rest[0].startswith("--") or re.match(r"[A-Za-z_][\w.]*=", rest[0])
            value = "true" if lone else rest.pop(0)
            text = item if lone else f"{item} {value}"
        elif not equals:
            do = "write key=value, for example sft.learning_rate=1e-4, or a run's folder"
            do = f"one recipe: as the first word, or after --config: --config {item}" if item.endswith(RECIPES) else do
            raise ConfigError(f"{item!r} is no override", do=do)
        name = tuple(key.removeprefix("--").replace("-", "_").split("."))
        yield text, _full_key(model, name, text), _parse_value(value, text)


def _parse_value(text: str, override: str) -> Any:
    """A value as YAML reads it. Unquoted text is one scalar to its end: no comments, no mappings inside."""
    try:
        if text.lstrip()[:1] in tuple("[{\"'"):
            return yaml.load(text, Loader=_Loader)
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"the value is not YAML: {problem}", where=f"override {override[:200]}", do="check quotes and brackets") from None


def _full_key(model: type[BaseModel], key: Key, text: str) -> Key:
    """The key with its section; a leaf that stands in exactly one section is enough, sections within sections aside."""
    keys = set(keys_of(model))
    if key in keys or len(key) > 1:
        return key
    named = sorted(k for k in keys if k[-1] == key[0])
    found = [k for k in named if len(k) == min(map(len, named))]
    if len(found) > 1:
        raise ConfigError(f"{key[0]} stands in {len(found)} sections", where=f"override {text}", do=f"write {either(map('.'.join, found))}")
    return found[0] if found else key


def assign(values: dict[str, Any], key: Key, value: Any) -> None:
    """Set a dotted key. A section given as one word (`world: dialogue`) is a mapping with that `name`."""
    here = values
    for part in key[:-1]:
        below = here.get(part)
        here[part] = dict(below) if isinstance(below, Mapping) else {} if below is None else {"name": below}
        here = here[part]
    here[key[-1]] = value

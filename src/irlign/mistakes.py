"""What keys a settings model has, and what is wrong with a recipe, in words: where, which key, what was expected, what is near."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Union

from pydantic import BaseModel, ValidationError

from irlign.errors import ConfigError

Key = tuple[str, ...]


def _sections(annotation: Any) -> list[dict[str, Any]]:
    """Field names and types of every settings model or dataclass that the annotation is or may be."""
    found = []
    for kind in typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append({name: field.annotation for name, field in kind.model_fields.items()})
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found.append({name: typing.get_type_hints(kind)[name] for name in (f.name for f in dataclasses.fields(kind))})
    return found


def keys_of(annotation: Any, prefix: Key = ()) -> Iterator[Key]:
    """Every key of a model, sections and their leaves, as tuples; those of all models where there is a choice."""
    for name, kind in {name: kind for section in _sections(annotation) for name, kind in section.items()}.items():
        yield (*prefix, name)
        yield from keys_of(kind, (*prefix, name))


def explain(model: type[BaseModel], error: ValidationError, places: Mapping[Key, str], file: str | None) -> ConfigError:
    """All problems of a recipe as one ConfigError: where, which key, what was expected, what was given."""
    keys = set(keys_of(model))
    problems: dict[tuple[Key, bool], dict[str, Any]] = {}
    for problem in error.errors(include_url=False):
        unknown = problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        parts = _without_choices(model, tuple(str(part) for part in problem["loc"]))
        # pydantic appends union members and list positions to a location: the key is its longest known part.
        known = next((parts[:n] for n in range(len(parts), 0, -1) if parts[:n] in keys), ())
        found = problems.setdefault((parts if unknown else known, unknown), {"expected": [], "got": problem["input"]})
        found["expected"].append(_expectation(problem))
    lines: list[tuple[str | None, str, str | None]] = []
    for (key, unknown), found in problems.items():
        where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), file)
        name = ".".join(key)
        if unknown:
            lines.append((where, f"unknown key {name}", did_you_mean(_neighbours(key, keys)) or "`irlign schema` lists the keys"))
        elif all(kind == "said" for kind, _ in found["expected"]):
            lines.append((where, ": ".join(filter(None, [name, *(text for _, text in found["expected"])])), None))
        else:
            got = repr(found["got"])
            expected = either(dict.fromkeys(text for _, text in found["expected"]))
            lines.append((where, f"{name}: expected {expected}, got {got if len(got) < 80 else got[:77] + '...'}", None))
    if len(lines) == 1:
        where, what, remedy = lines[0]
        return ConfigError(what, where=where, do=remedy)
    listing = "".join("\n  " + ". ".join(filter(None, [f"{w}: {what}" if w else what, do])) for w, what, do in lines)
    return ConfigError(f"{len(lines)} problems in the recipe:{listing}")


def _without_choices(annotation: Any, parts: Key) -> Key:
    """A location without what pydantic puts after a key that holds one of several models: the name of the one it took."""
    fields = [section[parts[0]] for section in _sections(annotation) if parts and parts[0] in section]
    if not fields:
        return parts
    rest = parts[2:] if len(_sections(fields[0])) > 1 else parts[1:]
    return (parts[0], *_without_choices(fields[0], rest))


def _expectation(problem: Any) -> tuple[str, str]:
    """("said", a validator's own sentence) or ("wanted", what the type asks for)."""
    message = problem["msg"]
    if problem["type"] == "value_error":
        return "said", str(problem["ctx"]["error"])
    if message.startswith("Input should be "):
        return "wanted", message.removeprefix("Input should be ").split(", unable")[0]
    return ("wanted", "a value") if problem["type"] == "missing" else ("said", message[:1].lower() + message[1:])


def _neighbours(key: Key, keys: set[Key]) -> list[str]:
    """Known keys that an unknown one may stand for: alike in its own section, or of its name in another section."""
    keys = keys - {key}  # a key of another choice of this section is unknown too
    beside = [k[-1] for k in keys if k[:-1] == key[:-1]]
    close = [".".join((*key[:-1], name)) for name in difflib.get_close_matches(key[-1], sorted(beside), 3)]
    named = [k for k in keys if k[-1] == key[-1].split(".")[-1]]
    elsewhere = sorted(".".join(k) for k in named if len(k) == min(map(len, named)))
    if not close and not elsewhere:
        elsewhere = sorted(".".join(k) for k in keys if k[-1] in difflib.get_close_matches(key[-1], sorted({k[-1] for k in keys}), 2))
    return list(dict.fromkeys([*close, *elsewhere]))[:4]


def either(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def did_you_mean(names: Sequence[str]) -> str | None:
    """The question that names them; None where there is nothing to name."""
    return f"did you mean {either(names)}?" if names else None

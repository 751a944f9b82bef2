"""`irlign init`: a recipe from a few answers. Its comments are the descriptions of the settings themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple, get_args

from irlign.config import RECIPES, Settings, assign, dump_recipe, load_recipe, parse_overrides
from irlign.errors import ConfigError
from irlign.recipe import Recipe

WIDTH = 120  # of a line of the recipe
NEEDED = "needed: "
TEMPLATE = "data.chat_template"


class Question(NamedTuple):
    """The keys that an answer is written to, what is asked, and what an empty answer means: this value, or the settings' own default."""

    keys: str
    words: str
    default: str = ""


class Start(NamedTuple):
    """A way to begin: its questions, the keys without which nothing can run, what it settles by itself, and the further keys that
    its recipe shows at their defaults."""

    questions: tuple[Question, ...]
    needed: tuple[str, ...]
    settled: tuple[str, ...]
    shown: str


OUTPUT = Question("output_dir", "Folder of the run", "runs/mine")
GOLDEN = Question("evaluation.golden_reward", "What an answer is truly worth, module:function or a classifier's folder (empty: not known)")
STARTS = {
    "weights": Start(
        (
            Question("model_name_or_path", "Model to start from, a folder or a Hub id"),
            Question("dataset_name", "Demonstrations, a .jsonl, .json, .csv or .parquet file or a Hub id"),
            Question("sft_model_name_or_path", "SFT model that you have already (empty: one is trained)"),
            Question(TEMPLATE, "Chat template: auto (the tokenizer's own), none (plain text), chatml, hh or a Jinja file", "auto"),
            Question("sft.use_peft reward.use_peft optimise.use_peft", "Train LoRA adapters instead of all weights, yes or no", "no"),
            Question("optimise.method", "Last step: distill, another of docs/optimise, or none", "distill"),
            GOLDEN,
            OUTPUT,
        ),
        ("model_name_or_path", "dataset_name"),
        (),
        "eval_dataset_name seed data.on_overlong data.max_length data.dev_fraction data.test_fraction sft.learning_rate sft.num_train_epochs "
        "sft.per_device_train_batch_size sampling.num_generations sampling.train_generations sampling.max_new_tokens reward.contrast "
        "reward.learning_rate reward.num_train_epochs reward.per_device_train_batch_size best_of_n.n optimise.learning_rate "
        "optimise.num_train_epochs",
    ),
    "samples": Start(
        (
            Question("pools.initial", "Answers of the weaker policy, a file"),
            Question("pools.sft", "Answers of the better policy to the same prompts, a file"),
            Question("pools.candidates", "Answers to choose among, a file (empty: those of the better policy)"),
            Question("reward.backbone", "What reads the answers: words (no model), or the folder or Hub id of an encoder", "words"),
            GOLDEN,
            OUTPUT,
        ),
        ("pools.initial", "pools.sft"),
        ("reward.kind=features",),
        "dataset_name seed data.dev_fraction data.test_fraction reward.contrast reward.head best_of_n.n",
    ),
}
Ask = Callable[[str, str], str]  # the question and the default; the answer


def write_recipe(path: Path, overrides: Sequence[str] = (), ask: Ask | None = None) -> list[str]:
    """Write a commented recipe to `path` from `key=value` texts and the answers of `ask` to what they leave open; without `ask` it is
    left at its default. Returns the needed keys that still have no value.

    Raises ConfigError where the file exists, and for every mistake that a recipe can have; nothing is written then. A mistake in an answer
    is said and the question asked again.
    """
    if path.exists():
        raise ConfigError("is there already", where=path, do="give another name, or delete it first")
    known = {".".join(key) for _, key, _ in parse_overrides(Recipe, overrides)}
    if any(key.split(".")[0] == "world" for key in known):
        raise ConfigError("a world makes its own model and data", where="world", do="start from recipes/quickstart.yaml")
    start = STARTS[_source(known, ask)]
    texts = _answered(start, [*start.settled, *overrides], known, ask)
    given, missing, resolved = _resolved(start, texts)
    keys = [*start.needed, *(key for question in start.questions for key in question.keys.split()), *start.shown.split(), *given]
    if "sft_model_name_or_path" in given:  # no settings of a stage that is left out
        keys = [key for key in keys if not key.startswith("sft.") or key in known]
    values: dict[str, Any] = {}
    for key in keys:
        told = given.get(key) if key == TEMPLATE else None  # resolved, a template's file has become its text
        assign(values, tuple(key.split(".")), None if key in missing else told or _at(resolved, key))
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# irlign validate {named(path)}, then irlign plan and irlign run in its place. `irlign schema` lists every key.\n"
    path.write_text(head + "\n".join(_lines(Recipe, values, missing)) + "\n", encoding="utf-8")
    return missing


def named(path: Path) -> str:
    """How a verb is given this recipe: as a bare word where it looks like one."""
    return str(path) if path.suffix in RECIPES else f"--config {path}"


def _source(known: set[str], ask: Ask | None) -> str:
    """Which way to begin: what the given keys say, else the answer; by default `weights`."""
    if known or ask is None:
        return "samples" if any(key.split(".")[0] == "pools" for key in known) else "weights"
    words = asked = "What you have: weights (a model and demonstrations) or samples (stored answers of two policies)"
    while (source := ask(words, "weights")) not in STARTS:
        words = f"no start from {source!r}: answer {' or '.join(STARTS)}\n{asked}"
    return source


def _answered(start: Start, texts: Sequence[str], known: set[str], ask: Ask | None) -> list[str]:
    """`texts` and the answers, as `key=value` texts; a question all of whose keys are known is not asked, an empty answer is none."""
    found = {key: question.default for question in start.questions for key in question.keys.split() if key not in known}
    if ask is None:
        return [*texts, *_words(found)]
    standing = _wrong(start, [*texts, *_words(found)])  # an answer may mend it
    if standing and standing == _wrong(start, texts):
        _resolved(start, texts)  # no answer can: it is said before anything is asked
    for question in start.questions:
        keys, words = [key for key in question.keys.split() if key in found], question.words
        while keys:
            answer = ask(words, question.default)
            wrong = _wrong(start, [*texts, *_words(found | {keys[0]: answer})])  # all keys of a question are of one kind
            if wrong in ("", standing):
                found, standing = found | dict.fromkeys(keys, answer), wrong
                break
            words = f"{wrong}\n{question.words}"
    return [*texts, *_words(found)]


def _wrong(start: Start, texts: Sequence[str]) -> str:
    """What is wrong with these texts, in words; empty where nothing is."""
    try:
        _resolved(start, texts)
    except ConfigError as error:
        return error.what
    return ""


def _words(answers: Mapping[str, str]) -> list[str]:
    return [f"{key}={answer}" for key, answer in answers.items() if answer.strip()]


def _resolved(start: Start, texts: Sequence[str]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """What `key=value` texts give by key, the needed keys that they leave out, and the whole recipe with something in their place."""
    given = {".".join(key): value for _, key, value in parse_overrides(Recipe, texts)}
    missing = [key for key in start.needed if key not in given]
    recipe = load_recipe(Recipe, None, [*texts, *(f"{key}={key}.jsonl" for key in missing)])
    return given, missing, recipe.model_dump(mode="json")


def _at(values: Any, key: str) -> Any:
    """The value at a dotted key; None where a section above it is."""
    for part in key.split("."):
        values = values[part] if values is not None else None
    return values


def _lines(kind: type[Settings], values: Mapping[str, Any], missing: Sequence[str], above: str = "") -> Iterator[str]:
    """The values in the order of the settings, sections last, each key with its description."""
    pad = "  " * above.count(".")
    fields = {name: (field, _section(field.annotation)) for name, field in kind.model_fields.items() if name in values}
    for name, (field, section) in sorted(fields.items(), key=lambda item: item[1][1] is not None):
        words = (NEEDED if f"{above}{name}" in missing else "") + (field.description or "")
        if section and isinstance(values[name], Mapping):
            yield from ("", f"{pad}{name}:  # {words}", *_lines(section, values[name], missing, f"{above}{name}."))
            continue
        text = pad + dump_recipe({name: values[name]}).rstrip().replace("\n", f"\n{pad}")
        if len(text + words) + 4 <= WIDTH and "\n" not in text:
            yield f"{text}  # {words}"
        else:
            yield from (*(f"{pad}# {line}" for line in wrap(words, WIDTH - len(pad) - 2)), text)


def _section(annotation: Any) -> type[Settings] | None:
    """The settings model that a field holds or may hold; None where it holds values."""
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Settings))
    return next(kinds, None)

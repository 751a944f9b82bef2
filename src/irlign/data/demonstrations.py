"""Rows become demonstrations: the column conventions people have, checks, de-duplication, the split by prompt."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, field_validator

from irlign.config import Settings
from irlign.data.chat import template_text
from irlign.data.hh import is_transcript, turns
from irlign.data.readers import kind_of, read_rows
from irlign.errors import DataError, GuardError
from irlign.records import SPLITS, Demonstration, Message, Preference, Prompt, PromptContent, prompt_content

ANSWERS = ("completion", "response", "output", "answer", "chosen")  # in this order of preference
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
KNOWN = "prompt + completion, messages, conversations (ShareGPT), instruction + output (Alpaca), or chosen (HH transcripts)"


class DataSettings(Settings):
    """Reading, splitting and formatting the text."""

    prompt_column: str | None = Field(None, description="the prompt's column, where it has a name of its own")
    completion_column: str | None = Field(None, description="the answer's column, where it has a name of its own")
    split: str = Field("train", description="which split of a Hub dataset to read")
    max_rows: int | None = Field(None, ge=1, description="read only so many rows of each file; null = all")
    on_empty: Literal["error", "drop"] = Field("error", description="an empty answer: stop, or drop the row and count it")
    on_overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="a row over max_length: stop, drop it, or cut its answer after the last sentence that fits; counted"
    )
    max_length: int | None = Field(None, ge=8, description="tokens of prompt and answer together; null = what the model reads")
    loss_on: Literal["last", "all"] = Field("last", description="messages with several turns: learn the last answer, or each one")
    chat_template: str = Field(
        "auto", description="auto (the tokenizer's own), none (plain text), hh, chatml, or a Jinja file, whose text the run keeps"
    )
    dev_fraction: float = Field(0.1, gt=0, lt=1, description="share of the prompts kept for choices")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of the prompts kept for evaluation")
    dev_prompts: int | None = Field(None, ge=1, description="number of dev prompts, instead of the share")
    test_prompts: int | None = Field(None, ge=1, description="number of test prompts, instead of the share")
    allow_overlap: bool = Field(False, description="guard off: let test prompts of eval_dataset_name stand in the train data too")

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str) -> str:
        """The text of a Jinja file stands for it from here on, so that a run and its rewards need the file no more."""
        return template_text(value)


@dataclass
class Loaded:
    """What a file gave, and what happened to the rest of it."""

    demonstrations: list[Demonstration] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def load_demonstrations(name: str, settings: DataSettings, *, answers: bool = True, distinct: bool = True) -> Loaded:
    """Demonstrations of a file or Hub dataset; with `answers=False` a row may lack an answer (completion ""). Exact
    duplicates are left out unless `distinct` is false.

    Notes count rows, empty answers and duplicates, and name the column that the answers came from. Raises DataError
    naming the row for a missing column, a wrong type or (on_empty=error) an empty answer.
    """
    rows = read_rows(name, split=settings.split, max_rows=settings.max_rows)
    found: list[Demonstration] = []
    columns: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    empty, first_empty = 0, ""
    for place, row in rows:
        for content, completion, column in examples_of(row, settings, place, answers, lost):
            if answers and not completion.strip():
                empty, first_empty = empty + 1, first_empty or place
                continue
            columns[column] += 1
            found.append(Demonstration(Prompt.of(content, "train"), completion))
    if empty and settings.on_empty == "error":
        more = f" (and {empty - 1} more)" if empty > 1 else ""
        raise DataError(f"the answer is empty{more}", where=first_empty, do="fill it in, or use data.on_empty=drop")
    kept = without_repeats(found) if distinct else found
    notes = {"rows": len(rows), "answers": dict(columns), "empty": empty, "duplicates": len(found) - len(kept), **lost}
    if not kept:
        raise DataError("no row with an answer is left", where=name)
    return Loaded(kept, notes)


def without_repeats(demonstrations: Iterable[Demonstration]) -> list[Demonstration]:
    """The first of each prompt and answer, in order."""
    return list({(d.prompt.prompt_id, d.completion): d for d in reversed(list(demonstrations))}.values())[::-1]


def load_preferences(name: str, settings: DataSettings) -> tuple[list[Preference], dict[str, Any]]:
    """Pairs of a `chosen`/`rejected` file (answers to a `prompt`, whole conversations, or HH transcripts), and counts.

    Raises DataError naming the row for a missing column, a wrong type or (on_empty=error) an empty answer.
    """
    rows = read_rows(name, split=settings.split, max_rows=settings.max_rows)
    found, empty = [], 0
    lost: Counter[str] = Counter()
    for place, row in rows:
        if "chosen" not in row or "rejected" not in row:
            raise DataError(f"has no chosen and rejected (it has {', '.join(row)})", where=place, do="give a preference file")
        if (column := settings.prompt_column or "prompt") in row:
            content = _prompt(row[column], f"{place}, {column}")
            chosen, rejected = (_completion(row[side], f"{place}, {side}") for side in ("chosen", "rejected"))
        else:
            (content, chosen), (other, rejected) = (_whole(row[side], f"{place}, {side}", lost) for side in ("chosen", "rejected"))
            if content != other:
                raise DataError("chosen and rejected answer different prompts", where=place)
        if chosen.strip() and rejected.strip():
            found.append(Preference(Prompt.of(content, "train"), chosen, rejected))
            continue
        empty += 1
        if settings.on_empty == "error":
            raise DataError("an answer is empty", where=place, do="fill it in, or use data.on_empty=drop")
    return found, {"rows": len(rows), "empty": empty, **lost}


def preferences_of(preferences: Sequence[Preference], split: str, held: Mapping[str, set[str]], seed: int) -> list[Preference]:
    """The pairs of one split: a prompt that the run knows keeps its split; of the others a tenth, by hash, are dev."""

    def where(prompt_id: str) -> str:
        known = next((name for name in ("test", "dev", "train") if prompt_id in held[name]), None)
        return known or ("dev" if int(hashlib.sha256(f"{seed}\n{prompt_id}".encode()).hexdigest(), 16) % 10 == 0 else "train")

    return [p for p in preferences if where(p.prompt.prompt_id) == split]


def _whole(value: Any, place: str, lost: Counter[str]) -> tuple[PromptContent, str]:
    """The prompt and the last answer of a whole conversation."""
    conversation = turns(value) if is_transcript(value) else _messages(value, place)
    return _answered(conversation, "last", place, lost)[0]


def examples_of(
    row: Mapping[str, Any], settings: DataSettings, place: str, answers: bool, lost: Counter[str]
) -> Iterable[tuple[PromptContent, str, str]]:
    """(prompt, answer, column of the answer) of one row; several with loss_on=all. `lost` counts what nothing is made of."""
    prompt_column = settings.prompt_column or "prompt"
    if settings.prompt_column is None and ("messages" in row or "conversations" in row):
        column = "messages" if "messages" in row else "conversations"
        conversation = _messages(row[column], f"{place}, {column}")
        if not answers and conversation[-1]["role"] == "user":
            return [(tuple(conversation), "", column)]
        return [(prompt, answer, column) for prompt, answer in _answered(conversation, settings.loss_on, f"{place}, {column}", lost)]
    if "instruction" in row and settings.prompt_column is None:
        parts = [_text(row["instruction"], f"{place}, instruction"), _text(row.get("input") or "", f"{place}, input")]
        prompt: Any = "\n\n".join(part for part in parts if part.strip())
        names: tuple[str, ...] = ("output", "response", "completion")
    elif prompt_column in row:
        prompt, names = row[prompt_column], ANSWERS
    elif is_transcript(row.get(settings.completion_column or "chosen")):
        column = settings.completion_column or "chosen"
        return [(p, a, column) for p, a in _answered(turns(row[column]), settings.loss_on, place, lost)]
    else:
        raise DataError(
            f"has no column {prompt_column!r} (it has {', '.join(map(str, row)) or 'none'})",
            where=place,
            do=f"give {KNOWN}; or name yours with data.prompt_column and data.completion_column",
        )
    names = (settings.completion_column,) if settings.completion_column else names
    column = next((name for name in names if row.get(name) is not None), "")
    if answers and not column:
        raise DataError(f"has no answer: none of the columns {', '.join(names)}", where=place, do="set data.completion_column")
    content = _prompt(prompt, f"{place}, {prompt_column}")
    completion = _completion(row[column], f"{place}, {column}") if column else ""
    return [(content, completion, column or prompt_column)]


def _prompt(value: Any, place: str) -> PromptContent:
    if isinstance(value, str) and not is_transcript(value):
        return value
    conversation = turns(value) if isinstance(value, str) else _messages(value, place)
    if isinstance(value, str) and conversation[-1]["role"] == "assistant" and not conversation[-1]["content"]:
        conversation = conversation[:-1]  # the open "Assistant:" that the answer follows
    if conversation[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant turn", where=place, do="put the answer in the completion")
    return tuple(conversation)


def _completion(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    conversation = _messages(value, place)
    if len(conversation) != 1 or conversation[0]["role"] != "assistant":
        raise DataError("the completion is not one assistant turn", where=place, do="put earlier turns in the prompt")
    return conversation[0]["content"]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"is {kind_of(value)}, not text", where=place)
    return value


def _messages(value: Any, place: str) -> list[Message]:
    """A chat list, `role`/`content` or ShareGPT's `from`/`value`, as messages; in a table's cell it may be written as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("is neither a list of messages nor JSON of one", where=place) from None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        kind = "an empty list" if value == [] else kind_of(value)
        raise DataError(f"is {kind}, neither text nor a list of messages", where=place, do='a message is {"role": ..., "content": ...}')
    found = []
    for number, message in enumerate(value, 1):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        known = isinstance(role, str) and role in ROLES
        if not known or not isinstance(content, str):
            what = f"role {role!r} is none of {', '.join(ROLES)}" if not known else "its content is no text"
            raise DataError(what, where=f"{place}, message {number}", do='a message is {"role": ..., "content": ...}')
        found.append(Message(role=ROLES[role], content=content))
    return found


def _answered(conversation: Sequence[Message], loss_on: str, place: str, lost: Counter[str]) -> list[tuple[PromptContent, str]]:
    """(all before an assistant turn, that turn): the last one, or each. Turns after the last are counted in `lost`."""
    ends = [i for i, message in enumerate(conversation) if message["role"] == "assistant" and i > 0]
    if not ends:
        raise DataError("has no assistant turn after a user's", where=place, do="add the answer, or take the row out")
    if after := len(conversation) - 1 - ends[-1]:
        lost["turns_after_answer"] += after
    chosen = ends if loss_on == "all" else ends[-1:]
    return [(prompt_content(conversation[:i]), conversation[i]["content"]) for i in chosen]


def check_usable(demonstrations: Sequence[Demonstration], name: str) -> None:
    """Raises DataError where nothing can be learned or split: fewer than three prompts, or one answer everywhere."""
    prompts = {d.prompt.prompt_id for d in demonstrations}
    if len(prompts) < 3:
        few = "one prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
        raise DataError(f"holds {few} only", where=name, do="train, dev and test need a prompt each; give at least a few dozen")
    if len({d.completion for d in demonstrations}) == 1:
        raise DataError("all demonstrations are identical", where=name, do="check that the answer's column is the right one")


def split_by_prompt(
    demonstrations: Sequence[Demonstration], settings: DataSettings, seed: int, *, test: bool = True
) -> dict[str, list[Demonstration]]:
    """Train, dev and (where `test`) test, all answers of a prompt in one of them; the order of the file does not matter.

    Raises DataError where the wanted dev and test prompts leave none to train on.
    """
    order = sorted({d.prompt.prompt_id for d in demonstrations}, key=lambda i: hashlib.sha256(f"{seed}\n{i}".encode()).hexdigest())
    dev_size = settings.dev_prompts or max(1, round(settings.dev_fraction * len(order)))
    test_size = (settings.test_prompts or max(1, round(settings.test_fraction * len(order)))) if test else 0
    if dev_size + test_size >= len(order):
        what = f"{dev_size} dev and {test_size} test prompts leave none of {len(order)} to train on"
        raise DataError(what, do="lower data.dev_prompts and data.test_prompts, or give more data")
    held = {i: "test" for i in order[:test_size]} | {i: "dev" for i in order[test_size : test_size + dev_size]}
    splits: dict[str, list[Demonstration]] = {split: [] for split in SPLITS}
    for demonstration in demonstrations:
        splits[held.get(demonstration.prompt.prompt_id, "train")].append(demonstration)
    return {split: in_split(rows, split) for split, rows in splits.items()}


def in_split(demonstrations: Iterable[Demonstration], split: str) -> list[Demonstration]:
    """The same demonstrations, marked as `split`."""
    return [replace(d, prompt=replace(d.prompt, split=split)) for d in demonstrations]


def guard_overlap(splits: Mapping[str, Sequence[Demonstration]], allow: bool) -> int:
    """How many test prompts stand in train or dev too; a GuardError unless allowed."""
    test = {d.prompt.prompt_id for d in splits["test"]}
    shared = len(test & {d.prompt.prompt_id for split in ("train", "dev") for d in splits[split]})
    if shared and not allow:
        raise GuardError(
            f"{shared} of {len(test)} test prompts stand in the training data too",
            where="data",
            do="take them out of one of the files; data.allow_overlap=true goes on all the same",
        )
    return shared

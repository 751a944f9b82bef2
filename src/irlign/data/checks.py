"""What `irlign validate` reports before any compute: rows, lengths, cuts, EOS survival, unknown tokens, overlap, an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from irlign.data.chat import IGNORED, Encoded, Format
from irlign.data.demonstrations import DataSettings
from irlign.data.sentences import last_whole_sentence
from irlign.errors import DataError, OverlongError
from irlign.records import SPLITS, Demonstration


@dataclass(frozen=True)
class Lengths:
    """Token counts of a set of rows against the limits they have to meet."""

    totals: list[int]
    prompts: list[int]
    max_length: int
    room: int

    def over(self) -> list[bool]:
        """Whether prompt and answer together pass `max_length`."""
        return [total > self.max_length for total in self.totals]

    def crowded(self) -> list[bool]:
        """Whether the prompt leaves less than `room` tokens for an answer to be sampled."""
        return [prompt + self.room > self.max_length for prompt in self.prompts]


def measure(form: Format, rows: Sequence[Demonstration], max_length: int, room: int) -> tuple[list[Encoded], Lengths]:
    """Every row as the models read it, and its lengths in tokens."""
    encoded = form.encode([d.prompt.content for d in rows], [d.completion for d in rows])
    return encoded, Lengths([len(e) for e in encoded], [len(e.prompt_ids) for e in encoded], max_length, room)


def apply_overlong(
    form: Format, rows: Sequence[Demonstration], settings: DataSettings, *, context: int, room: int, name: str
) -> tuple[list[Demonstration], dict[str, int]]:
    """The rows that fit, as `on_overlong` says, and how many were dropped or cut, or hold special tokens as plain text.

    A row fits if prompt and answer have at most `max_length` tokens and the prompt leaves `room` for an answer. "truncate"
    cuts the answer after the last sentence that fits, so that it still ends with EOS; where none does, or where the
    prompt is too long, the row is dropped and counted. Raises DataError on the first such row with "error".
    """
    limit = min(settings.max_length or context, context)
    _, lengths = measure(form, rows, limit, room)
    counts = {"overlong_dropped": 0, "overlong_truncated": 0, "prompts_too_long": 0}
    counts["special_tokens"] = sum(form.holds_special(row.prompt.content, row.completion) for row in rows)
    kept: list[Demonstration] = []
    over = sum(a or b for a, b in zip(lengths.over(), lengths.crowded(), strict=True))
    for row, long, crowded, total, prompt in zip(rows, lengths.over(), lengths.crowded(), lengths.totals, lengths.prompts, strict=True):
        if not long and not crowded:
            kept.append(row)
        elif settings.on_overlong == "error":
            what = (
                f"{prompt} tokens of prompt leave less than {room} of {limit} for an answer"
                if crowded
                else f"{total} tokens, and {limit} fit"
            )
            raise OverlongError(
                f"a row is too long: {what} ({over} of {len(rows)} rows are)",
                where=f"{name}, prompt {str(row.prompt.content)[:60]!r}",
                do="use data.on_overlong=drop or truncate" + (", or lower sampling.max_new_tokens" if crowded else ""),
            )
        elif crowded:
            counts["prompts_too_long"] += 1
        elif settings.on_overlong == "truncate" and (shorter := _shortened(form, row, limit)):
            counts["overlong_truncated"] += 1
            kept.append(replace(row, completion=shorter))
        else:
            counts["overlong_dropped"] += 1
    if not kept:
        raise DataError(
            f"all {len(rows)} rows are too long for {limit} tokens",
            where=name,
            do="shorten them, or lower sampling.max_new_tokens",
        )
    return kept, {key: count for key, count in counts.items() if count}


def _shortened(form: Format, row: Demonstration, limit: int) -> str:
    """The answer up to the last whole sentence that fits into `limit` tokens with its EOS; empty where none does."""
    encoded = form.encode([row.prompt.content], [row.completion])[0]
    room = limit - len(encoded.prompt_ids) - 1
    ids = encoded.completion_ids
    whole, fits = form.decode_completions([encoded.prompt_ids] * 2, [ids, ids[: max(0, room)]])
    shared = next((i for i, (a, b) in enumerate(zip(whole, fits, strict=False)) if a != b), min(len(whole), len(fits)))
    return last_whole_sentence(whole, within=shared)


def describe(splits: Mapping[str, Sequence[Demonstration]], form: Format, *, max_length: int) -> dict[str, Any]:
    """The figures of a set of splits under one tokenizer, as JSON-able values."""
    unknown_id, eos = form.tokenizer.unk_token_id, form.tokenizer.eos_token_id
    found: dict[str, Any] = {"max_length": max_length, "splits": {}}
    for split in SPLITS:
        rows = [d for d in splits[split] if d.completion]
        if not splits[split]:
            continue
        encoded, lengths = measure(form, rows, max_length, 0) if rows else ([], Lengths([], [], max_length, 0))
        tokens = [t for e in encoded for t in e.ids]
        found["splits"][split] = {
            "rows": len(splits[split]),
            "prompts": len({d.prompt.prompt_id for d in splits[split]}),
            "tokens": {"prompt": _spread(lengths.prompts), "completion": _spread([len(e.completion_ids) for e in encoded])},
            "over_max_length": _share(lengths.over()),
            "eos_kept": _share([e.completion_ids[-1] == eos and len(e) <= max_length for e in encoded]),
            "unknown_tokens": _share([t == unknown_id for t in tokens]) if unknown_id is not None else None,
            "lengths": lengths.totals,
        }
    ids = {split: {d.prompt.prompt_id for d in splits[split]} for split in SPLITS}
    found["overlap"] = {f"{a}-{b}": len(ids[a] & ids[b]) for a, b in (("train", "dev"), ("train", "test"), ("dev", "test"))}
    return found


def _spread(values: Sequence[int]) -> dict[str, int] | None:
    return {"least": min(values), "median": int(np.median(values)), "most": max(values)} if values else None


def _share(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if len(flags) else None


def render(found: Mapping[str, Any], notes: Mapping[str, Any], example: str) -> str:
    """The report of `irlign validate` as plain text."""
    lines = [f"read: {sentence}" for sentence in read_notes(notes)]
    for split, of in found["splits"].items():
        lines += ["", f"{split}: {of['rows']} rows, {of['prompts']} prompts"]
        for side in ("prompt", "completion"):
            if spread := of["tokens"][side]:
                lines.append(f"  {side} tokens: {spread['least']} to {spread['most']}, median {spread['median']}")
        if of["lengths"]:
            unknown = "no unknown token in this tokenizer" if of["unknown_tokens"] is None else f"{of['unknown_tokens']:.2%} unknown tokens"
            lines.append(f"  over {found['max_length']} tokens: {of['over_max_length']:.1%}; EOS kept: {of['eos_kept']:.1%}; {unknown}")
    if lengths := found["splits"].get("train", {}).get("lengths"):
        lines += ["", "tokens a row (train)", *histogram(lengths)]
    shared = {pair: count for pair, count in found["overlap"].items() if count}
    lines += ["", f"prompts in two splits: {', '.join(f'{c} in {p}' for p, c in shared.items()) or 'none'}"]
    return "\n".join([*lines, "", "one row as the model reads it; [[...]] is what the loss is on", example])


def read_notes(notes: Mapping[str, Any]) -> list[str]:
    """What happened to the rows of each file, in words."""
    words = {
        "empty": "with an empty answer, dropped",
        "duplicates": "duplicates, dropped",
        "turns_after_answer": "turns after a last answer, dropped",
        "overlong_dropped": "too long, dropped",
        "overlong_truncated": "too long, cut after a sentence",
        "prompts_too_long": "with a prompt too long to answer, dropped",
        "one_sided": "for a prompt that no pool, or only the other, answers: left out",
        "of_train_prompts": "for prompts that the reward is trained on: left out",
        "special_tokens": "with special tokens of the tokenizer in them, read as plain text",
    }
    found = []
    for source, counts in notes.items():
        said = [f"{counts[key]} {text}" for key, text in words.items() if counts.get(key)]
        found.append(f"{source}: {counts['rows']} rows" + (", " + ", ".join(said) if said else ", all kept"))
    return found


def histogram(values: Sequence[int], bins: int = 10, width: int = 40) -> list[str]:
    """A text histogram, one line a bin."""
    counts, edges = np.histogram(values, bins=min(bins, max(1, int(np.ptp(values)))))
    first = np.ceil(edges[:-1]).astype(int)
    last = [*(first[1:] - 1), int(edges[-1])]  # a bin holds its lower edge, the last one its upper edge too
    return [
        f"  {lo:>6} - {hi:<6} {'#' * max(1, round(width * c / counts.max())) if c else ''} {c}"
        for lo, hi, c in zip(first, last, counts, strict=True)
    ]


def masked_example(form: Format, demonstration: Demonstration) -> str:
    """One row decoded, the part that carries loss in double brackets, EOS shown."""
    row = form.encode([demonstration.prompt.content], [demonstration.completion])[0]
    learned = [label != IGNORED for label in row.labels]
    start = learned.index(True)
    before, after, alone = (
        str(form.tokenizer.decode(ids, skip_special_tokens=False)) for ids in (row.ids[:start], row.ids, row.ids[start:])
    )
    tail = after[len(before) :] if after.startswith(before) else alone
    return f"{before}[[{tail}]]"

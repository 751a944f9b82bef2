"""Samples that somebody else drew become the pools of a run: stored answers of a weaker and a better policy, and candidates.

No weights of a policy are read, so anything may have drawn them: an old and a new prompt, two versions of a product, two models
behind an API. A file is what `data/readers.py` reads (JSONL, JSON, CSV, Parquet, a Hub id), one answer a row: `prompt` and
`completion` (or another form that demonstrations may have), and where they are there `id` and `model`, which come back with the
selection, and `finish_reason` ("length": the answer was cut at a limit).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from irlign.config import Settings
from irlign.data.demonstrations import DataSettings, examples_of, in_split, load_demonstrations, split_by_prompt
from irlign.data.readers import read_rows
from irlign.errors import DataError
from irlign.files import read_table, write_table
from irlign.records import SPLITS, Demonstration, FinishReason, Prompt, Sample, prompt_to_cell

ENDS: dict[str, FinishReason] = {"eos": "eos", "stop": "stop", "length": "length"}
KEPT = ("id", "model")  # columns of the user's own that stand beside the selection


class PoolSettings(Settings):
    """Stored samples in the place of policies: what a run without weights learns from and chooses among."""

    initial: str = Field(description="answers of the weaker policy (pi_0): the worse side; a file or a Hub id")
    sft: str = Field(description="answers of the better policy (pi_SFT) to the same prompts: the better side")
    candidates: str | None = Field(
        None, description="answers to choose among, from any source; null = those of sft on dev and test prompts"
    )

    @model_validator(mode="after")
    def _different(self) -> "PoolSettings":
        if self.initial == self.sft:
            raise ValueError("initial and sft are one file: the reward would have nothing to tell apart")
        if self.candidates in (self.initial, self.sft):
            raise ValueError("candidates is the file of another pool; leave it out to choose among the answers of sft")
        return self

    @property
    def files(self) -> dict[str, str]:
        """The file of each pool of the run."""
        found = {"init": self.initial, "sft": self.sft, "candidates": self.candidates}
        return {pool: file for pool, file in found.items() if file}

    @property
    def pool(self) -> str:
        """The pool that Best-of-N chooses among."""
        return "candidates" if self.candidates else "sft"


@dataclass(frozen=True)
class Given:
    """One stored answer, numbered among those to its prompt in the order of the file, and what stands beside it (KEPT)."""

    sample: Sample
    beside: Mapping[str, str | None]


def read_answers(name: str, settings: DataSettings) -> list[Given]:
    """Every answer in a file, its prompt in no split yet; empty answers are answers. Raises DataError naming the row for a missing
    column, a wrong type or an unknown finish_reason, and where the file holds nothing."""
    found: list[Given] = []
    seen: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for place, row in read_rows(name, split=settings.split, max_rows=settings.max_rows):
        reason = row.get("finish_reason") or "eos"
        if reason not in ENDS:
            do = f"write {', '.join(ENDS)}, or leave the column out where every answer is whole"
            raise DataError(f"finish_reason {reason!r} is unknown", where=place, do=do)
        beside = {key: None if row.get(key) is None else str(row[key]) for key in KEPT}
        for content, completion, _ in examples_of(row, settings, place, True, lost):
            prompt = Prompt.of(content, "")
            found.append(Given(Sample(prompt, seen[prompt.prompt_id], completion, ENDS[reason], 0, None), beside))
            seen[prompt.prompt_id] += 1
    return found


def given_splits(
    pools: PoolSettings, settings: DataSettings, seed: int, dataset: str | None
) -> tuple[dict[str, list[Demonstration]], dict[str, dict[str, Any]]]:
    """The prompts of the pools as splits, each with its demonstrations where `dataset` has some, and counts by file.

    Prompts that both policies answer are split as demonstrations are; a prompt that only candidates answer is a test prompt, since
    nothing is trained on it. Raises DataError where the pools share no prompt, candidates answer train prompts alone, or no
    demonstration's prompt is among them.
    """
    answers = {pool: read_answers(file, settings) for pool, file in pools.files.items()}
    prompts = {pool: {a.sample.prompt.prompt_id: a.sample.prompt for a in of} for pool, of in answers.items()}
    both = [p for prompt_id, p in prompts["init"].items() if prompt_id in prompts["sft"]]
    if not both:
        raise DataError(_strangers(prompts["init"], prompts["sft"]), where=f"{pools.initial}, {pools.sft}", do=_ALIKE)
    splits = split_by_prompt([Demonstration(p, "") for p in both], settings, seed)
    where = {d.prompt.prompt_id: split for split, of in splits.items() for d in of}
    notes: dict[str, dict[str, Any]] = {file: {"rows": len(answers[pool])} for pool, file in pools.files.items()}
    for pool in ("init", "sft"):
        notes[pools.files[pool]]["one_sided"] = sum(a.sample.prompt.prompt_id not in where for a in answers[pool])
    if pools.candidates:
        new = [p for prompt_id, p in prompts["candidates"].items() if prompt_id not in where]
        splits["test"] += in_split([Demonstration(p, "") for p in new], "test")
        known = [where.get(a.sample.prompt.prompt_id) for a in answers["candidates"]]
        notes[pools.candidates]["of_train_prompts"] = known.count("train")
        if known.count("train") == len(known):
            do = "raise data.test_prompts, or give candidates for further prompts"
            raise DataError("every candidate answers a prompt that the reward is trained on", where=pools.candidates, do=do)
    if dataset:
        splits, notes[dataset] = _with_demonstrations(splits, dataset, settings)
    return splits, notes


_ALIKE = "the same prompt must be written alike in both files, to the last space"


def _strangers(a: Mapping[str, Prompt], b: Mapping[str, Prompt]) -> str:
    first, second = (prompt_to_cell(next(iter(of.values())).content)[:60] for of in (a, b))
    return f"no prompt of one file ({first!r}, ...) is a prompt of the other ({second!r}, ...)"


def _with_demonstrations(
    splits: Mapping[str, list[Demonstration]], dataset: str, settings: DataSettings
) -> tuple[dict[str, list[Demonstration]], dict[str, Any]]:
    """Each prompt with its demonstrations in the place of an empty one; demonstrations of other prompts are left out and counted."""
    loaded = load_demonstrations(dataset, settings)
    shown: dict[str, list[Demonstration]] = {}
    for demonstration in loaded.demonstrations:
        shown.setdefault(demonstration.prompt.prompt_id, []).append(demonstration)
    known = {d.prompt.prompt_id: d.prompt for of in splits.values() for d in of}
    if not set(shown) & set(known):
        raise DataError(f"{_strangers({d.prompt.prompt_id: d.prompt for d in loaded.demonstrations}, known)}", where=dataset, do=_ALIKE)
    found = {split: [s for d in splits[split] for s in in_split(shown.get(d.prompt.prompt_id, [d]), split)] for split in SPLITS}
    return found, {**loaded.notes, "one_sided": sum(d.prompt.prompt_id not in known for d in loaded.demonstrations)}


def give_pools(pools: PoolSettings, settings: DataSettings, prompts: Sequence[Prompt], folder: Path) -> dict[str, dict[str, Any]]:
    """Write the pools of a run below `folder`, each answer with the split of its prompt, and return their statistics. Left out are answers
    to prompts that the other policy does not answer, and candidates for train prompts."""
    split, statistics = {p.prompt_id: p.split for p in prompts}, {}
    answers = {pool: read_answers(file, settings) for pool, file in pools.files.items()}
    both = set.intersection(*({a.sample.prompt.prompt_id for a in answers[pool]} for pool in ("init", "sft")))
    for pool, of in answers.items():
        own = [a for a in of if a.sample.prompt.prompt_id in (split if pool == "candidates" else both & set(split))]
        rows = [{**a.sample.to_row(), "split": split[a.sample.prompt.prompt_id], **a.beside} for a in own]
        rows = [row for row in rows if pool != "candidates" or row["split"] != "train"]
        rows.sort(key=lambda row: (row["split"], row["prompt_id"], row["index"]))
        write_table(folder / f"pools/{pool}.parquet/part-00000.parquet", rows)
        statistics[pool] = {
            "samples": len(rows),
            "prompts": len({row["prompt_id"] for row in rows}),
            "completions/clipped_ratio": float(np.mean([row["finish_reason"] == "length" for row in rows])),
            "completions/empty_ratio": float(np.mean([not row["completion"].strip() for row in rows])),
        }
    return statistics


def beside_selection(pool: Path, selected: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of selected.jsonl with the `id` and `model` that the user's file gave the picked answer, where it gave them."""
    given = {
        (row["prompt_id"], row["index"]): {key: row[key] for key in KEPT if row[key] is not None}
        for row in read_table(pool, "prompt_id", "index", *KEPT)
    }
    return [{**row, **given[row["prompt_id"], row["index"]]} for row in selected]


def describe_given(splits: Mapping[str, Sequence[Demonstration]], pools: PoolSettings, settings: DataSettings) -> list[str]:
    """What `irlign validate` says of stored samples: prompts and demonstrations by split, and of each pool answers a prompt, words an
    answer, and the shares that were cut, are empty, or repeat another answer to their prompt."""
    lines = []
    for split in SPLITS:
        ids, shown = {d.prompt.prompt_id for d in splits[split]}, sum(bool(d.completion) for d in splits[split])
        lines.append(f"{split}: {len(ids)} prompts, {shown} demonstrations")
    for pool, file in pools.files.items():
        samples = [a.sample for a in read_answers(file, settings)]
        each = list(Counter(s.prompt.prompt_id for s in samples).values())
        words = [len(s.completion.split()) for s in samples]
        distinct = len({(s.prompt.prompt_id, s.completion) for s in samples})
        lines += [
            f"{pool}: {len(samples)} answers to {len(each)} prompts, {min(each)} to {max(each)} each; words an answer: {min(words)} to {max(words)}, "
            f"median {int(np.median(words))}",
            f"  cut {np.mean([not s.finished for s in samples]):.0%}, empty {np.mean([not s.completion.strip() for s in samples]):.0%}, "
            f"repeated {1 - distinct / len(samples):.0%}",
        ]
    return lines

"""Files become the three splits of a run: read, fitted to the model's length, split by prompt, checked for overlap."""

from dataclasses import replace
from typing import Any

from irlign.data.chat import Format
from irlign.data.checks import apply_overlong
from irlign.data.demonstrations import (
    DataSettings,
    check_usable,
    guard_overlap,
    in_split,
    load_demonstrations,
    split_by_prompt,
    without_repeats,
)
from irlign.errors import DataError
from irlign.files import read_table
from irlign.records import SPLITS, Demonstration, Prompt
from irlign.runs import Run

Splits = dict[str, list[Demonstration]]


def load_splits(
    dataset: str,
    settings: DataSettings,
    form: Format,
    *,
    context: int,
    room: int,
    seed: int,
    eval_dataset: str | None = None,
    prompt_dataset: str | None = None,
) -> tuple[Splits, dict[str, dict[str, Any]]]:
    """Train, dev and test demonstrations, and for each file the counts of what was read, dropped and cut.

    `context` is what the model reads and `room` what an answer may take, both in tokens. `eval_dataset` becomes the test
    split (rows without an answer are prompts only); `prompt_dataset` adds prompts without answers to train.
    """

    def read(name: str, answers: bool = True) -> list[Demonstration]:
        loaded = load_demonstrations(name, settings, answers=answers)
        rows, cut = apply_overlong(form, loaded.demonstrations, settings, context=context, room=room, name=name)
        notes[name] = {**loaded.notes, **cut}
        return rows

    notes: dict[str, dict[str, Any]] = {}
    rows = read(dataset)
    check_usable(rows, dataset)
    splits = split_by_prompt(rows, settings, seed, test=eval_dataset is None)
    if eval_dataset:
        test = read(eval_dataset, answers=False)
        chosen = list(dict.fromkeys(d.prompt.prompt_id for d in test))[: settings.test_prompts]
        splits["test"] = in_split([d for d in test if d.prompt.prompt_id in set(chosen)], "test")
        notes[eval_dataset]["test_prompts"] = len(chosen)
    if prompt_dataset:
        known = {d.prompt.prompt_id for split in ("train", "dev") for d in splits[split]}
        unknown = [d for d in read(prompt_dataset, answers=False) if d.prompt.prompt_id not in known]
        extra = without_repeats(replace(d, completion="") for d in unknown)
        if not extra:
            raise DataError("every prompt stands in the demonstrations already", where=prompt_dataset, do="leave prompt_dataset_name out")
        splits["train"] += extra
        notes[prompt_dataset]["added_prompts"] = len(extra)
    shared = guard_overlap(splits, settings.allow_overlap)
    return splits, notes | ({"overlap": {"rows": shared}} if shared else {})


def stored_demonstrations(run: Run, split: str) -> list[Demonstration]:
    """The demonstrations of a run's split; prompts without an answer are left out. Raises RunError where the file is damaged."""
    return [d for d in map(Demonstration.from_row, read_table(run.path(f"data/{split}.parquet"))) if d.completion]


def stored_prompts(run: Run) -> list[Prompt]:
    """Every distinct prompt of the run, with its split. Raises RunError where a file is damaged."""
    rows = [Prompt.from_row(row) for split in SPLITS for row in read_table(run.path(f"data/{split}.parquet"))]
    return list({(p.split, p.prompt_id): p for p in rows}.values())

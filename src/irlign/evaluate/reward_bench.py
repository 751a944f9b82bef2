"""The reward on stored preference pairs, in RewardBench's columns: how often it puts the chosen answer first, by subset and at equal length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from irlign import statistics
from irlign.data.demonstrations import DataSettings, load_preferences
from irlign.data.readers import read_rows
from irlign.records import Preference, Prompt, PromptContent

Scores = Callable[[Sequence[PromptContent], Sequence[str]], Mapping[str, np.ndarray]]
MATCHED = 0.2  # lengths that differ by less than 20 %
ALL = "all"


def read_bench(file: str) -> tuple[list[Preference], list[str]]:
    """The pairs of a file with `prompt`, `chosen`, `rejected`, and the `subset` of each ("all" without that column). Raises DataError naming
    the row for a missing column, a wrong type or an empty answer."""
    pairs, _ = load_preferences(file, DataSettings())
    return pairs, [str(row.get("subset") or ALL) for _, row in read_rows(file)]


def bench(file: str, score: Scores, *, conversational: bool, resamples: int, seed: int) -> dict[str, Any]:
    """`file`, `pairs` and `subsets`: for each subset, after all of them together, what `agreement` gives.

    `score` gives every reward's value of prompts and answers by name; `length` (characters) is put beside them. With `conversational`, which is
    how the run's own prompts are, a plain prompt is a user's turn. Raises what `read_bench` does.
    """
    pairs, subsets = read_bench(file)
    prompts = [_asked(pair.prompt, conversational) for pair in pairs]
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    both = score([*prompts, *prompts], [*chosen, *rejected])
    lengths = np.array([len(text) for text in (*chosen, *rejected)], dtype=float)
    values = {name: np.asarray(of, dtype=float).reshape(2, -1) for name, of in {**both, "length": lengths}.items()}
    ids, named = np.array([pair.prompt.prompt_id for pair in pairs]), np.array(subsets)
    rows = [(ALL, np.ones(len(pairs), dtype=bool)), *((name, named == name) for name in dict.fromkeys(subsets) if name != ALL)]
    told = [
        {"subset": name, **agreement({r: of[:, own] for r, of in values.items()}, ids[own], resamples=resamples, seed=seed)}
        for name, own in rows
        if len(rows) != 2 or name != ALL  # one subset is all there is
    ]
    return {"file": file, "pairs": len(pairs), "subsets": told}


def agreement(values_2_P: Mapping[str, np.ndarray], ids_P: Sequence[str] | np.ndarray, *, resamples: int, seed: int) -> dict[str, Any]:
    """How often each reward puts the first of two answers above the second, a tie counting half: `accuracy` by reward (E over prompts, whose
    pairs are averaged first) and `pairs`, and the same on the pairs whose lengths are `similar` (`matched`, `matched_pairs`). `values_2_P` holds
    the values of both sides, `length` among them."""
    close_P = similar(*values_2_P["length"])

    def share(keep_P: np.ndarray) -> dict[str, Any]:
        found = {}
        for name, (first_P, second_P) in values_2_P.items():
            right_P = np.where(first_P == second_P, 0.5, first_P > second_P)[keep_P]
            which_P = np.unique(np.asarray(ids_P)[keep_P], return_inverse=True)[1]
            means = np.bincount(which_P, right_P) / np.bincount(which_P)
            found[name] = statistics.estimate(means, resamples=resamples, seed=seed).to_json() if len(means) else None
        return found

    every = np.ones(len(close_P), dtype=bool)
    return {"pairs": len(close_P), "accuracy": share(every), "matched_pairs": int(close_P.sum()), "matched": share(close_P)}


def similar(first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    """Whether two lengths differ by less than MATCHED, the shorter being the measure. Shape [P]."""
    first, second = (np.maximum(1, np.asarray(side, dtype=float)) for side in (first_P, second_P))
    return np.asarray(np.abs(np.log(first / second)) < np.log1p(MATCHED))


def _asked(prompt: Prompt, conversational: bool) -> PromptContent:
    plain = isinstance(prompt.content, str) and conversational
    return ({"role": "user", "content": str(prompt.content)},) if plain else prompt.content

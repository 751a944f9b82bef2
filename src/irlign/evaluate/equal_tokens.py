"""Best-of-n in which each prompt takes as many answers as it deserves, beside the same n for all prompts at equal tokens."""

from typing import Any

import numpy as np

from irlign import statistics
from irlign.evaluate.metrics import Evaluation

ADAPTIVE, EQUAL = "adaptive", "best_of_equal_tokens"


def adaptive_point(measured: Evaluation, tokens: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`adaptive` of results.json and its tests. `tokens` are those of every answer in the pool, row for row.

    `n` and `tokens` a prompt, `reward` and `golden` of the picks, in the order drawn; `equal_tokens` is Best-of-n for all prompts with as many
    tokens altogether. There the n may lie between two: so many prompts then take the lower and the others the higher one.
    """
    pool = measured.pool
    used, drawn, lengths = (pool.by_prompt(of) for of in (measured.used, measured.used * tokens, tokens))
    equal = sum(of.sum() for of in drawn.values()) / sum(of.mean() for of in lengths.values())
    picks, scores = measured.best(), pool.rewards[measured.selector]
    rows = [picks[p] for p in measured.prompts]
    point: dict[str, Any] = {"n": measured.estimate([of.sum() for of in used.values()])}
    point |= {"tokens": measured.estimate([of.sum() for of in drawn.values()]), "equal_tokens": {"n": float(equal)}}
    tests = []
    for name, values in (("reward", scores), ("golden", pool.golden)):
        if values is None:
            point[name] = point["equal_tokens"][name] = None
            continue
        same_P, mean_P = best_between(measured, values, equal), [of.mean() for of in pool.by_prompt(values).values()]
        point[name], point["equal_tokens"][name] = measured.estimate(values[rows]), measured.estimate(same_P)
        options: dict[str, Any] = {"resamples": measured.resamples, "seed": measured.seed}
        for other, of in ((EQUAL, same_P), (measured.base, mean_P)) if name == "golden" else ():
            tests.append({**statistics.paired_test(ADAPTIVE, other, values[rows], of, **options).to_json(), "measure": name})
    return point, tests


def best_between(measured: Evaluation, values: np.ndarray, n: float) -> np.ndarray:
    """Expected value of Best-of-n by the reward that selects, between two whole n in proportion, shape [P]; the whole pool at most."""
    low = min(int(n), measured.largest)
    share = min(n, measured.largest) - low
    curve_P_2 = measured.curve(measured.pool.rewards[measured.selector], values, [low, min(low + 1, measured.largest)])
    return curve_P_2 @ np.array([1 - share, share])

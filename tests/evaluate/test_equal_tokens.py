"""A number of answers of its own for each prompt, beside the same tokens spent alike, by hand."""

import numpy as np
import pytest

from irlign.evaluate.equal_tokens import adaptive_point, best_between
from irlign.evaluate.group import Group
from irlign.evaluate.metrics import Evaluation, EvaluationSettings

IDS = ["p", "p", "p", "q", "q", "q"]
USED = np.array([True, False, False, True, True, True])
TOKENS = np.array([2, 6, 4, 5, 5, 8])


def _evaluation(golden=(1.0, 5.0, 3.0, 0.0, 2.0, 7.0)):
    """The reward of p falls and that of q rises, so that p's first answer and q's last are the best."""
    rewards = {"r": np.array([3.0, 2.0, 1.0, 1.0, 2.0, 3.0])}
    pool = Group(IDS, list("abcdef"), np.ones(6, dtype=bool), rewards, None if golden is None else np.array(golden))
    none = Group([], [], np.array([], dtype=bool), {"r": np.array([])}, np.array([]))
    return Evaluation(none, pool, none, "r", EvaluationSettings(resamples=200), 0, used=USED)


def test_the_point_by_hand():
    """p used one answer of 2 tokens, q three of 18; an answer has 4 tokens with p and 6 with q, so that 20 tokens buy n = 2 for both.
    Best-of-2 takes the best of three with 2/3 and the middle one with 1/3: (2 + 5) / 3 and (14 + 2) / 3 by golden."""
    point, tests = adaptive_point(_evaluation(), TOKENS)
    assert (point["n"]["mean"], point["tokens"]["mean"], point["equal_tokens"]["n"]) == (2, 10, 2)
    assert (point["golden"]["mean"], point["reward"]["mean"]) == (4, 3)
    assert point["equal_tokens"]["golden"]["mean"] == pytest.approx((7 + 16) / 6)
    gaps = {(t["a"], t["b"]): t["mean_difference"] for t in tests}
    assert gaps == {("adaptive", "best_of_equal_tokens"): pytest.approx(4 - 23 / 6), ("adaptive", "sft"): pytest.approx(4 - 3)}


def test_without_golden_nothing_is_tested():
    point, tests = adaptive_point(_evaluation(golden=None), TOKENS)
    assert point["golden"] is None and point["equal_tokens"]["golden"] is None and point["reward"]["mean"] == 3 and tests == []


@pytest.mark.parametrize(("n", "shares"), [(1, (1, 0, 0)), (1.25, (0.75, 0.25, 0)), (2.5, (0, 0.5, 0.5)), (3, (0, 0, 1)), (9, (0, 0, 1))])
def test_between_two_n_the_value_is_shared(n, shares):
    measured = _evaluation()
    curve = measured.curve(measured.pool.rewards["r"], measured.pool.golden, [1, 2, 3])
    assert best_between(measured, measured.pool.golden, n) == pytest.approx(curve @ np.array(shares))


def test_the_pick_is_among_the_used_answers():
    assert _evaluation().best() == {"p": 0, "q": 5}

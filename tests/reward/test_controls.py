"""Controls: the cosine by hand, chance that is chance and repeatable, and that no run can select by them."""

from math import log, sqrt

import numpy as np
import pytest

from irlign.records import prompt_identity
from irlign.reward.controls import CONTROLS, ORACLE_LIKE, chance, controls, cosine, length
from irlign.reward.load import KINDS
from irlign.statistics import auc

TALK = ({"role": "user", "content": "Hé?"},)


def test_the_cosine_by_hand():
    """Two demonstrations, D = 2: a term of one of them weighs 1 + log(3/2), of both 1, of none 1 + log 3."""
    demonstrations = {prompt_identity("a"): ["Red cat."], prompt_identity("b"): ["Red dog"]}
    one, none = 1 + log(3 / 2), 1 + log(3)
    found = cosine(["a", "a", "a", "b", "a", "c"], ["red CAT", "red sun", "moon", "Red dog!", "", "red cat"], demonstrations)
    # "red cat": red 1, cat and "red cat" one each.  "red sun": red 1, sun and "red sun" none each
    norm, other = sqrt(1 + 2 * one**2), sqrt(1 + 2 * none**2)
    assert found == pytest.approx([1, 1 / (norm * other), 0, 1, 0, 0])


def test_counts_weigh_and_the_nearest_of_several_counts():
    demonstrations = {prompt_identity(TALK): ["sun", "moon moon"]}
    one, none = 1 + log(3 / 2), 1 + log(3)
    # "moon moon" holds moon twice and the pair once, all weighing one; the pair "sun sun" stands in no demonstration
    expected = [2 / sqrt(4 + 1), 2 * one / sqrt(4 * one**2 + none**2)]
    assert cosine([TALK, TALK], ["moon", "sun sun"], demonstrations) == pytest.approx(expected)


def test_chance_is_uniform_repeatable_and_hangs_on_both_texts():
    texts = [f"answer {i}" for i in range(4000)]
    found = chance(["a"] * 4000, texts)
    assert found.tolist() == chance(["a"] * 4000, texts).tolist() and len(set(found)) == 4000
    assert 0 <= found.min() < 0.01 and 0.99 < found.max() < 1 and abs(found.mean() - 0.5) < 0.02
    assert abs(auc(found, chance(["b"] * 4000, texts)) - 0.5) < 0.03 and chance(["b"], texts[:1])[0] != found[0]


def test_every_control_under_its_name():
    found = controls(["a", "a"], ["Hi", "Hello"], {})
    assert tuple(found) == CONTROLS and found["length"].tolist() == length([], ["Hi", "Hello"]).tolist() == [2, 5]
    assert found[ORACLE_LIKE].tolist() == [0, 0] and np.ptp(found["random"]) > 0 and "oracle-like" in ORACLE_LIKE


def test_no_stored_reward_is_a_control():
    assert not set(KINDS) & {*CONTROLS, "cosine", "chance"}

"""The benchmark of on-policy training, its pure parts: the reward that costs nothing, and who draws for which engine."""

import pytest

from irlign.optimise.drawing import GENERATION

on_policy = pytest.importorskip("on_policy")


def test_the_reward_counts_different_words():
    assert on_policy.Words().score(["a", "b", "c"], [" w3 w4 w3", "", "w5 w6  w7"]).tolist() == [2, 0, 3]


def test_trl_draws_where_a_field_of_its_own_is_set_and_nowhere_else():
    assert on_policy.DRAWN_BY["irlign"] == {} and set(on_policy.DRAWN_BY["generate"]) & set(GENERATION)
    assert on_policy.DRAWN_BY["generate"]["repetition_penalty"] == 1  # which changes no answer

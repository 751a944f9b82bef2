"""RLSR's reward: cosines by hand, in words and under a policy."""

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.optimise.rlsr import DemonstrationCosine
from irlign.records import prompt_identity
from irlign.reward.features import policy_features

SHOWN = {prompt_identity("the cat"): [" sat on", " ran home now"]}


def test_in_words_the_nearest_demonstration_counts():
    """`sat on` has three terms, `sat` one of them: 1 / sqrt(3); nothing in common is 0, and so is a prompt without a demonstration."""
    score = DemonstrationCosine(SHOWN, "words", "none").score
    found = score(["the cat", "the cat", "the cat", "the cat", "the dog"], [" sat on", " sat", " ran home now", " bird", " sat on"])
    assert found.tolist() == pytest.approx([1.0, 1 / np.sqrt(3), 1.0, 0.0, 0.0], abs=1e-6)
    assert score(["the dog"], [" sat"]).tolist() == [0.0]


def test_under_a_policy_it_is_the_cosine_of_its_features(tmp_path):
    policy = make_tiny_policy(tmp_path / "policy")
    reward = DemonstrationCosine({prompt_identity("the cat"): [" sat on"]}, policy, "none")
    own, shown = policy_features(policy, ["the cat"] * 2, [" ran home", " sat on"], chat_template="none", name="")
    by_hand = own @ shown / np.sqrt((own @ own) * (shown @ shown))
    assert reward.score(["the cat"] * 2, [" ran home", " sat on"]).tolist() == pytest.approx([by_hand, 1.0], abs=1e-5)

"""Frozen features and the head on them: the same in any batch, fitted as the formula says, and learned rather than lucky."""

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy

from irlign.data.chat import Format
from irlign.policy.load import load_policy
from irlign.reward import features
from irlign.reward.features import LogisticHead, policy_features

PROMPTS = ["the cat", "a dog sat on", "the bird"]
TEXTS = [" sat on the mat.", " ran.", " sang and sang and ran home now."]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def test_features_are_the_mean_and_the_last_of_the_answers_hidden_states(policy):
    found = policy_features(policy, PROMPTS, TEXTS, chat_template="none", name="tiny")
    loaded = load_policy(str(policy), "tiny")
    for i, row in enumerate(Format(loaded.tokenizer, "none").encode(PROMPTS, TEXTS)):
        with torch.no_grad():
            hidden = loaded.model.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, len(row.prompt_ids) :]
        assert found[i] == pytest.approx(torch.cat([hidden.mean(0), hidden[-1]]).numpy(), abs=1e-5)
    assert found.shape == (3, 64) and found.dtype == np.float32


def test_the_batch_changes_nothing(policy, monkeypatch):
    together = policy_features(policy, PROMPTS, TEXTS, chat_template="none", name="tiny")
    monkeypatch.setattr(features, "CPU_TOKENS", 1)
    alone = policy_features(policy, PROMPTS, TEXTS, chat_template="none", name="tiny")
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_head_sits_at_the_minimum_of_its_loss():
    """Every small step away costs more: loss and gradient agree."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(40, 3)), (rng.random(40) < 0.5).astype(float), rng.random(40)
    head = LogisticHead(x, y, w, ridge=0.01)

    def loss(weight, bias):
        logits = ((x - head.mean_F) / head.scale_F) @ weight + bias
        return (w / w.sum()) @ np.logaddexp(0, np.where(y == 1, -logits, logits)) + 0.01 * weight @ weight

    best = loss(head.weight_F, head.bias)
    for step in np.vstack([np.eye(4), -np.eye(4)]) * 1e-2:
        assert loss(head.weight_F + step[:3], head.bias + step[3]) > best


def test_without_features_the_logit_is_the_log_odds():
    head = LogisticHead(np.zeros((4, 1)), np.array([1, 1, 1, 0]), np.ones(4), ridge=0.1)
    assert head(np.zeros((1, 1)))[0] == pytest.approx(np.log(3), abs=1e-4)


def test_it_learned():
    """Accuracy on unseen rows lies above what every one of 19 shuffled labellings reaches (p = 0.05)."""
    rng = np.random.default_rng(1)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 10)) + 2 * y[:, None] * (np.arange(10) == 0)

    def accuracy(labels):
        head = LogisticHead(x[:100], labels[:100], np.ones(100), ridge=1e-3)
        return ((head(x[100:]) > 0) == y[100:]).mean()

    assert accuracy(y) > max(accuracy(rng.permutation(y)) for _ in range(19))


def test_one_side_alone_is_refused():
    with pytest.raises(ValueError, match="both sides"):
        LogisticHead(np.zeros((3, 2)), np.ones(3), np.ones(3), ridge=0.1)

"""Heads over one backbone: each sees its fold, their mean is one plain classifier, and the rest is as saved, in any batch."""

import itertools

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy

from irlign import forward
from irlign.errors import ModelError
from irlign.records import Contrast, Prompt
from irlign.reward.ensemble import combine
from irlign.reward.heads import SharedHeads
from irlign.reward.learn import train_reward_of
from irlign.reward.load import load_reward
from irlign.reward.model import Classifier
from irlign.reward.objectives import LOSSES
from irlign.reward.train import RewardSettings, accuracy_and_margin, fit_classifier, fold_of_pairs, fold_weights

PAIRS = [
    Contrast(Prompt.of(f"the {a} and a {b}", "train"), f" the red {b} {v}.", f" the blue {b} {v}.")
    for a, b, v in itertools.product(("cat", "dog", "bird"), ("cat", "dog", "bird"), ("sat", "ran", "sang", "ran home now"))
]
ASK = (["the cat and a dog"] * 3, [" the red dog sat.", " the blue dog sat.", " the red bird sang and sang."])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request, tmp_path_factory):
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if request.param == "gpt2" else {}  # losses are compared exactly
    return make_tiny_policy(tmp_path_factory.mktemp("policy"), architecture=request.param, **still)


def train(policy, folder, **settings):
    fast = {"learning_rate": 5e-3, "num_train_epochs": 12, "per_device_train_batch_size": 8}
    settings = RewardSettings(**{"kind": "heads", "members": 3, **fast, **settings})
    places = {"folder": folder / "reward", "checkpoints": folder / "checkpoints", "chat_template": "none"}
    return train_reward_of(settings, policy, {"init-sft": PAIRS[::2]}, {"init-sft": PAIRS[1::2]}, **places)


def test_the_weights_of_the_folds_by_hand():
    assert fold_weights(4, 1).tolist() == [[1], [1], [1], [1]]
    assert fold_weights(4, 3).tolist() == [[0, 1.5, 1.5], [1.5, 0, 1.5], [1.5, 1.5, 0], [0, 1.5, 1.5]]
    for k in range(3):
        assert fold_of_pairs(range(6), k, 3) == np.flatnonzero(fold_weights(6, 3)[:, k]).tolist()


@pytest.mark.parametrize("aggregate", ["mean", "min", "mean-variance"])
def test_saved_heads_are_the_rule_in_any_batch(policy, tmp_path, monkeypatch, aggregate):
    about = train(policy, tmp_path, aggregate=aggregate)
    assert (about["kind"], about["heads"]) == ("classifier" if aggregate == "mean" else "heads", 3) and about["dev"]["accuracy"] > 0.8
    members_K_B = SharedHeads.load(tmp_path / "reward", about).member_scores(*ASK)
    assert members_K_B.shape == (3, 3) and np.ptp(members_K_B, 0).min() > 1e-4
    reward = load_reward(tmp_path / "reward")
    assert reward.score(*ASK) == pytest.approx(combine(members_K_B, aggregate, 0.5), abs=1e-5)
    one = np.concatenate([reward.score([p], [c]) for p, c in zip(*ASK, strict=True)])
    monkeypatch.setattr(forward, "CPU_TOKENS", 1)
    assert reward.score(*ASK) == pytest.approx(one, abs=1e-5)
    dev = PAIRS[1::2]
    better, worse = (reward.score([p.prompt.content for p in dev], [getattr(p, side) for p in dev]) for side in ("better", "worse"))
    assert (better - worse).mean() == pytest.approx(about["dev"]["margin"], abs=1e-3)


def test_the_mean_of_the_heads_is_a_plain_classifier(policy, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    about = train(policy, tmp_path, aggregate="min")
    model, tokenizer = (of.from_pretrained(tmp_path / "reward") for of in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.num_labels == 1 and model.config.id2label == {0: "reward"}
    batch = tokenizer([p + c + tokenizer.eos_token for p, c in zip(*ASK, strict=True)], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    mean = SharedHeads.load(tmp_path / "reward", about).member_scores(*ASK).mean(0)
    assert logits.numpy() == pytest.approx(mean, abs=1e-5)
    assert isinstance(load_reward(tmp_path / "reward"), SharedHeads)
    assert Classifier.load(tmp_path / "reward", about).score(*ASK) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_loss_is_each_heads_own_fold(policy, tmp_path, loss):
    """At a negligible learning rate the Trainer's loss is the mean over heads of the mean over the pairs in their folds."""
    pairs = PAIRS[:12]
    settings = RewardSettings(
        kind="heads", members=3, loss=loss, learning_rate=1e-12, num_train_epochs=1, per_device_train_batch_size=4,
        gradient_accumulation_steps=3, trainer={"logging_steps": 1},
    )  # fmt: skip
    options = {"chat_template": "none", "checkpoints": tmp_path, "seed": 0, "report_to": "none", "heads": 3}
    reward, log = fit_classifier(policy, pairs, settings, **options)
    losses = []
    for k in range(3):
        own = fold_of_pairs(pairs, k, 3)
        rows = (reward.format.encode([p.prompt.content for p in own], [getattr(p, side) for p in own]) for side in ("better", "worse"))
        losses.append(LOSSES[loss](*(torch.tensor(reward.logits(side)[:, k]) for side in rows)).item())
    assert log["steps"] == 1 and log["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_row_that_weighs_nothing_trains_nothing(policy, tmp_path):
    """The other weights being what they are without it, a row of weight 0 leaves loss and gradient alone."""
    from dataclasses import replace

    settings = RewardSettings(learning_rate=1e-12, num_train_epochs=1, per_device_train_batch_size=8, trainer={"logging_steps": 1})
    options = {"chat_template": "none", "checkpoints": tmp_path, "seed": 0, "report_to": "none"}
    four = [replace(pair, weight=weight) for pair, weight in zip(PAIRS[:4], (0.0, 2.0, 1.0, 1.0), strict=True)]
    loss = fit_classifier(policy, four, settings, **options)[1]["loss"]
    without = [replace(pair, weight=pair.weight * 3 / 4) for pair in four[1:]]
    assert loss == pytest.approx(fit_classifier(policy, without, settings, **options)[1]["loss"], rel=1e-5)
    even = fit_classifier(policy, PAIRS[:4], settings, **options)[1]["loss"]
    assert loss != pytest.approx(even, rel=1e-4)


def test_an_adapter_trains_heads_too(policy, tmp_path):
    pytest.importorskip("peft")
    about = train(policy, tmp_path, use_peft=True, lora_r=4, lora_alpha=8, learning_rate=1e-2, aggregate="min")
    assert not list((tmp_path / "reward").glob("adapter*"))
    reward = load_reward(tmp_path / "reward")
    assert len(set(reward.member_scores(*ASK)[:, 0])) == 3
    assert accuracy_and_margin(reward, PAIRS[1::2]) == pytest.approx(about["dev"], abs=1e-3) and about["dev"]["margin"] > 0.1


def test_lost_heads_are_named(policy, tmp_path):
    train(policy, tmp_path, aggregate="min", max_steps=1)
    (tmp_path / "reward/heads.safetensors").unlink()
    with pytest.raises(ModelError, match="heads cannot be loaded"):
        load_reward(tmp_path / "reward")

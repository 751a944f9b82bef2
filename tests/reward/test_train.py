"""Training a reward: that it learns, with either loss, whole or as an adapter, and the same after an interruption."""

import itertools

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy

from irlign.data.chat import Encoded
from irlign.errors import ModelError
from irlign.records import Contrast, Prompt
from irlign.reward.model import Classifier
from irlign.reward.train import RewardSettings, _collate, accuracy_and_margin, train_reward

SUBJECTS, VERBS = ("cat", "dog", "bird"), ("sat", "ran", "sang", "sat on the mat", "ran home now")


def _pairs():
    """Better answers are red, worse ones blue; everything else is the same on both sides. 60 pairs, two thirds to train."""
    pairs = []
    for k, (a, b, v) in enumerate(itertools.product(SUBJECTS, SUBJECTS, VERBS)):
        prompt = Prompt.of(f"the {a} and a {b} {k % 4 * ' now'}", "train")
        pairs.append(Contrast(prompt, f" the red {b} {v}.", f" the blue {b} {v}."))
    return pairs[0::3] + pairs[1::3], pairs[2::3]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def _train(policy, folder, seed=0, dev=None, **settings):
    train, held_out = _pairs()
    defaults = {"learning_rate": 5e-3, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    return train_reward(
        policy,
        train,
        held_out if dev is None else dev,
        RewardSettings(**{**defaults, **settings}),
        chat_template="none",
        folder=folder / "reward",
        checkpoints=folder / "checkpoints",
        seed=seed,
        report_to="none",
    )


def _load(folder):
    return Classifier.load(folder / "reward", {"chat_template": "none", "name": "r"})


def _permutation_p(margins, resamples=2000):
    """One-sided: how often held-out pairs with shuffled sides reach this accuracy."""
    rng = np.random.default_rng(0)
    shuffled = margins * rng.choice([-1, 1], size=(resamples, len(margins)))
    return (1 + np.sum((shuffled > 0).mean(1) >= (margins > 0).mean())) / (1 + resamples)


@pytest.mark.parametrize("loss", ["logistic", "bradley-terry"])
def test_it_learned(policy, tmp_path, loss):
    log = _train(policy, tmp_path, loss=loss)
    assert log["pairs"] == {"train": 30, "dev": 15} and log["steps"] == 12
    reward, held_out = _load(tmp_path), _pairs()[1]
    contents = [p.prompt.content for p in held_out]
    margins = reward.score(contents, [p.better for p in held_out]) - reward.score(contents, [p.worse for p in held_out])
    assert _permutation_p(margins) < 0.05
    assert log["dev"]["accuracy"] == pytest.approx((margins > 0).mean()) and log["dev"]["margin"] == pytest.approx(margins.mean(), abs=1e-3)
    untrained = Classifier.start(policy, "none", "r")
    assert log["dev"]["margin"] > 3 * abs(accuracy_and_margin(untrained, held_out)["margin"])


def test_logistic_puts_zero_between_the_sides(policy, tmp_path):
    """The reward is the logit of `better`: unlike with Bradley-Terry, its sign alone classifies."""
    _train(policy, tmp_path, num_train_epochs=8)
    reward, held_out = _load(tmp_path), _pairs()[1]
    contents = [p.prompt.content for p in held_out]
    assert (reward.score(contents, [p.better for p in held_out]) > 0).mean() > 0.8
    assert (reward.score(contents, [p.worse for p in held_out]) < 0).mean() > 0.8


def test_the_first_logged_loss_is_the_loss(policy, tmp_path):
    """At a negligible learning rate the Trainer's loss is the plain mean over all pairs, accumulated or not."""
    from irlign.reward.objectives import LOSSES

    train, _ = _pairs()
    torch.manual_seed(0)
    for name, steps in (("logistic", 1), ("bradley-terry", 3)):
        log = _train(
            policy, tmp_path / name, loss=name, learning_rate=1e-12, num_train_epochs=1, per_device_train_batch_size=30 // steps,
            gradient_accumulation_steps=steps, trainer={"logging_steps": 1},
        )  # fmt: skip
        reward = _load(tmp_path / name)
        better, worse = (
            torch.tensor(reward.score([p.prompt.content for p in train], [getattr(p, s) for p in train])) for s in ("better", "worse")
        )
        assert log["steps"] == 1
        assert log["loss"] == pytest.approx(LOSSES[name](better, worse).item(), rel=1e-3)


def test_the_collated_batch_by_hand():
    pairs = [(Encoded([1], [5, 2]), Encoded([1], [2])), (Encoded([1], [2]), Encoded([1], [6, 7, 2]))]
    rows = [{"pair": pair, "weights": [weight]} for pair, weight in zip(pairs, (2.0, 0.5), strict=True)]
    batch = _collate(rows, 3, forked=False)
    assert batch["input_ids"].tolist() == [[1, 5, 2, 3], [1, 2, 3, 3], [1, 2, 3, 3], [1, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[2.0], [0.5], [2.0], [0.5]]
    forked = _collate(rows, 3, forked=True)
    assert forked["input_ids"].tolist() == [[1, 5, 2, 2, 3], [1, 2, 6, 7, 2]]
    assert forked["attention_mask"].tolist() == batch["attention_mask"].tolist() and forked["labels"].tolist() == batch["labels"].tolist()


def test_pairs_in_one_row_train_the_same_reward(policy, tmp_path, monkeypatch):
    """Steps, tokens, losses and the trained scores, but for rounding; with an adapter and with accumulated batches too."""
    train, _ = _pairs()
    for name, more in {"whole": {}, "adapter": {"use_peft": True, "lora_r": 4}, "accumulated": {"gradient_accumulation_steps": 2}}.items():
        forked = _train(policy, tmp_path / name / "forked", max_steps=6, trainer={"logging_steps": 1}, **more)
        with monkeypatch.context() as patch:
            patch.setattr("irlign.reward.train.can_fork", lambda *_: False)
            apart = _train(policy, tmp_path / name / "apart", max_steps=6, trainer={"logging_steps": 1}, **more)
        assert (forked["steps"], forked["tokens"]) == (apart["steps"], apart["tokens"])
        np.testing.assert_allclose(forked["losses"], apart["losses"], rtol=1e-4)
        scores = [
            _load(tmp_path / name / how).score([p.prompt.content for p in train], [p.better for p in train]) for how in ("forked", "apart")
        ]
        np.testing.assert_allclose(*scores, atol=2e-3)


def test_no_dev_pairs_and_ties(policy, tmp_path):
    assert _train(policy, tmp_path, dev=[], max_steps=1)["dev"] is None
    same = [Contrast(Prompt.of("the cat", "dev"), " sat.", " sat.")]
    assert accuracy_and_margin(_load(tmp_path), same) == {"accuracy": 0.5, "margin": pytest.approx(0, abs=1e-6)}


def test_divergence_is_an_error_that_names_the_remedy(policy, tmp_path):
    with pytest.raises(ModelError, match="diverged") as caught:
        _train(policy, tmp_path, learning_rate=1e30)
    assert caught.value.where == "reward" and "lower reward.learning_rate (now 1e+30)" in str(caught.value)
    assert not (tmp_path / "reward").exists()


def test_an_adapter_is_trained_and_published_as_a_plain_checkpoint(policy, tmp_path):
    pytest.importorskip("peft")
    log = _train(policy, tmp_path, use_peft=True, lora_r=4, lora_alpha=8, learning_rate=2e-2, num_train_epochs=5)
    assert not list((tmp_path / "reward").glob("adapter*"))
    reward = _load(tmp_path)
    assert accuracy_and_margin(reward, _pairs()[1]) == pytest.approx(log["dev"], abs=1e-4)
    assert log["dev"]["accuracy"] > 0.9
    torch.manual_seed(0)
    start = Classifier.start(policy, "none", "r").model
    names = {n for n, p in reward.model.named_parameters() if not torch.equal(p, dict(start.named_parameters())[n])}
    assert any("q_proj" in n for n in names) and "score.weight" in names
    assert not any("embed_tokens" in n or "norm" in n for n in names)


def test_the_same_seed_gives_the_same_reward(policy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _train(policy, tmp_path / name, seed=seed, max_steps=3)
    a, b, c = ((tmp_path / name / "reward/model.safetensors").read_bytes() for name in "abc")
    assert a == b != c

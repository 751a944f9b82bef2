"""Ensembles: the rules by hand, members that differ, an average of weights that is one model, and going on after a kill."""

import itertools
import shutil

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.files import read_json
from irlign.records import Contrast, Prompt
from irlign.reward import ensemble
from irlign.reward.ensemble import combine, train_ensemble
from irlign.reward.load import load_resident, load_reward, score_all
from irlign.reward.model import Classifier
from irlign.reward.publish import held_to_likelihood, publish_held, publish_log_ratios, publish_reward
from irlign.reward.train import RewardSettings, fold_of_pairs

PAIRS = [
    Contrast(Prompt.of(f"the {a} and a {b}", "train"), f" the red {b} {v}.", f" the blue {b} {v}.")
    for a, b, v in itertools.product(("cat", "dog", "bird"), ("cat", "dog", "bird"), ("sat", "ran", "sang", "ran home now"))
]
ABOUT = {
    "name": "init-sft",
    "contrast": "init-sft",
    "loss": "logistic",
    "chat_template": "none",
    "controls": {"length_accuracy": 0.5, "ending_accuracy": 0.5},
}
ASK = (["the cat and a dog"] * 2, [" the red dog sat.", " the blue dog sat."])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def train(policy, folder, **settings):
    settings = {"learning_rate": 5e-3, "num_train_epochs": 6, "per_device_train_batch_size": 8, "members": 3, **settings}
    places = {"folder": folder / "reward", "checkpoints": folder / "checkpoints"}
    log = train_ensemble(
        policy, PAIRS[::2], PAIRS[1::2], RewardSettings(**settings), chat_template="none", seed=0, report_to="none", **places
    )
    publish_reward(folder / "reward", {**ABOUT, **log}, "test")
    return log


def test_the_rules_by_hand():
    scores = np.array([[1.0, 4.0], [3.0, 4.0]])
    assert combine(scores, "mean", 0.5).tolist() == [2.0, 4.0]
    assert combine(scores, "min", 0.5).tolist() == [1.0, 4.0]
    assert combine(scores, "mean-variance", 0.5).tolist() == [2.0 - 0.5 * 1.0, 4.0]


def test_every_member_misses_other_pairs():
    folds = [fold_of_pairs(PAIRS, k, 3) for k in range(3)]
    assert all(len(fold) == len(PAIRS) * 2 // 3 for fold in folds)
    assert all(sum(pair in fold for fold in folds) == 2 for pair in PAIRS)
    assert fold_of_pairs(PAIRS, 0, 1) == PAIRS


@pytest.mark.parametrize("aggregate", ["mean", "min", "mean-variance"])
def test_an_ensemble_is_its_members_by_the_rule(policy, tmp_path, aggregate):
    log = train(policy, tmp_path, aggregate=aggregate)
    about = read_json(tmp_path / "reward/reward.json")
    assert (about["kind"], about["members"], len(log["training"])) == ("ensemble", ["member-0", "member-1", "member-2"], 3)
    members = np.stack(
        [Classifier.load(tmp_path / "reward" / m, {"chat_template": "none", "name": m}).score(*ASK) for m in about["members"]]
    )
    assert len({tuple(row) for row in members.round(6)}) == 3
    assert load_reward(tmp_path / "reward").score(*ASK) == pytest.approx(combine(members, aggregate, 0.5))
    assert log["dev"]["accuracy"] > 0.8


def test_averaged_weights_are_one_classifier(policy, tmp_path):
    log = train(policy, tmp_path, aggregate="weight-average")
    assert (log["kind"], log["averaged"], len(log["training"])) == ("classifier", 3, 3)
    assert not list((tmp_path / "reward").glob("member-*"))
    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").num_labels == 1


def test_the_mean_of_weights_by_hand(policy, tmp_path):
    for k in range(2):
        reward = Classifier.start(policy, "none", "r")
        reward.model.score.weight.data.fill_(float(k))
        reward.save(tmp_path / f"m{k}")
    ensemble.average_weights([tmp_path / "m0", tmp_path / "m1"], tmp_path / "mean", "none", "r")
    mean = Classifier.load(tmp_path / "mean", {"chat_template": "none", "name": "r"})
    assert mean.model.score.weight.detach().numpy() == pytest.approx(0.5)


def test_an_interrupted_ensemble_keeps_its_finished_members(policy, tmp_path, monkeypatch):
    whole = train(policy, tmp_path / "whole")
    done, real = [], ensemble.train_reward

    def killed(*args, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(options["seed"])
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "train_reward", killed)
        with pytest.raises(KeyboardInterrupt):
            train(policy, tmp_path / "killed")
    before = (tmp_path / "killed/reward/member-0/model.safetensors").stat().st_mtime_ns
    assert train(policy, tmp_path / "killed") == whole
    assert (tmp_path / "killed/reward/member-0/model.safetensors").stat().st_mtime_ns == before
    assert load_reward(tmp_path / "killed/reward").score(*ASK) == pytest.approx(load_reward(tmp_path / "whole/reward").score(*ASK))


def test_one_member_is_a_plain_classifier(policy, tmp_path):
    log = train(policy, tmp_path, members=1)
    assert log["kind"] == "classifier" and "averaged" not in log and isinstance(log["training"], dict)


def test_a_reward_held_to_the_likelihood_by_hand(policy, tmp_path):
    """Spreads of 1 and 2 within the known prompts, means 1 and 2, weight 2: (r - 1) / 1 + 2 (l - 2) / 2, halved. And the folder that
    is published scores alike, from the two beside it."""
    reward, likelihood = np.array([0.0, 2.0, 0.0, 2.0, 9.0]), np.array([0.0, 4.0, 4.0, 0.0, 9.0])
    scores, scales = held_to_likelihood(reward, likelihood, ["p", "p", "q", "q", None], 2.0)
    assert scales == [[1.0, 1.0], [2.0, 1.0]]
    assert scores == pytest.approx(((reward - 1) + (likelihood - 2)) / 2)

    shutil.copytree(policy, tmp_path / "policies/sft")
    shutil.copytree(policy, tmp_path / "policies/init")
    hashes = {f"policies/{side}": {"sha256": "-"} for side in ("sft", "init")}
    publish_log_ratios(tmp_path / "rewards", ["likelihood"], hashes, chat_template="none", seed=0)
    log = train(policy, tmp_path, members=1)
    (tmp_path / "reward").rename(tmp_path / "rewards/r")
    publish_reward(tmp_path / "rewards/r", {**ABOUT, **log}, "0")
    parts = [load_reward(tmp_path / "rewards" / name).score(*ASK) for name in ("r", "likelihood")]
    scores, scales = held_to_likelihood(*parts, ["p", "p"], 1.0)
    publish_held(tmp_path / "rewards", "r+likelihood", tmp_path / "rewards/r", scales, 1.0)
    assert load_reward(tmp_path / "rewards/r+likelihood").score(*ASK) == pytest.approx(scores)
    both = score_all({name: tmp_path / "rewards" / name for name in ("r+likelihood", "likelihood", "r")}, *ASK)
    assert both["r+likelihood"] == pytest.approx(scores) and both["r"] == pytest.approx(parts[0])
    held = load_resident(tmp_path / "rewards/r+likelihood")
    assert held.score(*ASK) == pytest.approx(scores)
    shutil.rmtree(tmp_path / "policies/sft")  # what it reads with is in memory
    (tmp_path / "rewards/r/model.safetensors").unlink()
    assert held.score(*ASK) == pytest.approx(scores)

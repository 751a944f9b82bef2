"""The cheap reward: heads as the formulas say, learned rather than lucky, the same saved as in memory, from a policy or an encoder."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny import make_tiny_encoder, make_tiny_policy

from irlign.errors import ModelError
from irlign.records import Contrast, Prompt
from irlign.reward import features as frozen
from irlign.reward.contrasts import weighted
from irlign.reward.ensemble import combine
from irlign.reward.feature_reward import HEADS, FeatureReward, MlpHead, fit_logistic, fit_mlp
from irlign.reward.features import Features, encoder_features, is_policy, policy_features
from irlign.reward.learn import train_reward_of
from irlign.reward.load import load_reward
from irlign.reward.objectives import LOSSES
from irlign.reward.train import RewardSettings, fold_of_pairs

PAIRS = [
    Contrast(Prompt.of(f"the {a} and a {b}", "train"), f" the red {b} {v}.", f" the blue {b} {v}.")
    for a, b, v in itertools.product(("cat", "dog", "bird"), ("cat", "dog", "bird"), ("sat", "ran", "sang", "ran home now"))
]
ASK = (["the cat and a dog"] * 3, [" the red dog sat.", " the blue dog sat.", ""])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def train(backbone, folder, features=None, pairs=PAIRS[::2], **settings):
    places = {"folder": folder / "reward", "checkpoints": folder / "checkpoints", "chat_template": "none"}
    settings = RewardSettings(**{"kind": "features", **settings})
    return train_reward_of(settings, backbone, {"init-sft": pairs}, {"init-sft": PAIRS[1::2]}, features=features, **places)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_it_learned_and_loads_the_same(policy, tmp_path, head, loss):
    about = train(policy, tmp_path, head=head, loss=loss)
    assert (about["kind"], about["head"], about["pairs"]) == ("features", head, {"train": 18, "dev": 18})
    assert about["dev"]["accuracy"] > 0.9
    assert {path.name for path in (tmp_path / "reward").iterdir()} == {"reward.json", "heads.safetensors", "features.safetensors"}
    loaded = load_reward(tmp_path / "reward")
    dev = PAIRS[1::2]
    contents = [p.prompt.content for p in dev]
    margin = loaded.score(contents, [p.better for p in dev]) - loaded.score(contents, [p.worse for p in dev])
    assert margin.mean() == pytest.approx(about["dev"]["margin"], abs=1e-4)
    eight = loaded.score(*ASK)
    one = np.concatenate([load_reward(tmp_path / "reward").score([p], [c]) for p, c in zip(*ASK, strict=True)])
    assert eight == pytest.approx(one, abs=1e-4) and len(set(eight.round(3))) == 3
    assert loaded.score([], []).shape == (0,)


def test_sides_that_do_not_differ_teach_nothing(policy, tmp_path):
    """A reward that learned from shuffled sides is no better than chance on unseen pairs: the accuracy above is no accident."""
    rng = np.random.default_rng(0)
    shuffled = [pair if rng.random() < 0.5 else Contrast(pair.prompt, pair.worse, pair.better) for pair in PAIRS[::2]]
    assert train(policy, tmp_path, pairs=shuffled)["dev"]["accuracy"] < 0.9


def test_heads_see_their_folds_and_combine_by_the_rule(policy, tmp_path):
    train(policy, tmp_path / "k", members=3, aggregate="min")
    loaded = load_reward(tmp_path / "k/reward")
    scores_K_B = loaded.member_scores(*ASK)
    for k in range(3):
        train(policy, tmp_path / f"alone-{k}", pairs=fold_of_pairs(PAIRS[::2], k, 3))
        assert load_reward(tmp_path / f"alone-{k}/reward").score(*ASK) == pytest.approx(scores_K_B[k], abs=1e-6)
    assert loaded.score(*ASK) == pytest.approx(combine(scores_K_B, "min", 0.5)) and np.ptp(scores_K_B, 0).min() > 1e-3


def _sides(rng, pairs=60, width=4):
    better = rng.normal(size=(pairs, width)) + 1.5 * (np.arange(width) == 0)
    return better, rng.normal(size=(pairs, width)), rng.random(pairs)


def test_the_paired_head_sits_at_the_minimum_of_bradley_terry():
    """Every small step away costs more, and the bias, which Bradley-Terry cannot see, is 0."""
    better, worse, weight = _sides(np.random.default_rng(0))
    settings = RewardSettings(loss="bradley-terry", ridge=0.01)
    head = fit_logistic((better, worse, weight), None, settings, 0)
    assert head.bias == pytest.approx(0, abs=1e-6) and head.mean_F == pytest.approx(0)

    def loss(weight_F):
        margin = (better - worse) / head.scale_F @ weight_F
        return weight / weight.sum() @ np.logaddexp(0, -margin) + 0.01 * weight_F @ weight_F

    for step in np.vstack([np.eye(4), -np.eye(4)]) * 1e-2:
        assert loss(head.weight_F + step) > loss(head.weight_F)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_weight_of_two_is_the_row_twice(loss):
    """Standardisation sees rows and not their weights, so without a ridge, where the scale does not matter, the two agree."""
    rng = np.random.default_rng(1)
    better, worse = rng.normal(size=(80, 4)) + 0.3, rng.normal(size=(80, 4))
    settings, weight = RewardSettings(loss=loss, ridge=1e-12), 1 + np.arange(80) % 2
    twice = np.repeat(np.arange(80), weight)
    whole, repeated, plain = (
        fit_logistic((better[rows], worse[rows], of.astype(float)), None, settings, 0)
        for rows, of in ((slice(None), weight), (twice, np.ones(120)), (slice(None), np.ones(80)))
    )
    slope = {name: head.weight_F / head.scale_F for name, head in (("whole", whole), ("repeated", repeated), ("plain", plain))}
    assert slope["whole"] == pytest.approx(slope["repeated"], abs=1e-3)
    assert np.abs(slope["whole"] - slope["plain"]).max() > 0.02


def test_the_mlp_by_hand():
    arrays = {"mean": np.array([1.0]), "scale": np.array([2.0]), "hidden.weight": np.array([[1.0], [-1.0]])}
    arrays |= {"hidden.bias": np.array([0.0, 0.5]), "out.weight": np.array([[2.0, 3.0]]), "out.bias": np.array([0.25])}
    # x = 5: z = 2, hidden = relu(2), relu(-1.5); x = 0: z = -0.5, hidden = relu(-0.5), relu(1)
    assert MlpHead.of(arrays)(np.array([[5.0], [0.0]])) == pytest.approx([4.25, 3.25])


def test_the_mlp_learns_what_no_line_separates_and_stops_on_dev():
    """Exclusive or: the better answers have signs that agree. A logistic head stays at chance."""
    rng = np.random.default_rng(0)

    def sides(count):
        x = rng.normal(size=(4 * count, 2))
        agree = x[:, 0] * x[:, 1] > 0
        return x[agree][:count], x[~agree][:count], np.ones(count)

    train_sides, dev, test = sides(300), sides(100), sides(300)
    settings = RewardSettings(head="mlp")
    accuracy = {name: (fit(train_sides, dev, settings, 0)(np.concatenate(test[:2])) > 0)[:300].mean() for name, (_, fit) in HEADS.items()}
    assert accuracy["mlp"] > 0.9 and abs(accuracy["logistic"] - 0.5) < 0.3
    noise = (rng.normal(size=(40, 2)), rng.normal(size=(40, 2)), np.ones(40))
    stopped = fit_mlp(noise, (noise[1], noise[0], noise[2]), settings, 0)  # what train says, dev denies: the first epoch is kept
    start = fit_mlp(noise, noise, settings, 0)
    x = np.concatenate(noise[:2])
    assert np.abs(stopped(x)).max() < np.abs(start(x)).max()
    assert fit_mlp(train_sides, None, settings, 3).arrays()["out.weight"].shape == (1, 64)


def test_every_feature_is_computed_once_and_stored(policy, tmp_path, monkeypatch):
    calls = []
    real = policy_features
    monkeypatch.setattr(frozen, "policy_features", lambda *a, **k: calls.append(len(a[2])) or real(*a, **k))
    features = Features(policy, "none")
    train(policy, tmp_path / "a", features)
    distinct = len({(p.prompt.prompt_id, text) for p in PAIRS for text in (p.better, p.worse)})
    assert sum(calls) == distinct
    train(policy, tmp_path / "b", features, head="mlp")
    again = Features(policy, "none")
    assert again.take(tmp_path / "a/reward/features.safetensors")
    train(policy, tmp_path / "c", again)
    assert sum(calls) == distinct
    assert (tmp_path / "a/reward/heads.safetensors").read_bytes() == (tmp_path / "c/reward/heads.safetensors").read_bytes()
    assert not Features(policy, "hh").take(tmp_path / "a/reward/features.safetensors")  # another format, other features
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "a/reward/features.safetensors").read_bytes()[:-9])
    assert not Features(policy, "none").take(tmp_path / "torn.safetensors")


def test_an_encoder_gives_the_mean_of_the_answer_and_of_all(encoder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    prompts, texts = ["the cat", ({"role": "user", "content": "a dog sat on"},), "the bird"], [" sat on the mat.", " ran.", ""]
    found = encoder_features(encoder, prompts, texts, name="e")
    for i, plain in enumerate(["the cat", "a dog sat on", "the bird"]):
        batch = tokenizer([plain], [texts[i]], return_tensors="pt")
        assert batch["token_type_ids"].max() == 1
        with torch.no_grad():
            state = model(**batch).last_hidden_state[0]
        answer = len(tokenizer(texts[i], add_special_tokens=False)["input_ids"])
        own = state[-1 - answer : -1] if answer else state[-1:]
        assert found[i] == pytest.approx(torch.cat([own.mean(0), state.mean(0)]).numpy(), abs=1e-5)
    long = encoder_features(encoder, ["the cat " * 30], [" sat" * 30], name="e")
    assert np.isfinite(long).all() and long.shape == (1, 64)


def test_a_reward_on_an_encoder_needs_no_policy(encoder, policy, tmp_path):
    assert is_policy(policy) and not is_policy(encoder)
    about = train(encoder, tmp_path)
    assert about["encoder"] == str(encoder) and about["dev"]["accuracy"] > 0.9
    scores = load_reward(tmp_path / "reward").score(*ASK)
    assert scores[0] > scores[1] and np.isfinite(scores).all()


def test_a_mixture_with_one_weight_is_that_contrast(policy, tmp_path):
    sides = {"init-sft": PAIRS[::2], "init-demo": PAIRS[1::2]}
    scores = []
    for name, settings in (("one", {"contrast": "init-demo"}), ("mixed", {"mixture": {"init-sft": 0, "init-demo": 3}})):
        places = {"folder": tmp_path / name, "checkpoints": tmp_path / "c", "chat_template": "none"}
        train_reward_of(RewardSettings(kind="features", **settings), policy, sides, sides, **places)
        scores.append(load_reward(tmp_path / name).score(*ASK))
    assert scores[0] == pytest.approx(scores[1])
    assert [p.weight for p in weighted(sides, {"init-sft": 1, "init-demo": 0.5})] == [1 / 0.75] * 18 + [0.5 / 0.75] * 18


def test_damage_is_named(policy, tmp_path):
    train(policy, tmp_path)
    (tmp_path / "reward/heads.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="heads cannot be loaded"):
        load_reward(tmp_path / "reward")
    about = json.loads((tmp_path / "reward/reward.json").read_text())
    with pytest.raises(ModelError, match="heads cannot be loaded"):
        FeatureReward.load(tmp_path, about)

"""The one entry: settings that contradict each other, mixtures that reduce to a contrast, ensembles of contrasts by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from tiny import make_tiny_policy

from irlign.errors import DataError
from irlign.files import read_json
from irlign.records import Contrast, Prompt
from irlign.reward import learn
from irlign.reward.contrasts import contrast_pairs, weighted
from irlign.reward.ensemble import Ensemble, combine
from irlign.reward.learn import train_reward_of
from irlign.reward.load import load_reward
from irlign.reward.train import RewardSettings, accuracy_and_margin

RED = [
    Contrast(Prompt.of(f"the {a} and a {b}", "train"), f" the red {b} {v}.", f" the blue {b} {v}.")
    for a, b, v in itertools.product(("cat", "dog", "bird"), ("cat", "dog", "bird"), ("sat", "ran"))
]
HOME = [
    Contrast(p.prompt, p.worse.replace(" the blue", " a"), p.worse.replace(" the blue", " a").replace(".", " on the mat.")) for p in RED
]
PAIRS, DEV = {"init-sft": RED[::2], "init-demo": HOME[::2]}, {"init-sft": RED[1::2], "init-demo": HOME[1::2]}
FAST = {"learning_rate": 5e-3, "num_train_epochs": 3, "per_device_train_batch_size": 8}
ASK = (["the cat and a dog"] * 3, [" the red dog sat.", " the blue dog sat.", " a dog sat on the mat."])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def train(policy, folder, seed=0, dev=DEV, **settings):
    places = {"folder": folder / "reward", "checkpoints": folder / "checkpoints", "chat_template": "none", "seed": seed}
    return train_reward_of(RewardSettings(**FAST, **settings), policy, PAIRS, dev, **places)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"mixture": {"init-sft": 1}, "ensemble": ["init-sft", "init-demo"]}, "not both"),
        ({"mixture": {"init-sft": 0, "init-demo": 0}}, "every weight of the mixture is 0"),
        ({"mixture": {"init-sft": -1}}, "greater than or equal to 0"),
        ({"mixture": {"length": 1}}, "init-sft"),
        ({"ensemble": ["init-sft"]}, "two or more"),
        ({"ensemble": ["init-sft", "init-sft"]}, "different"),
        ({"ensemble": ["init-sft", "init-demo"], "members": 2}, "leave members at 1"),
        ({"kind": "heads"}, "members of 2 or more"),
        ({"kind": "features", "aggregate": "weight-average"}, "weight-average is for"),
        ({"ensemble": ["init-sft", "init-demo"], "aggregate": "weight-average"}, "weight-average is for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, what):
    with pytest.raises(ValidationError, match=what):
        RewardSettings(**settings)


@pytest.mark.parametrize("control", ["length", "random", "cosine", "log-ratio"])
@pytest.mark.parametrize("key", ["contrast", "kind"])
def test_no_control_can_be_asked_for_as_the_reward(control, key):
    with pytest.raises(ValidationError):
        RewardSettings(**{key: control})


def test_a_mixture_on_the_command_line():
    from irlign.config import load_recipe
    from irlign.recipe import Recipe

    for overrides in (["reward.mixture={init-sft: 1, init-demo: 0.5}"], ["reward.mixture.init-sft=1", "reward.mixture.init-demo=0.5"]):
        assert load_recipe(Recipe, {"world": "dialogue"}, overrides).reward.mixture == {"init-sft": 1, "init-demo": 0.5}


def test_names_and_words():
    assert RewardSettings().name == RewardSettings(mixture={"init-sft": 2}).name == "init-sft"
    mixed = RewardSettings(mixture={"init-sft": 1, "init-demo": 0.5, "sft-demo": 0})
    assert (mixed.name, mixed.about_contrast, list(mixed.weights)) == ("mixture", "1 init-sft + 0.5 init-demo", ["init-sft", "init-demo"])
    several = RewardSettings(ensemble=["init-sft", "preference"])
    assert (several.name, several.about_contrast, several.weights) == ("ensemble", "init-sft, preference", {"init-sft": 1, "preference": 1})


def test_weights_average_to_one_and_zero_is_left_out():
    rows = weighted(PAIRS, {"init-sft": 1.0, "init-demo": 3.0, "sft-demo": 0.0})
    assert [pair.weight for pair in rows] == [0.5] * 9 + [1.5] * 9
    assert [replace(pair, weight=1.0) for pair in rows] == [*RED[::2], *HOME[::2]]
    assert weighted(PAIRS, {"init-demo": 7.0}) == HOME[::2] and weighted({}, {"init-sft": 1.0}) == []


def test_a_mixture_with_the_weights_one_and_zero_is_its_contrast(policy, tmp_path):
    one = train(policy, tmp_path / "one", contrast="init-demo")
    mixed = train(policy, tmp_path / "mixed", mixture={"init-sft": 0, "init-demo": 2})
    assert one == mixed
    files = (tmp_path / name / "reward/model.safetensors" for name in ("one", "mixed"))
    assert len({file.read_bytes() for file in files}) == 1


def test_a_mixture_learns_both_contrasts(policy, tmp_path):
    """Each contrast alone leaves the other's unseen pairs near chance; together neither does."""
    found = {}
    for name, settings in (("init-sft", {"contrast": "init-sft"}), ("mixture", {"mixture": {"init-sft": 1, "init-demo": 1}})):
        train(policy, tmp_path / name, **settings, trainer={"num_train_epochs": 12})
        reward = load_reward(tmp_path / name / "reward")
        found[name] = {contrast: accuracy_and_margin(reward, pairs)["accuracy"] for contrast, pairs in DEV.items()}
    assert min(found["mixture"].values()) > 0.85 and found["init-sft"]["init-demo"] < 0.85 < found["init-sft"]["init-sft"]


@pytest.mark.parametrize("aggregate", ["mean", "min", "mean-variance"])
@pytest.mark.parametrize("kind", ["classifier", "features"])
def test_an_ensemble_of_contrasts_standardises_its_members(policy, tmp_path, aggregate, kind):
    about = train(policy, tmp_path, ensemble=["init-sft", "init-demo"], aggregate=aggregate, kind=kind)
    assert about["kind"] == "ensemble" and about["pairs"] == {"train": 18, "dev": 18} == {k: 18 for k in about["pairs"]}
    members = [load_reward(tmp_path / "reward" / contrast) for contrast in ("init-sft", "init-demo")]
    common = [*DEV["init-sft"], *DEV["init-demo"]]
    contents, texts = [p.prompt.content for p in common] * 2, [*(p.better for p in common), *(p.worse for p in common)]
    standardised = []
    for member, scale in zip(members, about["scales"], strict=True):
        on_dev = member.score(contents, texts)
        assert scale == pytest.approx([on_dev.mean(), on_dev.std()], abs=1e-4)
        standardised.append((member.score(*ASK) - on_dev.mean()) / on_dev.std())
    ensemble = load_reward(tmp_path / "reward")
    assert ensemble.score(*ASK) == pytest.approx(combine(np.array(standardised), aggregate, 0.5), abs=1e-3)
    assert ensemble.score(ASK[0][:1], ASK[1][:1]) == pytest.approx(ensemble.score(*ASK)[:1], abs=1e-4)
    assert accuracy_and_margin(ensemble, common)["margin"] == pytest.approx(about["dev"]["margin"], abs=1e-3)


def test_a_member_is_the_reward_of_its_contrast_alone(policy, tmp_path):
    train(policy, tmp_path / "both", ensemble=["init-sft", "init-demo"])
    train(policy, tmp_path / "alone", contrast="init-demo", seed=1009)
    both, alone = (tmp_path / place / "model.safetensors" for place in ("both/reward/init-demo", "alone/reward"))
    assert both.read_bytes() == alone.read_bytes()


def test_without_dev_pairs_the_train_pairs_set_the_scale(policy, tmp_path):
    about = train(policy, tmp_path, dev={}, ensemble=["init-sft", "init-demo"], kind="features")
    assert about["dev"] is None and np.isfinite(about["scales"]).all() and load_reward(tmp_path / "reward").score(*ASK).shape == (3,)


def test_the_scale_takes_a_member_out_of_its_own_units():
    """Scores of 10 and 20 around 10 with deviation 5 are 0 and 2; of 0.1 and 0.2 around 0.2 with 0.1: -1 and 0."""

    class Fixed:
        def __init__(self, values):
            self.values = np.array(values)

        def score(self, prompts, completions):
            return self.values

    given = {"a": Fixed([10.0, 20.0]), "b": Fixed([0.1, 0.2])}
    ensemble = Ensemble(["a", "b"], given.get, "min", 0.5, "e", np.array([[10.0, 5.0], [0.2, 0.1]]))
    assert ensemble.member_scores(["p", "p"], ["x", "y"]) == pytest.approx(np.array([[0.0, 2.0], [-1.0, 0.0]]))
    assert ensemble.score(["p", "p"], ["x", "y"]) == pytest.approx([-1.0, 0.0])


def test_an_interrupted_ensemble_of_contrasts_keeps_its_finished_members(policy, tmp_path, monkeypatch):
    names = ["init-sft", "init-demo"]
    whole = train(policy, tmp_path / "whole", ensemble=names)
    done, real = [], learn.TRAINERS["classifier"]

    def killed(*args, **options):
        if done:
            raise KeyboardInterrupt
        done.append(real(*args, **options))
        return done[0]

    with monkeypatch.context() as patch:
        patch.setitem(learn.TRAINERS, "classifier", killed)
        with pytest.raises(KeyboardInterrupt):
            train(policy, tmp_path / "killed", ensemble=names)
    before = (tmp_path / "killed/reward/init-sft/model.safetensors").stat().st_mtime_ns
    assert train(policy, tmp_path / "killed", ensemble=names) == whole
    assert (tmp_path / "killed/reward/init-sft/model.safetensors").stat().st_mtime_ns == before
    assert read_json(tmp_path / "killed/reward/reward.json")["members"] == names


def test_pairs_of_several_contrasts_are_controlled_together():
    ask, other = Prompt.of("Say it.", "train"), Prompt.of("Say more.", "train")
    sft, init, demo = [(ask, "Yes, I will.", True)], [(ask, "No!", True), (other, "Alone.", True)], [(ask, "Of course.", True)]
    pairs, left_out, controls = contrast_pairs({"init-sft": (sft, init), "init-demo": (demo, init)}, match=False)
    assert {name: [(p.better, p.worse) for p in of] for name, of in pairs.items()} == {
        "init-sft": [("Yes, I will.", "No!")],
        "init-demo": [("Of course.", "No!")],
    }
    assert left_out == {"one_sided_prompts": 2, "empty_pairs": 0, "equal_pairs": 0}
    assert controls["length_accuracy"] == 1.0 and controls["ending_accuracy"] == 0.5
    with pytest.raises(DataError, match="no prompt has two"):
        contrast_pairs({"init-sft": (sft, init), "init-demo": ([], init)}, match=False)
    assert contrast_pairs({"init-demo": ([], init)}, match=False, needed=False)[0] == {"init-demo": []}

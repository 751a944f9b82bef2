"""Adversarial rounds: whose answers a refreshed reward learns from, that the round uses it, where it is published, and a kill within."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import small_recipe, witnesses

import irlign
from irlign.config import load_recipe
from irlign.data.splits import stored_demonstrations
from irlign.errors import ConfigError
from irlign.files import hash_path, read_json, read_table, write_json
from irlign.optimise import align, methods, rounds
from irlign.optimise import work as work_of_rounds
from irlign.optimise.rounds import past_policies
from irlign.optimise.settings import OptimiseSettings
from irlign.optimise.work import Work
from irlign.pipeline import run_stage
from irlign.recipe import Recipe
from irlign.records import Prompt, Sample
from irlign.runs import Run
from irlign.sampling.pools import read_pool, stored_samples

PLAIN = {"best_of_n": {"likelihood": 0.0}}


@pytest.fixture
def judge(monkeypatch):
    """What weighs candidates are stand-ins: every round is better than the one before."""
    witnesses(monkeypatch, np.arange(50.0, 5000.0, 50.0))


@pytest.mark.parametrize(
    ("refresh", "replay", "number", "past"),
    [
        ("current-demo", True, 2, [0]),  # the round before is 1, and pi_SFT came before it
        ("current-demo", True, 4, [0, 1, 2]),
        ("current-sft", True, 2, []),
        ("current-sft", True, 4, [1, 2]),
        ("init-current", True, 3, [0, 1]),
        ("current-demo", False, 4, []),
    ],
)
def test_which_earlier_policies_are_worse(refresh, replay, number, past):
    assert past_policies(refresh, replay, number) == past


def _answer(prompt, text):
    return Sample(prompt, 0, text, "eos", 3, -1.0)


@pytest.mark.parametrize(
    ("refresh", "replay", "better", "worse"),
    [
        ("current-demo", True, {"shown"}, {"two", "init", "sft", "one"}),
        ("current-demo", False, {"shown"}, {"two"}),
        ("current-sft", True, {"sft"}, {"two", "init", "one"}),
        ("current-sft", False, {"sft"}, {"two"}),
        ("init-current", True, {"two"}, {"init", "sft", "one"}),
        ("init-current", False, {"two"}, {"init"}),
    ],
)
def test_whose_answers_stand_on_which_side(monkeypatch, refresh, replay, better, worse):
    """In round 3, whose current policy is that of round 2."""
    prompt = Prompt.of("ask", "train")
    own = {0: "sft", 1: "one", 2: "two"}
    monkeypatch.setattr(rounds, "_answers", lambda work, number, split: [_answer(prompt, own[number])])
    monkeypatch.setattr(rounds, "stored_samples", lambda run, name, split: [_answer(prompt, name)])
    monkeypatch.setattr(rounds, "stored_demonstrations", lambda run, split: [_answer(prompt, "shown")])
    settings = OptimiseSettings(rounds=3, refresh=refresh, replay=replay)
    sides = rounds.sides_of(Work(None, settings, None, "r", "none", Path()), 3, "train")
    assert [{text for _, text, _ in side} for side in sides] == [better, worse]


def test_a_refreshed_reward_is_trained_used_and_published(copied, judge, monkeypatch):
    """Three rounds of distill, each from the round before: what scores the winners, what is said of it, and that it loads when moved."""
    used, started = [], []
    score, train = work_of_rounds.scores_of, align.METHODS["distill"].train
    monkeypatch.setattr(work_of_rounds, "scores_of", lambda folders, *a: used.append(folders["reward"]) or score(folders, *a))
    recorded = align.METHODS["distill"]._replace(train=lambda start, *a, **k: started.append(start) or train(start, *a, **k))
    monkeypatch.setitem(align.METHODS, "distill", recorded)
    run_stage("optimise", small_recipe(copied, optimise={"rounds": 3, "refresh": "current-demo"}))
    names = ["current-demo", "current-demo+likelihood"]
    assert [(p.parts[-3], p.name) for p in used[1:]] == [("2", names[1]), ("3", names[1])] and used[0].parent == copied / "rewards"
    assert started[0] == copied / "policies/sft" and [p.parts[-2:] for p in started[1:]] == [("1", "policy"), ("2", "policy")]

    choice = read_json(copied / "optimise/choice.json")
    about = [choice["candidates"][f"round-{n}"]["training"].get("reward") for n in (1, 2, 3)]
    assert about[0] is None and all(a["name"] == names[1] and a["dev"] and a["controls"] for a in about[1:])
    # a train prompt has 2 answers of each policy: the round before, pi_0, pi_SFT; and those of round 1 in round 3
    most = [24 * 2 * policies for policies in (3, 4)]
    assert all(0.7 * m < a["pairs"]["train"] + sum(a["left_out"].values()) <= m for m, a in zip(most, about[1:], strict=True))
    assert "the reward `current-demo+likelihood`" in (copied / "policies/aligned/README.md").read_text()
    assert not (copied / "optimise/rounds/1").exists()

    moved = copied.rename(copied.with_name("moved"))
    place = moved / "optimise/rounds/3/reward"
    assert str(copied) not in "".join(f.read_text() for f in place.rglob("*.json"))
    rows = read_table(moved / "pools/aligned.parquet")[:6]
    asked = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    learned, likelihood = (irlign.load_reward(p).score(*asked) for p in (place / names[0], moved / "rewards/likelihood"))
    (m, s), (n, t) = read_json(place / names[1] / "reward.json")["scales"]
    assert irlign.load_reward(place / names[1]).score(*asked) == pytest.approx(((learned - m) / s + (likelihood - n) / t) / 2)
    assert read_json(place / names[0] / "reward.json")["contrast"] == "current-demo" and (place / names[0] / "README.md").is_file()


@pytest.mark.parametrize("method", ["distill", "rloo"])
def test_a_refreshed_reward_reads_as_many_answers_as_pi_0_has_given(copied, method):
    """However few the method itself learns from (`answers`, which has no part in those that draw their own)."""
    recipe = load_recipe(Recipe, small_recipe(copied, optimise={"rounds": 2, "answers": 1, "method": method, "refresh": "current-demo"}))
    with Run.open(copied, recipe) as run:
        work = Work(run, recipe.optimise, recipe.sampling, "init-sft", "none", copied / "work", learning=recipe.reward)
        shutil.copytree(run.path("policies/sft"), work.round(1) / "policy")
        _, worse = rounds.sides_of(work, 2, "train")
        current = [prompt for prompt, _, _ in worse][: 24 * 2]
        assert len(work_of_rounds.own_answers(work, 2)) == 24 * (1 if method == "distill" else 2)
    assert len(worse) == 24 * 2 * 3 and len({p.prompt_id for p in current}) == 24  # the round before, pi_0 and pi_SFT


def test_it_tells_the_current_policy_from_the_demonstrations(copied):
    """Trained long enough: demonstrations above answers of the round before, which the run's own reward has never seen."""
    recipe = load_recipe(Recipe, small_recipe(copied, **PLAIN, reward={"num_train_epochs": 40}, optimise={"rounds": 2}))
    settings = recipe.optimise.model_copy(update={"refresh": "current-demo"})
    with Run.open(copied, recipe) as run:
        work = Work(run, settings, recipe.sampling, "init-sft", "none", copied / "work", learning=recipe.reward)
        shutil.copytree(run.path("policies/init"), work.round(1) / "policy")  # a policy that has got worse
        prompts = {s.prompt.prompt_id: s.prompt for s in stored_samples(run, "sft", "dev")}
        work.draw(1, "pool", [(p, 2) for p in prompts.values()])
        about = rounds.refresh(work, 2, "0")
        assert work.scorer(2) == work.round(2) / "reward/current-demo" and work.scorer(1) == run.path("rewards/init-sft")
        assert rounds.refresh(work, 2, "0") == about and about["dev"]["accuracy"] > 0.75
        own, shown = read_pool(work.round(1) / "pool.parquet"), stored_demonstrations(run, "dev")
        reward = irlign.load_reward(work.scorer(2))
        scores = [reward.score([r.prompt.content for r in rows], [r.completion for r in rows]).mean() for rows in (shown, own)]
        assert scores[0] > scores[1] + 1


def test_on_policy_rounds_go_on_with_the_refreshed_reward(copied, judge, monkeypatch):
    pytest.importorskip("trl")
    from irlign.optimise import rloo

    loaded, paid = [], []
    load, function = methods.load_resident, rloo.reward_function
    monkeypatch.setattr(methods, "load_resident", lambda path: loaded.append(path) or load(path))
    monkeypatch.setattr(rloo, "reward_function", lambda *a: paid.append(a[5]) or function(*a))
    own = {"method": "rloo", "rounds": 2, "refresh": "init-current", "replay": False, "max_steps": 2, "on_policy": {"objective": "fairl"}}
    run_stage("optimise", small_recipe(copied, **PLAIN, optimise=own))
    assert [path.name for path in loaded] == ["init-sft", "init-current"] and paid == ["fairl"] * 2
    training = read_json(copied / "optimise/choice.json")["candidates"]["round-2"]["training"]
    assert training["reward"]["name"] == "init-current" and training["steps"] == 2
    assert (copied / "optimise/rounds/2/reward/init-current/model.safetensors").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("moment", ["reward", "policy"])
def test_a_kill_inside_a_round_changes_nothing(finished, tmp_path, judge, monkeypatch, moment):
    """Dead after the round's reward is trained and before it is noted, or after it is noted and before the policy is: what is there is kept."""
    recipe = {"rounds": 2, "refresh": "current-sft"}
    whole, torn = (Path(shutil.copytree(finished, tmp_path / name)) for name in ("whole", "torn"))
    run_stage("optimise", small_recipe(whole, optimise=recipe))

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "reward":
            patch.setattr(rounds, "write_json", lambda path, value: die() if path.name == "log.json" else write_json(path, value))
        else:
            train = align.METHODS["distill"].train
            dying = lambda start, *a, **k: die() if "rounds" in start.parts else train(start, *a, **k)  # noqa: E731
            patch.setitem(align.METHODS, "distill", align.METHODS["distill"]._replace(train=dying))
        with pytest.raises(Killed):
            run_stage("optimise", small_recipe(torn, optimise=recipe))
    trained = []
    learn = rounds.train_reward_of
    monkeypatch.setattr(rounds, "train_reward_of", lambda *a, **k: trained.append(1) or learn(*a, **k))
    run_stage("optimise", small_recipe(torn, optimise=recipe))
    assert len(trained) == (moment == "reward")
    for name in ("policies/aligned/model.safetensors", "optimise/rounds"):
        assert hash_path(torn / name) == hash_path(whole / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "rloo", "rounds": 2}, r"refresh it \(optimise.refresh\)"),
        ({"method": "weighted-sft", "rounds": 2, "refresh": "current-demo"}, "learns from demonstrations"),
        ({"method": "spin", "rounds": 2, "refresh": "current-demo"}, "spin asks no reward"),
        ({"refresh": "current-demo"}, "optimise.rounds of 2 or more"),
        ({"method": "grpo", "on_policy": {"objective": "gail"}}, "best_of_n.likelihood=0"),
        ({"method": "rlsr", "on_policy": {"objective": "gail"}}, "rlsr pays the cosine to the demonstration as it is"),
        ({"method": "gad", "on_policy": {"objective": "fairl"}}, "gad pays what its discriminator says as it is"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe(Recipe, small_recipe(tmp_path, optimise=changes))


def test_the_rewards_settings_count_only_where_it_is_refreshed(copied, judge):
    """A change of how rewards are learned reruns the stage where it learns one, and a run without rounds knows nothing of it."""
    run_stage("optimise", small_recipe(copied))
    entry = json.loads((copied / "manifest.json").read_text())["stages"]["optimise"]
    assert "learning" not in entry["settings"]
    run_stage("optimise", small_recipe(copied, optimise={"rounds": 2, "refresh": "current-sft"}))
    entry = json.loads((copied / "manifest.json").read_text())["stages"]["optimise"]
    assert entry["settings"]["learning"]["learning_rate"] == 1e-3 and entry["settings"]["likelihood"] == 1.0

"""The stage `optimise` on a small run: what it publishes where the judge sees a gain and where it sees none. The two witnesses alone are
stand-ins here: they are told what to see."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small import small_recipe, witnesses

from irlign import pipeline
from irlign.config import load_recipe
from irlign.errors import ConfigError, GuardError, ModelError
from irlign.files import hash_path, read_table, write_json
from irlign.optimise import align, methods, safety_net
from irlign.optimise.scoring import scores_of
from irlign.optimise.settings import OptimiseSettings
from irlign.optimise.work import Work
from irlign.pipeline import run, run_stage
from irlign.recipe import Recipe
from irlign.records import SCORE, Demonstration, Prompt, Sample
from irlign.runs import Run

WEIGHTS = "model.safetensors"


@pytest.fixture
def judge(monkeypatch):
    """Say what the judge's logit of every answer of a candidate is, round by round, and what its reward."""

    def sees(*logits, reward=99.0):
        witnesses(monkeypatch, logits, reward)

    return sees


def _choice(folder):
    return json.loads((folder / "optimise/choice.json").read_text())


def test_the_better_round_is_published_measured_and_shown(copied, judge):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    judge(50.0, 90.0)
    results = run(small_recipe(copied, optimise={"rounds": 2}))
    choice = _choice(copied)
    assert choice["published"] == "round-2" and list(choice["candidates"]) == ["sft", "round-1", "round-2"]
    assert results["optimise"] == choice and choice["reward"] in ("init-sft+likelihood", "likelihood")
    own = choice["candidates"]["round-2"]
    assert own["kl_sft"]["prompts"] == own["kl_initial"]["prompts"] == choice["prompts"] == 20 and own["training"]["rows"] <= 24
    assert own["kl_sft"]["mean"] > 0 and own["gain"]["low"] > 0 and own["alarms"] == []
    assert hash_path(copied / "policies/aligned" / WEIGHTS) != hash_path(copied / "policies/sft" / WEIGHTS)
    rows = read_table(copied / "pools/aligned.parquet")
    assert {(r["split"], r["index"]) for r in rows} == {(split, i) for split in ("dev", "test") for i in range(2)}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(copied / "policies/aligned"),
        AutoTokenizer.from_pretrained(copied / "policies/aligned"),
    )
    assert model.generate(**tokenizer("How do I fix my bike?", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    card = (copied / "policies/aligned/README.md").read_text()
    assert "`distill` (round 2)" in card and f"{own['kl_sft']['mean']:.1f} nats" in card
    assert f"{len(rows)} answers to" in (copied / "pools/aligned.parquet/README.md").read_text()

    golden = results["golden"]
    assert golden["aligned"]["prompts"] == 8 and set(golden["aligned_best_of_n"]) == {"1", "2"}
    assert golden["aligned_best_of_n"]["1"]["mean"] == pytest.approx(golden["aligned"]["mean"])
    tests = {(t["a"], t["b"]): t["mean_difference"] for t in results["tests"]}
    for other in ("sft", "initial"):
        assert tests["aligned", other] == pytest.approx(golden["aligned"]["mean"] - golden[other]["mean"])
    assert results["headline"][0].startswith("The aligned policy (distill), one answer and no reward at inference, ")
    html = (copied / "report.html").read_text()
    assert "<span>Aligned, one answer</span>" in html and "<th>aligned</th>" in html and "<h4>Aligned</h4>" in html
    assert "Round 2 is published" in html and "best of n of its own answers" in html


def test_where_none_is_shown_to_be_better_sft_is_published(copied, judge):
    judge(-50.0, 90.0)  # the second round is never made: the first sets off an alarm
    results = run(small_recipe(copied, optimise={"rounds": 3}))
    choice = _choice(copied)
    assert choice["published"] == "sft" and list(choice["candidates"]) == ["sft", "round-1"]
    assert "turns down" in choice["candidates"]["round-1"]["alarms"][0]["name"]
    assert hash_path(copied / "policies/aligned" / WEIGHTS) == hash_path(copied / "policies/sft" / WEIGHTS)
    assert "unchanged" in (copied / "policies/aligned/README.md").read_text()
    assert results["golden"]["aligned"] == results["golden"]["sft"] and set(results["golden"]["aligned_best_of_n"]) == {"1", "2", "4"}
    assert next(t for t in results["tests"] if (t["a"], t["b"]) == ("aligned", "sft"))["mean_difference"] == 0
    assert results["headline"][0].startswith("The aligned policy is SFT itself: the judge does not show the one candidate to beat SFT")
    assert not any("turns down" in alarm["name"] and "aligned" in alarm["name"] for alarm in results["alarms"])
    html = (copied / "report.html").read_text()
    assert "<th>aligned</th>" not in html and "<h4>Aligned</h4>" not in html and "SFT is published" in html


def test_where_the_reward_does_not_agree_with_the_judge_sft_is_published(copied, judge):
    """By a method that no reward has a part in; the same policy is published where the reward agrees."""
    selector = json.loads((copied / "best_of_n/choice.json").read_text())["reward"]
    rewards = [row[f"{SCORE}{selector}"] for row in read_table(copied / "best_of_n/candidates.parquet", split="dev")]
    judge(50.0, reward=float(np.quantile(rewards, 0.1)))  # lower than pi_SFT's mean, and none of them a bad answer
    results = run(small_recipe(copied, optimise={"method": "weighted-sft"}))
    choice = _choice(copied)
    own = choice["candidates"]["round-1"]
    assert choice["published"] == "sft" and own["gain"]["low"] > 0 > own["reward_gain"]["mean"] and own["alarms"] == []
    assert choice["reward"] is None and choice["selector"] == json.loads((copied / "best_of_n/choice.json").read_text())["reward"]
    said = "round 1 is judged better and the reward does not show it to be"
    assert results["headline"][0] == f"The aligned policy is SFT itself: {said}."
    html = (copied / "report.html").read_text()
    assert said in html and f"<td>gain by the reward {choice['selector']}</td>" in html and "20 dev prompts. Gains over SFT" in html
    shutil.rmtree(copied / "optimise")
    judge(50.0, reward=-99.0)
    run_stage("optimise", small_recipe(copied, optimise={"method": "weighted-sft"}))
    own = _choice(copied)["candidates"]["round-1"]
    assert own["below_range"] == 1 and [a["name"] for a in own["alarms"]] == ["the aligned policy gives more bad answers"]
    shutil.rmtree(copied / "optimise")
    judge(50.0)
    run_stage("optimise", small_recipe(copied, optimise={"method": "weighted-sft"}))
    assert _choice(copied)["published"] == "round-1"


@pytest.mark.parametrize("selector", ["init-sft+likelihood", "likelihood", "init-sft"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_reward_weighs_as_it_selected(copied, monkeypatch, selector, workers):
    """pi_SFT as its own candidate, the judge alone a stand-in: its answers have the rewards that best_of_n/candidates.parquet holds."""
    recipe = load_recipe(Recipe, small_recipe(copied, sampling={"num_workers": workers}))
    witnesses(monkeypatch, [50.0])
    monkeypatch.setattr(align, "scores_of", scores_of)
    with Run.open(copied, recipe) as opened:
        place, stored = copied / "weighed", align.stored_samples(opened, "sft", "dev")
        work = Work(opened, recipe.optimise, recipe.sampling, selector, recipe.data.chat_template, place)
        shutil.copytree(copied / "policies/sft", work.round(1) / "policy")
        write_json(work.round(1) / "log.json", {"tokens": 0})
        rows = read_table(copied / "best_of_n/candidates.parquet", split="dev")
        sft = safety_net.Judged(stored, np.zeros(len(stored)), np.array([row[f"reward/{selector}"] for row in rows]))
        found = align.weighed(work, work.made(1)[-1], stored, sft, align.measures_of_sft(work, sft), [], [])
    assert np.std(sft.rewards) > 0 and found.rewarded_P == pytest.approx(np.zeros(20), abs=1e-4)
    assert found.about["kl_sft"]["mean"] == pytest.approx(0, abs=1e-4)
    assert (len(list(work.round(1).glob("weighed/*.parquet"))) > 0) == (workers > 1)


def test_a_policy_that_training_went_past_is_published_where_it_is_the_best(copied, judge):
    """Judged higher half-way than at the end, which turns down; it answers the test prompts only once it is chosen."""
    judge(90.0, 50.0)
    results = run(small_recipe(copied, optimise={"keep_checkpoints": [0.5]}))
    choice = _choice(copied)
    half, last = "round-1-at-50%", "round-1"
    assert choice["published"] == half and list(choice["candidates"]) == ["sft", half, last]
    own, end = (choice["candidates"][name] for name in (half, last))
    assert own["alarms"] == [] and "turns down" in end["alarms"][0]["name"] and (own["after"], end["after"]) == (0.5, 1.0)
    assert own["training"] is None and end["training"]["steps"] > 1 and own["drawn"] > 0 and own["kl_sft"]["mean"] != end["kl_sft"]["mean"]
    rows = read_table(copied / "pools/aligned.parquet")
    assert {(r["split"], r["index"]) for r in rows} == {(split, i) for split in ("dev", "test") for i in range(2)}
    assert sum(r["tokens"] for r in rows if r["split"] == "dev") == own["drawn"]  # the same answers as were judged
    weights = {hash_path(copied / "policies" / name / WEIGHTS) for name in ("init", "sft", "aligned")}
    assert len(weights) == 3 and "`distill` (round 1 at 50%)" in (copied / "policies/aligned/README.md").read_text()
    assert results["golden"]["aligned"]["prompts"] == 8 and "Round 1 at 50% is published" in (copied / "report.html").read_text()


def test_a_share_that_comes_to_the_last_step_or_to_another_is_no_candidate(copied, judge):
    """Of two steps: after the first, which two shares come to, and at the end."""
    judge(50.0, 90.0)
    run_stage("optimise", small_recipe(copied, optimise={"keep_checkpoints": [0.3, 0.5, 0.9], "max_steps": 2}))
    assert list(_choice(copied)["candidates"]) == ["sft", "round-1-at-30%", "round-1"]
    with pytest.raises(ConfigError, match="the same in six digits"):
        load_recipe(Recipe, small_recipe(copied, optimise={"keep_checkpoints": [0.3333333, 0.33333334]}))


def test_an_alarm_that_keeps_sft_stands_at_the_top(copied, judge, monkeypatch):
    """Judged better, and longer than is allowed, where nothing is: the report says which policy is not published and why."""
    monkeypatch.setattr(safety_net, "LONGER", 0.0)
    judge(50.0)
    results = run(small_recipe(copied))
    choice = _choice(copied)
    (alarm,) = choice["candidates"]["round-1"]["alarms"]
    assert choice["published"] == "sft" and choice["candidates"]["round-1"]["gain"]["low"] > 0
    (found,) = [a for a in results["alarms"] if a["name"] == alarm["name"]]
    assert found["seen"] == f"round 1, which is not published though judged better than SFT: {alarm['seen']}" and found["do"] == alarm["do"]
    top = (copied / "report.html").read_text().split('<div class="tiles">')[0]
    assert "the aligned policy&#39;s answers have grown" in top


def test_none_leaves_the_stage_out_and_takes_back_what_it_published(copied, judge):
    judge(50.0)
    run_stage("optimise", small_recipe(copied))
    assert (copied / "policies/aligned" / WEIGHTS).is_file()
    results = run(small_recipe(copied, optimise={"method": "none"}))
    assert not any((copied / name).exists() for name in ("policies/aligned", "pools/aligned.parquet", "optimise"))
    assert results["optimise"] is None and results["golden"]["aligned"] is None
    assert not any("aligned" in (t["a"], t["b"]) for t in results["tests"]) and "ligned policy" not in results["headline"][0]
    assert "The aligned policy" not in (copied / "report.html").read_text()


def test_weighted_sft_starts_from_the_initial_policy(copied, judge):
    judge(50.0)
    run_stage("optimise", small_recipe(copied, optimise={"method": "weighted-sft"}))
    choice = _choice(copied)
    assert (choice["method"], choice["reward"]) == ("weighted-sft", None) and choice["candidates"]["round-1"]["training"]["rows"] == 24
    assert set(choice["candidates"]["round-1"]["training"]["dev_nll"]) == {"initial", "aligned"}


def test_each_round_learns_from_the_answers_of_the_one_before(copied, judge, monkeypatch):
    seen = []
    won = methods.won_answers
    recorded = align.METHODS["distill"]._replace(rows=lambda *a: seen.append(won(*a)) or seen[-1])
    monkeypatch.setitem(align.METHODS, "distill", recorded)
    judge(50.0, 50.0)
    run_stage("optimise", small_recipe(copied, optimise={"rounds": 2, "learning_rate": 1e-2}))
    pool = {(s["prompt_id"], s["completion"]) for s in read_table(copied / "pools/sft.parquet") if s["split"] == "train"}
    first, second = ({(s.prompt.prompt_id, s.completion) for s in rows} for rows in seen)
    assert first <= pool and not second <= pool and {p for p, _ in first | second} <= {p for p, _ in pool}


def test_more_answers_than_are_stored_are_drawn_from_the_sft_policy(copied, judge, monkeypatch):
    seen = []
    own = methods.own_answers
    monkeypatch.setattr(methods, "own_answers", lambda *a: seen.append(own(*a)) or seen[-1])
    stored = [s for s in read_table(copied / "pools/sft.parquet") if s["split"] == "train"]
    each = len(stored) // len(asked := {s["prompt_id"] for s in stored})
    for answers in (each - 1, each + 2):
        judge(50.0)
        run_stage("optimise", small_recipe(copied, optimise={"answers": answers}))
        assert sorted(s.prompt.prompt_id for s in seen[-1]) == sorted([*asked] * answers)
    assert {s.completion for s in seen[0]} <= {s["completion"] for s in stored}


def test_a_later_round_that_cannot_be_made_ends_the_rounds(copied, judge, monkeypatch):
    """What the first one came to is published, and it is said; where it is the first, the error is the stage's."""
    judge(50.0)
    make = align.improve

    def fails(at, error=None):
        def improve(work, number, *rest):
            if number == at:
                raise error or GuardError("length alone tells 91% of the pairs apart", do="shorten")
            return make(work, number, *rest)

        monkeypatch.setattr(align, "improve", improve)

    fails(2)
    results = run(small_recipe(copied, optimise={"rounds": 3}))
    choice, said = _choice(copied), "round 2 could not be made (length alone tells 91% of the pairs apart)"
    assert choice["published"] == "round-1" and choice["why"].endswith(f"; {said}") and said in (copied / "report.html").read_text()
    assert results["headline"][0].startswith("The aligned policy (distill), one answer")
    fails(1)
    with pytest.raises(GuardError, match="91%"):
        run_stage("optimise", small_recipe(copied, optimise={"rounds": 2}))
    fails(2, ModelError("out of memory with per_device_train_batch_size=16; 8 fits", do="set it to 8"))
    judge(50.0)
    with pytest.raises(ModelError, match="8 fits"):  # says nothing of the round
        run_stage("optimise", small_recipe(copied, optimise={"rounds": 4}))


def test_answers_of_another_engine_are_drawn_again_for_the_comparison(copied, monkeypatch):
    """A candidate is weighed against pi_SFT's answers as they are drawn here, as many to a prompt, where the stored ones come from elsewhere."""
    recipe, weighed = load_recipe(Recipe, small_recipe(copied)), []
    both = align.judged_by_both
    monkeypatch.setattr(align, "judged_by_both", lambda work, answers, *rest: weighed.append(answers) or both(work, answers, *rest))
    with Run.open(copied, recipe) as opened:
        choices = []
        for alike in (True, False):
            about = {"drawn_alike": alike}
            work = Work(opened, recipe.optimise, recipe.sampling, "init-sft", recipe.data.chat_template, copied / f"alike-{alike}", **about)
            choices.append(align.align(work, "0"))
    assert len(weighed) == 1 + 2
    stored, again = read_table(copied / "pools/sft.parquet"), weighed[1]
    assert {s.prompt.prompt_id for s in again} == {r["prompt_id"] for r in stored if r["split"] == "dev"} and len(again) == 20 * 2
    assert {s.completion for s in again} - {r["completion"] for r in stored}
    first, second = (choice["candidates"] for choice in choices)
    assert first["round-1"]["gain"] != second["round-1"]["gain"] and first["round-1"]["kl_sft"] == second["round-1"]["kl_sft"]


def test_pipeline_says_whose_engine_drew_the_pools(copied, monkeypatch):
    seen = []
    monkeypatch.setattr(align, "align", lambda work, _: seen.append(work.drawn_alike) or (_ for _ in ()).throw(GuardError("enough")))
    for engine, changes in (("transformers", {}), ("vllm", {"vllm": {"python": "python"}}), ("cluster", {})):
        with pytest.raises(GuardError), Run.open(copied, recipe := load_recipe(Recipe, small_recipe(copied))) as opened:
            pipeline.optimise(
                recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"engine": engine, **changes})}), opened
            )
    assert seen == [True, False, True]


def test_keys_of_other_methods_are_said_and_change_nothing(copied, judge, monkeypatch):
    judge(50.0)  # for one candidate: a second training would find no witness
    said = []
    monkeypatch.setattr(pipeline, "say", said.append)
    shared = {"method": "weighted-sft", "max_steps": 1}
    run_stage("optimise", small_recipe(copied, optimise={**shared, "winners": 2, "preference": {"beta": 0.3}}))
    told = "optimise: weighted-sft with learning_rate=0.001, max_steps=1, generations=2 (no part in it: winners, preference)"
    assert told in said
    run_stage("optimise", small_recipe(copied, optimise=shared))
    assert OptimiseSettings(method="distill", winners=2).in_words == "distill with winners=2"
    assert OptimiseSettings(method="rloo", answers=4).in_words == "rloo with the defaults (no part in it: answers)"


def test_with_nothing_to_learn_from_sft_is_published(copied, judge, monkeypatch):
    monkeypatch.setitem(align.METHODS, "distill", align.METHODS["distill"]._replace(rows=lambda *_: []))
    run_stage("optimise", small_recipe(copied))
    assert _choice(copied)["published"] == "sft" and "distill finds nothing to learn from" in _choice(copied)["why"]


def test_weighted_sft_has_no_rounds(tmp_path):
    with pytest.raises(ConfigError, match="learns from demonstrations"):
        load_recipe(Recipe, small_recipe(tmp_path, optimise={"method": "weighted-sft", "rounds": 2}))


@pytest.mark.parametrize(
    ("method", "reward", "rounds"), [("dpo", True, 2), ("spin", False, 2), ("kto", False, 1), ("rloo", True, 1), ("grpo", True, 1)]
)
def test_a_method_of_trl_makes_its_candidates(copied, judge, monkeypatch, method, reward, rounds):
    """On a real run: weights moved from pi_SFT's, losses are finite, and what the judge likes is published with its card. A model this
    small seldom ends an answer, so all count as finished."""
    pytest.importorskip("trl")
    for name in ("own_answers", "stored_samples"):
        read = getattr(methods, name)
        monkeypatch.setattr(methods, name, lambda *a, read=read: [replace(s, finish_reason="eos") for s in read(*a)])
    judge(50.0, 90.0)
    changes = {"method": method, "rounds": rounds, "trainer": {"logging_steps": 1}, "max_steps": 3}
    run_stage("optimise", small_recipe(copied, optimise=changes))
    choice = _choice(copied)
    assert choice["published"] == f"round-{rounds}" and (choice["reward"] is not None) == reward
    training = choice["candidates"][choice["published"]]["training"]
    assert ("round-1-at-50%" in choice["candidates"]) == (method in ("rloo", "grpo"))
    assert training["steps"] == len(training["losses"]) == 3 and np.isfinite(training["losses"]).all() and training["rows"] > 0
    assert all(len(values) <= 3 and np.isfinite(values).all() for values in training["logged"].values()) and any(
        training["logged"].values()
    )
    assert hash_path(copied / "policies/aligned" / WEIGHTS) != hash_path(copied / "policies/sft" / WEIGHTS)
    if method == "spin":  # the second round mixes in the answers that the first learned from
        assert training["rows"] > choice["candidates"]["round-1"]["training"]["rows"]
    assert f"Trained by `{method}`" in (copied / "policies/aligned/README.md").read_text()


def test_spin_learns_from_the_last_two_policies_and_no_more(monkeypatch):
    """Round 3 from the answers of the policies that rounds 3 and 2 start from, those of rounds 2 and 1, and no longer from pi_SFT's."""
    prompt = Prompt.of("ask", "train")
    before = {1: "of pi_SFT", 2: "of round 1", 3: "of round 2"}  # the policy before a round, by the round
    monkeypatch.setattr(methods, "own_answers", lambda work, number: [Sample(prompt, 0, before[number], "eos", 3, -1.0)])
    monkeypatch.setattr(methods, "demonstrated", lambda work, number: [Demonstration(prompt, "shown")])
    found = [methods.METHODS["spin"].rows(None, number) for number in (1, 2, 3)]
    assert [[pair.worse for pair in pairs] for pairs in found] == [["of pi_SFT"], ["of round 1", "of pi_SFT"], ["of round 2", "of round 1"]]
    assert {pair.better for pairs in found for pair in pairs} == {"shown"}


def test_spin_goes_on_from_the_round_before(tmp_path):
    settings = methods.OptimiseSettings(method="spin")
    work = Work(SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts)), settings, None, "", "none", tmp_path / "work")
    assert [work.start(1, "before"), work.start(3, "sft")] == [tmp_path / "policies/sft"] * 2
    assert work.start(3, "before") == tmp_path / "work/rounds/2/policy"


@pytest.mark.parametrize(
    ("method", "changes", "learned"),
    [
        ("gsil", {"rounds": 2}, "from demonstrations and its own answers"),
        ("ditto", {"rounds": 2}, "from demonstrations over its own answers"),
        ("rlsr", {"num_train_epochs": 1, "max_steps": 3}, "as they resemble the demonstration"),
        ("gad", {"num_train_epochs": 1, "max_steps": 3, "discriminator": {"learning_rate": 1e-3}}, "a discriminator of demonstrations"),
    ],
)
def test_the_baselines_need_no_reward(copied, judge, method, changes, learned):
    if method != "gsil":
        pytest.importorskip("trl")
    rounds = changes.get("rounds", 1)
    judge(*(50.0 * k for k in range(1, rounds + 2)))
    run_stage("optimise", small_recipe(copied, optimise={"method": method, **changes}))
    choice = _choice(copied)
    assert (choice["method"], choice["reward"], choice["published"]) == (method, None, f"round-{rounds}")
    own = choice["candidates"][f"round-{rounds}"]
    assert own["training"]["rows"] > 0 and own["training"]["tokens"] > 0 and own["drawn"] > 0
    assert learned in (copied / "policies/aligned/README.md").read_text()

"""Evaluation on a pool small enough to work out by hand."""

import numpy as np
import pytest

from irlign.evaluate.group import Group
from irlign.evaluate.headline import headline
from irlign.evaluate.metrics import Evaluation, EvaluationSettings

SETTINGS = EvaluationSettings(resamples=500)


def _group(ids, golden, reward, texts=None, finished=None):
    count = len(ids)
    texts = texts or [f"word {i}" for i in range(count)]
    done = np.array(finished if finished is not None else [True] * count)
    rewards = {"r": np.array(reward, dtype=float), "length": np.array([len(t) for t in texts], dtype=float)}
    return Group(ids, texts, done, rewards, None if golden is None else np.array(golden, dtype=float))


def _evaluation(golden=(0, 2, 1, 3), reward=(1, 2, 3, 4), finished=None, initial_golden=(0, 0), judged=True):
    """Two prompts p and q with two answers of pi_SFT each, one of pi_0 each, one demonstration for p."""
    pool = _group(["p", "p", "q", "q"], golden if judged else None, reward, finished=finished)
    initial = _group(["q", "p"], initial_golden if judged else None, [0.0, 1.5])
    return Evaluation(initial, pool, _group(["p"], [4] if judged else None, [9.0]), "r", SETTINGS, 0)


def test_golden_by_hand():
    golden = _evaluation().golden("mine")
    assert golden["sft"]["mean"] == golden["best_of_n"]["1"]["mean"] == pytest.approx((1 + 2) / 2)
    assert golden["best_of_n"]["2"]["mean"] == pytest.approx((2 + 3) / 2)
    assert (golden["demonstrations"]["mean"], golden["demonstrations"]["prompts"]) == (4, 1)
    assert golden["oracle"]["2"]["mean"] == pytest.approx(2.5) and golden["initial"]["prompts"] == 2
    wrong = _evaluation(reward=(2, 1, 4, 3)).golden("mine")
    assert wrong["best_of_n"]["2"]["mean"] == pytest.approx((0 + 1) / 2) and wrong["oracle"]["2"]["mean"] == pytest.approx(2.5)


def test_a_cut_answer_is_never_picked_while_a_finished_one_exists():
    golden = _evaluation(finished=[True, False, False, False]).golden("mine")
    assert golden["best_of_n"]["2"]["mean"] == pytest.approx((0 + 3) / 2)  # p: the finished 0; q: both cut, the reward decides


def test_comparisons_pair_the_same_prompts():
    tests = {(t["a"], t["b"]): t for t in _evaluation(initial_golden=(2, 1)).tests("golden")}
    assert tests["sft", "initial"]["mean_difference"] == pytest.approx(((1 - 1) + (2 - 2)) / 2)  # pi_0's rows come q first
    assert tests["best_of_2", "sft"]["mean_difference"] == pytest.approx(1.0) and tests["best_of_2", "sft"]["prompts"] == 2
    assert ("best_of_oracle_n", "sft") in tests and all(t["measure"] == "golden" for t in tests.values())


def test_without_golden_only_the_first_step_is_tested():
    evaluation = _evaluation(judged=False)
    assert [(t["a"], t["b"], t["measure"]) for t in evaluation.tests("r")] == [("sft", "initial", "r")]
    heldout = evaluation.heldout()
    # p: answers 1 and 2 of pi_SFT against 1.5 of pi_0; q: 3 and 4 against 0
    assert heldout["reward_auc"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert heldout["rewards"]["best_of_n"]["2"]["mean"] == pytest.approx((2 + 4) / 2) and heldout["finished"]["demonstrations"] is None
    assert heldout["completion_length"]["sft"]["mean"] == 2


def test_the_rows_hold_the_values_behind_the_figures():
    evaluation = _evaluation()
    rows = evaluation.rows({"p": "Pea?", "q": "Queue?"})
    assert [row["prompt"] for row in rows] == ["Pea?", "Queue?"]
    assert [row["golden/best_of_2"] for row in rows] == [2, 3] and [row["golden/demonstrations"] for row in rows] == [4, None]
    assert [row["answer/best_of_n"] for row in rows] == ["word 1", "word 3"] and [row["answer_golden/best_of_n"] for row in rows] == [2, 3]


def test_the_aligned_policy_stands_beside_the_others():
    """p: answers worth 2 and 4, q: 5 and 1; by the reward the second of each is the better one. Rows of q come first."""
    aligned = _group(["q", "q", "p", "p"], [5, 1, 2, 4], [0.0, 1.0, 0.0, 1.0])
    own = _evaluation()
    evaluation = Evaluation(own.groups["initial"], own.pool, own.groups["demonstrations"], "r", SETTINGS, 0, aligned=aligned)
    golden = evaluation.golden("mine")
    assert golden["aligned"]["mean"] == 3 and golden["sft"]["mean"] == 1.5
    assert {n: e["mean"] for n, e in golden["aligned_best_of_n"].items()} == pytest.approx({"1": 3, "2": (4 + 1) / 2})
    tests = {(t["a"], t["b"]): t for t in evaluation.tests("golden")}
    assert tests["aligned", "sft"]["mean_difference"] == pytest.approx(((3 - 1) + (3 - 2)) / 2)
    assert tests["aligned", "initial"]["mean_difference"] == pytest.approx(3) and tests["aligned", "sft"]["prompts"] == 2
    rows = evaluation.rows({"p": "Pea?", "q": "Queue?"})
    assert [row["golden/aligned"] for row in rows] == [3, 3] and [row["answer_golden/aligned"] for row in rows] == [2, 5]
    assert own.golden("mine")["aligned"] is None and own.golden("mine")["aligned_best_of_n"] is None
    assert not any("aligned" in key for row in own.rows({"p": "Pea?", "q": "Queue?"}) for key in row)


def _results(golden, initial=0.0, reward=None):
    """Results of 40 prompts with four answers each, all prompts alike but for a little noise."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=40)
    ids = [f"p{i}" for i in range(40) for _ in range(4)]
    values = [g + e for e in noise for g in golden] if golden else None
    pool = _group(ids, values, list(reward or (1, 2, 3, 4)) * 40)
    first = _group([f"p{i}" for i in range(40)], list(initial + noise) if golden else None, [0.0] * 40)
    evaluation = Evaluation(first, pool, _group([], None, []), "r", SETTINGS, 0)
    truth = evaluation.golden("quality") if golden else None
    measured = evaluation.tests("golden" if golden else "r")
    heldout = {**evaluation.heldout(), "judge": evaluation.judged()}
    return {"golden": truth, "heldout": heldout, "tests": measured, "curve": evaluation.curve_info(truth), "choice": None}


def test_the_headline_says_what_the_numbers_say():
    better = headline(_results((0, 1, 2, 3)))
    assert better[0].startswith("Best-of-4 beats SFT by +1.50 [") and better[1].startswith("SFT beats the initial policy: +1.50")
    worse = headline(_results((3, 2, 1, 0)))
    assert worse[0].startswith("Best-of-4 is worse than SFT: -1.50") and "Use the SFT policy" in worse[0]
    assert worse[1].startswith("The curve is highest at n = 1 (1.4")
    hump = headline(_results((0, 0, 4, 2)))
    assert hump[0].startswith("Best-of-4 beats SFT by +0.50") and "highest at n = 2" in hump[1] and "over-optimised" in hump[1]
    within = _results((0, 0, 4, 2))
    within["tests"] = [{**t, "ci95": [-0.02, 0.01]} if t["b"] == "best_of_2" else t for t in within["tests"]]
    assert "a fall within the noise [-0.02, 0.01]" in headline(within)[1] and "over-optimised" not in headline(within)[1]
    assert headline(_results((1, 1, 1, 1)))[0].startswith("Best-of-4 is not shown to beat SFT: +0.00")
    none = headline(_results(None))
    assert none[0] == "There is no golden reward, so whether Best-of-4 beats SFT is not shown here." and "100%" in none[1]
    judged = _results(None)
    judged["heldout"]["judge"] = {"4": {"mean": 0.5, "ci95": [0.4, 0.6], "prompts": 30}}
    assert "puts the answers of Best-of-4 +0.50 [0.40, 0.60] standard deviations from SFT's, on 30" in headline(judged)[1]


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.2, 0.4, "beats SFT by"), (-0.4, -0.2, "is worse than SFT:"), (-0.1, 0.7, "is not shown to")]
)
def test_the_aligned_policy_comes_first_in_the_headline(low, high, words):
    results = _results((0, 1, 2, 3))
    without = headline(results)
    own = {"gain": {"mean": 0.5, "low": 0.3}, "kl_sft": {"mean": 2.34}}
    results["optimise"] = {"published": "round-1", "method": "distill", "prompts": 40, "candidates": {"round-1": own}}
    test = {"a": "aligned", "b": "sft", "mean_difference": (low + high) / 2, "ci95": [low, high], "prompts": 40, "measure": "golden"}
    lines = headline({**results, "tests": [*results["tests"], test]})
    assert f"at inference, {words}" in lines[0] and "for 2.3 nats of KL" in lines[0] and lines[1:] == without
    unlabelled = headline({**_results(None), "optimise": results["optimise"]})
    assert "without labels" in unlabelled[0] and "+0.50 standard deviations" in unlabelled[0] and "beats" not in unlabelled[0]
    assert "the reward" not in unlabelled[0]  # a run from before the reward was asked
    own["reward_gain"] = {"mean": 0.25, "low": 0.1}
    both = headline({**_results(None), "optimise": results["optimise"]})[0]
    assert "on 40 dev prompts, the reward +0.25, for 2.3 nats" in both
    results["optimise"] = {"published": "sft", "method": "distill", "why": "none is shown to be better, so SFT is kept"}
    assert headline(results) == ["The aligned policy is SFT itself: none is shown to be better.", *without]


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        ((0, 1, 2, 3), "would have gained +1.50 ["),
        ((3, 2, 1, 0), "would have lost -1.50 ["),
        ((1, 1, 1, 1), "would not have been shown to gain: +0.00"),
    ],
)
def test_where_the_judge_keeps_sft_the_headline_does_not_contradict_it(golden, words):
    kept = {"n": 1, "label_free": 1, "why": "no larger n is shown to be better, so SFT is kept"}
    lines = headline({**_results(golden), "choice": kept})
    assert lines[0].startswith("The label-free judge shows no gain, so SFT is kept. By quality Best-of-4 " + words)
    assert not any(line.startswith("Best-of-") for line in lines)
    given = headline({**_results(golden), "choice": {"n": 1, "label_free": 4, "why": "given by best_of_n.n; the judge would take 4"}})
    assert given[0].startswith("SFT is kept: given by best_of_n.n; the judge would take 4. By quality Best-of-4 " + words)

"""Further golden rewards on the same answers, and where they decide the other way round."""

import numpy as np
import pytest

from irlign.evaluate.goldens import judge_by_others, opposed
from irlign.evaluate.group import Group
from irlign.evaluate.metrics import Evaluation, EvaluationSettings


def _group(ids, texts, golden):
    reward = {"r": np.arange(len(ids), dtype=float), "length": np.zeros(len(ids))}
    return Group(ids, texts, np.ones(len(ids), dtype=bool), reward, None if golden is None else np.array(golden, dtype=float))


def _measured():
    """The pick of each prompt is its second answer, which the first golden reward holds for worth 1 more."""
    ids = [p for i in range(20) for p in (f"p{i}", f"p{i}")]
    pool = _group(ids, ["long answer", "short"] * 20, [0, 1] * 20)
    initial = _group(ids[::2], ["x"] * 20, [0] * 20)
    return Evaluation(initial, pool, _group([], [], None), "r", EvaluationSettings(resamples=200), 0, chosen=2, aligned=pool)


def test_means_and_tests_by_each():
    seen = []

    def length(prompts, answers):
        seen.append((list(prompts), list(answers)))
        return [len(text) for text in answers]

    measured = _measured()
    (found,) = judge_by_others(measured, {"length": length}, {f"p{i}": f"ask {i}" for i in range(20)})
    assert found["name"] == "length" and found["initial"]["mean"] == 1 and found["demonstrations"] is None
    assert found["sft"]["mean"] == found["aligned"]["mean"] == (11 + 5) / 2 and found["best_of_n"]["2"]["mean"] == 5
    assert {(t["a"], t["b"]): t["mean_difference"] for t in found["tests"]} == {
        ("sft", "initial"): 7,
        ("aligned", "sft"): 0,
        ("best_of_2", "sft"): -3,
    }
    assert len(seen) == 2 and seen[1][0][:2] == ["ask 0", "ask 0"]  # pi_SFT's answers once, though they are the aligned policy's too
    assert measured.pool.golden.tolist() == [0, 1] * 20  # the first measure is what it was
    (alarm,) = opposed(measured.tests("golden"), [found])
    assert alarm["name"] == "golden rewards disagree" and "best_of_2 is worse than sft by length: -3.00" in alarm["seen"]


@pytest.mark.parametrize("sign", [1, 0])
def test_agreement_and_doubt_raise_no_alarm(sign):
    measured = _measured()
    same = judge_by_others(measured, {"g": lambda p, a: [sign * (text == "short") for text in a]}, {f"p{i}": "" for i in range(20)})
    assert list(opposed(measured.tests("golden"), same)) == []

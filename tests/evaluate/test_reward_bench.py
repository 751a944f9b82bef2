"""Preference pairs as RewardBench holds them: accuracy by subset and at similar length, by hand."""

import json

import numpy as np
import pytest

from irlign.errors import DataError
from irlign.evaluate.reward_bench import agreement, bench, similar

OPTIONS = {"resamples": 200, "seed": 0}


def test_similar_is_less_than_a_fifth_more():
    assert similar(np.array([100, 100, 119, 0, 0]), np.array([119, 121, 100, 0, 2])).tolist() == [True, False, True, True, False]


def test_agreement_by_hand():
    """Prompt p has two pairs, one right and one tied: 3/4; q has one, wrong: the mean over prompts is 3/8, over pairs it would be 1/2."""
    values = {"r": np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 5.0]]), "length": np.array([[10.0, 10.0, 10.0], [11.0, 30.0, 10.0]])}
    found = agreement(values, ["p", "p", "q"], **OPTIONS)
    assert found["pairs"] == 3 and found["accuracy"]["r"]["mean"] == pytest.approx(3 / 8) and found["accuracy"]["r"]["prompts"] == 2
    assert found["matched_pairs"] == 2 and found["matched"]["r"]["mean"] == pytest.approx(1 / 2)
    assert found["matched"]["length"]["mean"] == pytest.approx((0 + 0.5) / 2)


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _score(prompts, answers):
    """The number of letters a, and which prompts it was asked about."""
    _score.seen = prompts
    return {"r": np.array([float(text.count("a")) for text in answers])}


def test_a_file_by_subset(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b" * (2 + i), "subset": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    rows[1] |= {"chosen": "b", "rejected": "a"}
    found = bench(_write(tmp_path / "b.jsonl", rows), _score, conversational=False, **OPTIONS)
    assert [(of["subset"], of["pairs"], of["accuracy"]["r"]["mean"]) for of in found["subsets"]] == [
        ("all", 4, 0.75),
        ("even", 2, 1.0),
        ("odd", 2, 0.5),
    ]
    assert [of["matched_pairs"] for of in found["subsets"]] == [2, 1, 1] and found["pairs"] == 4 and _score.seen[0] == "p0"
    (one,) = bench(
        _write(tmp_path / "c.jsonl", [{k: v for k, v in row.items() if k != "subset"} for row in rows]),
        _score,
        conversational=True,
        **OPTIONS,
    )["subsets"]
    assert one["subset"] == "all" and _score.seen[0] == ({"role": "user", "content": "p0"},)


def test_a_subset_without_similar_pairs_has_no_figure(tmp_path):
    found = bench(
        _write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "bbb"}]), _score, conversational=False, **OPTIONS
    )
    assert found["subsets"][0]["matched"] == {"r": None, "length": None}


def test_a_wrong_row_is_named(tmp_path):
    with pytest.raises(DataError, match=r"b.jsonl:2"):
        bench(
            _write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}]),
            _score,
            conversational=False,
            **OPTIONS,
        )

"""Rewards over stored answers: the agreement by hand, no prompt judged by a head that saw it, and what a wrong file says."""

import json
from pathlib import Path

import numpy as np
import pytest

from irlign.arena.stored import agreement, compare, cross_fitted, picked, ranking, read_stored, write_pools
from irlign.errors import ConfigError, DataError
from irlign.reward.features import WIDTH, word_features


def write(path, prompts=60):
    """`tuned` is polite where `base` is rude; of the unseen models `kind` is polite and the judge likes that."""
    with path.open("w") as file:
        for i in range(prompts):
            outputs = {
                "base": f"no idea about {i}, go away",
                "tuned": f"certainly, here is {i}",
                "kind": f"certainly, this is {i}",
                "curt": f"go, {i} away",
            }
            scores = {"kind": 9, "curt": 2 if i else None}
            file.write(json.dumps({"prompt": f"ask {i}", "outputs": outputs, "judge_score": scores, "reference": f"certainly {i}"}) + "\n")
    return path


def test_a_reward_from_two_models_orders_two_others(tmp_path):
    found = compare(read_stored(write(tmp_path / "a.jsonl")), "tuned", "base", [])
    assert found["words"]["all"]["mean"] == 1.0 and found["words"]["picked"]["mean"] == 9.0
    assert found["words"]["all"]["prompts"] == 59  # one judge's score is missing, and with it the pair
    assert found["control: length"]["all"]["mean"] == 1.0 and found["the judge itself"]["all"]["mean"] == 1.0


def test_a_prompt_is_scored_by_a_head_that_never_saw_it(tmp_path):
    """Features that name the prompt and the side of it: learned by heart they would tell the sides apart; unseen they cannot."""
    stored = read_stored(write(tmp_path / "a.jsonl"))
    prompt = np.unique(stored.prompts, return_inverse=True)[1]
    by_heart = np.eye(60)[prompt] * np.where(stored.models == "tuned", 1, -1)[:, None]
    scores = cross_fitted(stored, by_heart, "tuned", "base")
    own = {m: scores[stored.models == m] for m in ("tuned", "base")}
    assert np.abs(own["tuned"] - own["base"]).max() < 0.5  # fitted on, they are 5 apart and more
    assert np.ptp(cross_fitted(stored, np.where(stored.models == "tuned", 1, -1)[:, None] * np.ones((len(prompt), 2)), "tuned", "base")) > 5


def test_agreement_by_hand(tmp_path):
    """Two prompts, three models: pairs that the judge holds equal do not count, a tie of the reward counts half."""
    path = tmp_path / "b.jsonl"
    lines = [
        {"prompt": "p", "outputs": {"a": "x" * 100, "b": "x" * 105, "c": "x"}, "judge_score": {"a": 1, "b": 2, "c": 2}},
        {"prompt": "q", "outputs": {"a": "x", "b": "xx", "c": "xxx"}, "judge_score": {"a": 3, "b": 2, "c": 1}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    stored = read_stored(path)
    everyone, scores = np.ones(6, dtype=bool), np.array([0, 1, 0, 3, 2, 2.5])
    # p: (a, b) right, (a, c) tied, (b, c) left out; q: (a, b), (a, c) right, (b, c) wrong
    assert agreement(stored, scores, everyone, matched=False) == pytest.approx([0.75, 2 / 3])
    assert agreement(stored, scores, everyone, matched=True).tolist() == [1.0]  # only a and b of p are of like length
    assert picked(stored, scores, everyone)["mean"] == pytest.approx((2 + 3) / 2)


def test_the_ranking_by_hand(tmp_path):
    """Mean judge's scores a 2, b 2.5, c 1.5 with a hole (q of b); the reward's means over the same answers 1, 3, 2: ranks 2 3 1 against 1 3 2."""
    path = tmp_path / "b.jsonl"
    lines = [
        {"prompt": "p", "outputs": {"a": "x", "b": "y", "c": "z"}, "judge_score": {"a": 1, "b": 2.5, "c": 2}},
        {"prompt": "q", "outputs": {"a": "x", "b": "y", "c": "z"}, "judge_score": {"a": 3, "b": None, "c": 1}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    stored = read_stored(path)
    scores = np.array([1, 3, 2, 1, 99, 2])
    found = ranking(stored, scores, ~np.isnan(stored.golden))
    assert found["mean"] == pytest.approx(1 - 6 * (1 + 0 + 1) / (3 * 8)) and found["prompts"] == 2


def test_the_margin_over_length_is_paired(tmp_path):
    """Answers of one length: words order every pair rightly, length ties them all, so the margin is a half at every prompt."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(40):
            outputs = {"base": "go away", "tuned": "so kind", "kind": "be kind", "curt": "be away"}
            file.write(json.dumps({"prompt": f"ask {i}", "outputs": outputs, "judge_score": {"kind": 9, "curt": 2}}) + "\n")
    found = compare(read_stored(path), "tuned", "base", [])["words"]
    assert found["above"]["control: length"]["mean_difference"] == 0.5 and found["above"]["control: length"]["ci95"] == [0.5, 0.5]
    assert found["ranking"]["mean"] == pytest.approx(1.0) and found["ranking"]["prompts"] == 40


def test_the_files_of_the_black_box(tmp_path):
    names = write_pools(read_stored(write(tmp_path / "a.jsonl", 3)), "tuned", "base", tmp_path / "pools")
    rows = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in names]
    assert [len(of) for of in rows] == [3, 3, 5] and {row["model"] for row in rows[2]} == {"kind", "curt"}
    assert rows[0][0] == {"prompt": "ask 0", "completion": "no idea about 0, go away", "model": "base", "id": "0 nan"}


def test_words_are_counted_once_and_length_is_taken_out():
    one, twice = word_features(["go away", "go away go away"])
    assert one.shape == (WIDTH,) and np.linalg.norm(one) == pytest.approx(1) == np.linalg.norm(twice)
    assert (one > 0).sum() == 3 and (twice > 0).sum() == 4  # go, away, "go away"; and "away go"


def test_bad_files_and_models_are_named(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "p", "outputs": {"a": "x"}}\nnonsense\n')
    with pytest.raises(DataError, match="not a line of stored answers") as error:
        read_stored(path)
    assert str(error.value.where).endswith(":2")
    with pytest.raises(ConfigError, match="fewer than 20 answers"):
        compare(read_stored(write(tmp_path / "a.jsonl")), "tuned", "nobody", [])

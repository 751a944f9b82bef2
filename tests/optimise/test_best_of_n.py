"""Best-of-N: candidates with all raw scores, and the one answer selected for each prompt."""

import numpy as np
import pytest

from irlign.errors import DataError
from irlign.optimise.best_of_n import candidate_rows, scored_text, select
from irlign.records import Prompt, Sample

ASK = Prompt.of("Say it.", "dev")
TALK = Prompt.of(({"role": "user", "content": "Hé?"},), "test")


def _pool(prompt, reasons):
    return [Sample(prompt, i, f" answer {i}. cut", reason, 4 + i, -1.5 * i) for i, reason in enumerate(reasons)]


def _select(scores, reasons=None, n=None, prompt=ASK):
    pool = _pool(prompt, reasons or ["eos"] * len(scores))
    return select(candidate_rows(pool, {"r": np.array(scores)}), "r", n or len(scores))[0]


def test_candidates_hold_every_sample_with_every_raw_score():
    pool = [*_pool(ASK, ["eos", "length"]), *_pool(TALK, ["stop"])]
    rows = candidate_rows(pool, {"init-sft": np.array([0.5, -1.0, 2.0]), "length": np.array([3.0, 4.0, 5.0], dtype=np.float32)})
    assert [Sample.from_row(row) for row in rows] == pool
    assert [(row["reward/init-sft"], row["reward/length"]) for row in rows] == [(0.5, 3.0), (-1.0, 4.0), (2.0, 5.0)]
    assert all(type(row["reward/length"]) is float for row in rows)
    assert set(rows[0]) == {
        *("split", "prompt_id", "prompt", "conversational", "index", "completion", "finish_reason", "tokens", "logprob"),
        *("reward/init-sft", "reward/length", "judge", "style"),
    }


def test_the_highest_reward_wins_and_the_named_one_decides():
    pool = _pool(ASK, ["eos"] * 3)
    rows = candidate_rows(pool, {"a": np.array([1.0, 3.0, 2.0]), "b": np.array([9.0, 0.0, 1.0])})
    assert select(rows, "a", 3) == [
        {
            "prompt_id": ASK.prompt_id,
            "split": "dev",
            "prompt": "Say it.",
            "completion": " answer 1. cut",
            "reward": 3.0,
            "index": 1,
            "n": 3,
            "finish_reason": "eos",
        }
    ]
    assert select(rows, "b", 3)[0]["index"] == 0


def test_a_cut_answer_never_beats_a_finished_one():
    assert _select([5.0, -5.0, 1.0], ["length", "stop", "length"])["index"] == 1
    assert _select([5.0, -5.0, -4.0], ["length", "stop", "eos"])["index"] == 2
    assert _select([1.0, 5.0, 2.0], ["length"] * 3)["index"] == 1  # nothing finished: the best of the cut ones


def test_of_equal_rewards_the_first_wins():
    assert _select([1.0, 2.0, 2.0, 2.0])["index"] == 1
    pool = _pool(ASK, ["eos"] * 3)
    rows = candidate_rows(pool, {"r": np.zeros(3)})
    assert select(rows[::-1], "r", 3)[0]["index"] == 0


def test_only_the_first_n_count():
    assert _select([0.0, 1.0, 9.0], n=2)["index"] == 1
    with pytest.raises(DataError, match="3 candidates, and best_of_n") as caught:
        _select([0.0, 1.0, 9.0], n=4)
    assert ASK.prompt_id in str(caught.value)


def test_each_prompt_may_have_its_own_n():
    rows = candidate_rows([*_pool(ASK, ["eos"] * 3), *_pool(TALK, ["eos"] * 3)], {"r": np.array([1.0, 2.0, 3.0] * 2)})
    assert [(r["index"], r["n"]) for r in select(rows, "r", {ASK.prompt_id: 1, TALK.prompt_id: 2})] == [(0, 1), (1, 2)]
    with pytest.raises(DataError, match="asks for 4"):
        select(rows, "r", {ASK.prompt_id: 1, TALK.prompt_id: 4})


def test_each_prompt_has_its_own_answer_in_order():
    pool = [*_pool(TALK, ["eos"] * 2), *_pool(ASK, ["eos"] * 2)]
    picked = select(candidate_rows(pool, {"r": np.array([1.0, 2.0, 4.0, 3.0])}), "r", 2)
    assert [(p["prompt_id"], p["index"]) for p in picked] == [(TALK.prompt_id, 1), (ASK.prompt_id, 0)]
    assert picked[0]["prompt"] == [{"role": "user", "content": "Hé?"}]


def test_a_reward_sees_candidates_under_the_ending_rule_of_its_training():
    finished, cut = _pool(ASK, ["eos", "length"])
    assert scored_text(finished) == " answer 0. cut"
    assert scored_text(cut) == " answer 1."

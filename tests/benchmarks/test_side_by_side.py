"""What the speed benchmarks share, and each of them on a few rows: laws of lengths, ratios by hand, what every peer is given."""

import numpy as np
import pytest
import side_by_side as bench


def test_texts_follow_the_stated_laws():
    rows = bench.texts(60, 4)
    assert len(rows) == 240 and [p for p, _ in rows[:4]] == [rows[0][0]] * 4 and rows[4][0] != rows[0][0]
    asked = [len(p.split()) for p, _ in rows[::4]]
    answered = [len(a.split()) for _, a in rows]
    assert min(asked) >= 32 and max(asked) <= 96 and max(answered) <= 96
    assert np.mean(answered) == pytest.approx(39, abs=4 * 30 / np.sqrt(240))
    assert bench.tokens_in(rows[:1]) == asked[0] + answered[0] + 1


def test_a_word_is_a_token():
    tokenizer = bench.word_tokenizer(1024)
    assert tokenizer("w3 w999 w7 nothing")["input_ids"] == [3, 999, 7, 2] and tokenizer.eos_token_id == 1


def test_engines_run_in_turn_and_ratios_are_within_a_repeat():
    order = []
    seconds, results = bench.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 5}, 2)
    assert order == ["a", "b", "a", "b"] and results == {"a": None, "b": 5} and [len(s) for s in seconds.values()] == [2, 2]
    plain, fast = bench.rows_of({"plain": [2.0, 4.0, 3.0], "fast": [1.0, 1.0, 1.0]}, "plain", 12, shape="s")
    assert (plain["tokens_per_s"], plain["ratio"], plain["spread"]) == (4, 1, [1, 1])
    assert (fast["tokens_per_s"], fast["ratio"], fast["spread"]) == (12, 3, [2, 4]) and fast["shape"] == "s"
    assert plain["lengths"] == fast["lengths"] == "realistic"


@pytest.mark.parametrize("kind", ["reward", "likelihood"])
def test_scoring_gives_every_engine_the_same_answers(kind):
    scoring = pytest.importorskip("scoring")
    rows = scoring.measure("llama 0.9 M", kind, prompts=2, repeats=1, sizes=(8,))
    winners = {row["engine"]: row.get("same_winners") for row in rows}
    assert winners["irlign, float32"] == 1 and winners["irlign, alone, float32"] is None and len(rows) == 6
    places = {row["engine"]: row["positions"] for row in rows}
    assert places["irlign, float32"] < 1 <= places["irlign, alone, float32"] < places["in order, batches of 8, float32"]
    assert scoring.same_winners(np.eye(2, 16).ravel(), np.roll(np.eye(2, 16), 1, 0).ravel()) == 0


def test_trl_packs_in_both_precisions():
    training = pytest.importorskip("training")
    peers = training.engines("sft", "llama 0.9 M", False)
    full, low = (peers[f"SFTTrainer, packing (wrapped), {name}"].keywords for name in ("float32", "bf16"))
    assert full == {**low, "bf16": False} and low["packing"] and "bf16" not in low  # its own default
    assert "RewardTrainer, packing (wrapped), bf16" not in training.engines("reward", "llama 0.9 M", False)


def test_training_peers_move_the_weights_alike(tmp_path):
    """irlign's stage and the plain loop learn the same rows: their losses on them agree, and fall."""
    training = pytest.importorskip("training")
    from irlign.data.chat import Format
    from irlign.policy.likelihood import mean_nll
    from irlign.policy.load import load_policy

    start, rows = training.save_start(tmp_path / "start", "llama 0.9 M"), bench.texts(16, 1)
    training.irlign_sft(start, tmp_path / "ours", rows)
    training.plain_sft(start, tmp_path / "plain", rows, bf16=False)
    (tmp_path / "plain/tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())
    (tmp_path / "plain/tokenizer_config.json").write_bytes((start / "tokenizer_config.json").read_bytes())
    losses = []
    for folder in (start, tmp_path / "ours/sft", tmp_path / "plain"):
        policy = load_policy(str(folder))
        losses.append(mean_nll(policy, Format(policy.tokenizer, "none").encode(*zip(*rows, strict=True))))
    assert losses[1] < losses[0] and losses[2] < losses[0] and losses[1] == pytest.approx(losses[2], abs=0.05)
    assert losses[0] == pytest.approx(np.log(1024), abs=0.1)  # a random model over 1,024 words

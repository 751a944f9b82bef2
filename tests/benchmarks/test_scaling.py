"""The benchmark of scaling: exponents and a chain's costs by hand, shares of the work that add up to the whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import scaling as bench
import scaling_chain as chain
from side_by_side import tokens_in

from irlign.arena.methods import Pick
from irlign.costs import Shape

SHAPE = Shape(
    parameters=130, looked_up=20, head=10, layers=1, hidden=2, attention=5, kept=5, vocabulary=10
)  # 220 a token, 200 without head


def test_exponents_by_hand():
    """3 x^2 in one repeat and x^1.5 in the other, where x is planned."""
    x = [1.0, 4.0, 16.0]
    found = np.array([[3.0, 48.0, 768.0], [1.0, 8.0, 64.0]])
    assert bench.exponent(x, found, np.array([x, x])) == {
        "exponent": pytest.approx(1.75),
        "spread": [pytest.approx(1.5), pytest.approx(2)],
        "planned": pytest.approx(1),
    }


def test_two_processes_share_the_work_of_one(tmp_path):
    parameters = bench.save_policy(tmp_path / "llama 16", 16)
    assert parameters == 4 * (4 * 16 * 16 + 3 * 16 * 44 + 2 * 16) + 16 + 1024 * 16
    rows = bench.texts(5, 2)
    for kind in ("sampling", "scoring"):
        run = bench.KINDS[kind][0]
        whole = run(tmp_path / "llama 16", bench.Point(5, 2, 16), 0)
        halves = [run(tmp_path / "llama 16", bench.Point(5, 2, 16, 2), share) for share in (0, 1)]
        assert whole[0] == pytest.approx(sum(half[0] for half in halves)) and min(half[0] for half in halves) > 0
        if kind == "scoring":
            assert whole[0] == pytest.approx(tokens_in(rows))
    tokens, flops, _ = bench.training(tmp_path / "llama 16", bench.Point(5, 2, 16), 0)
    assert tokens == tokens_in(rows) and flops == pytest.approx(3 * whole[1])  # the same texts


def test_operations_of_a_chain_by_hand():
    """Prompts of 4 and answers of 6 tokens: 20 operations for each token attended to, so 220 + 20 * 7 for a drawn one."""
    count = lambda trained: chain.flops(SHAPE, 4, 6, 10, trained, answers=3)  # noqa: E731
    assert count({}) == 10 * 360
    assert count({"sft": 7}) == 3600 + 3 * 7 * (220 + 20 * 5)
    assert count({"policy-dpo-0.0": 7}) == 3600 + 4 * 7 * 320
    assert count({"reward-x": 7}) == 3600 + 3 * 7 * 300 + 3 * 10 * 300
    assert count({"likelihoods": 0}) == 3600 + 2 * 3 * 10 * 320


def test_a_method_pays_its_share_of_drawing():
    """Pools of 100, 40 and 60 tokens drawn in 20 s: 150 of them are three quarters; DPO draws its test answers itself, and pays for train alone."""
    stages = {"sft": (3, 50), "sample": (20, None), "reward-x": (5, 7), "policy-dpo": (9, 70)}
    run = SimpleNamespace(stages={name: {"notes": {"tokens": tokens} if tokens else {}} for name, (_, tokens) in stages.items()})
    cell = SimpleNamespace(
        run=run, pool=[None] * 3, tokens={"train": 100, "dev": 40, "test": 60}.get,
        seconds=lambda names: sum(stages[name][0] for name in names), memory=lambda names: 500 + len(names),
    )  # fmt: skip
    sizes = SimpleNamespace(prompt=4, answer=6)

    def cost(pool, *names):
        return chain._cost(cell, Pick(pool, "what", stages=names), SimpleNamespace(tokens=150), sizes, SHAPE)

    best, dpo = cost("sft", "sft", "sample", "reward-x"), cost("dpo", "sft", "sample", "policy-dpo")
    assert (best["seconds"], best["trained"], best["drawn"], best["peak_mib"]) == (8 + 15, 57, 150, 503)
    assert (dpo["seconds"], dpo["trained"]) == (12 + 10, 120)

"""The benchmark of adaptive Best-of-N: curves turned round by hand, what is saved, and a stored cell read without a stage."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from irlign.config import dump_recipe
from irlign.files import write_json, write_table
from irlign.recipe import as_recipe
from irlign.statistics import best_of_n

SPEC = importlib.util.spec_from_file_location("benchmark_adaptive_bon", Path(__file__).parents[2] / "benchmarks/adaptive_bon.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.mark.parametrize(("value", "n"), [(0.5, 1), (1, 1), (1.5, 1.5), (2.5, 2.5), (3, 3), (2.9, 2.9), (4, 4)])
def test_the_first_n_that_reaches_a_value(value, n):
    """A curve of 1, 2, 3, 2.5: past its top nothing is found, and nothing reaches 4."""
    assert bench.first_n(np.array([1.0, 2.0, 3.0, 2.5]), value) == pytest.approx(n)


def test_what_is_saved_by_hand():
    """15 tokens for a golden 2.5 where an answer has 10: Best-of-n gives 1.5 for them, and 2.5 for 25 of them."""
    row = np.array([*(0, 10, 1.0), *(0, 15, 2.5), *(0, 30, 3.0), 10, 1.0, 2.0, 3.0])
    assert bench.compare(row, 0) == (0, 0)
    assert bench.compare(row, 1) == (pytest.approx(1 - 15 / 25), pytest.approx(1))
    rows = bench.summarise({"a": [np.stack([row, row])], "b": [np.stack([row] * 3)]})
    assert [r["saved"]["mean"] for r in rows] == pytest.approx([0, 0.4, 0]) and rows[1]["saved"]["ci95"] == pytest.approx([0.4, 0.4])
    assert (rows[1]["equal_n"], rows[1]["cells"]) == (2.5, 2)


def test_settings_weigh_alike_however_many_seeds_they_have():
    low, high = (np.array([[*(1, 10, g), *(1, 10, g), *(1, 10, g), 10, g, g + 1]]) for g in (0.0, 1.0))
    assert bench.summarise({"a": [low], "b": [high, high, high]})[0]["golden"] == 0.5


def _cell(folder, prompts=24, answers=6):
    """A cell whose likelihood, judge and golden reward agree: the more of the demonstration's words, the better."""
    recipe = as_recipe(
        {"world": {"corpus_lines": 200, "demonstrations": 24, "dev_prompts": prompts, "test_prompts": 8}, "output_dir": str(folder)}
    )
    splits, rng = recipe.world.splits(0), np.random.default_rng(0)
    rows, share = [], []
    for d in (d for split in ("dev", "test") for d in splits[split]):
        words = d.completion.split()
        for i in range(answers):
            kept = rng.integers(1, len(words) + 1)
            share.append(kept / len(words))
            text = " " + " ".join(words[:kept])
            rows.append({**d.prompt.to_row(), "index": i, "completion": text, "finish_reason": "eos", "tokens": 10, "logprob": 0.0})
    write_table(folder / "pools/sft.parquet/part-00000.parquet", rows)
    write_table(folder / "scores/likelihoods.parquet", [{"sft": s, "init": 0.0, "tokens": 1.0} for s in share])
    for name in ("init-sft", "judge"):
        write_table(folder / f"scores/{name}.parquet", [{"score": s} for s in share])
    write_json(folder / "manifest.json", {"irlign": "0", "stages": {}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return recipe, [r for r in rows if r["split"] == "test"], np.array(share)[-8 * answers :].reshape(8, answers)


def test_a_cell_is_read_without_a_stage(tmp_path):
    recipe, rows, share = _cell(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = bench.measure(tmp_path)
    golden = np.array(recipe.world.golden([r["prompt"] for r in rows], [r["completion"] for r in rows])).reshape(8, 6)
    assert sorted(tmp_path.rglob("*")) == before and found.shape == (8, 3 * 3 + 1 + 6)
    assert found[:, 9].tolist() == [10] * 8 and found[:, 1] == pytest.approx(10 * found[:, 0])
    curve = [[best_of_n(s, g, n) for n in range(1, 7)] for s, g in zip(share, golden, strict=True)]
    assert found[:, 10:] == pytest.approx(np.array(curve))
    assert found[:, 8] == pytest.approx(golden[range(8), share.argmax(1)])  # a budget of 8 is the pool, or all that can be gained
    assert 1 < found[:, 0].mean() < 3 < found[:, 3].mean() < found[:, 6].mean() <= 6

"""The sampling benchmark measures what it says: lengths by their law, ratios to `generate`, a roofline above all."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

SPEC = importlib.util.spec_from_file_location("benchmark_sampling", Path(__file__).parents[2] / "benchmarks/sampling.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.mark.parametrize("engine", ["generate", "generate static", "irlign"])
def test_lengths_follow_the_stated_law(engine):
    texts = bench.make_prompts(6, 1024)
    fixed = bench.ENGINES[engine](bench.make_model("llama 0.9 M", "fixed", torch.float32), texts[:1])
    assert fixed == [96] * 16
    lengths = bench.ENGINES[engine](bench.make_model("llama 0.9 M", "realistic", torch.float32), texts)
    law = 0.0228 * (1 - 0.0228) ** np.arange(95)
    mean = float(np.arange(1, 96) @ law + 96 * (1 - law.sum()))
    assert mean == pytest.approx(39, abs=0.5) and len(lengths) == 96
    assert np.mean(lengths) == pytest.approx(mean, abs=4 * 32 / np.sqrt(96))


def test_rows():
    limits = {"float32": 1e6, "memory": 1e6}
    engines = [("generate", "float32"), ("irlign", "float32")]
    rows = bench.measure("llama 0.9 M", "realistic", prompts=2, repeats=2, engines=engines, limits=limits)
    assert [row["engine"] for row in rows] == ["generate", "irlign"]
    assert rows[0]["ratio"] == 1 and rows[0]["spread"] == [1, 1]
    low, high = rows[1]["spread"]
    assert 1 < low <= rows[1]["ratio"] <= high and 0 < rows[1]["roofline_share"] < 1

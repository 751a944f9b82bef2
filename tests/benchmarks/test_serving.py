"""The serving benchmark measures what it says: every client is answered again and again, and drawn tokens are counted."""

import importlib.util
from pathlib import Path

import pytest
from served import serving

SPEC = importlib.util.spec_from_file_location("benchmark_serving", Path(__file__).parents[2] / "benchmarks/serving.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_a_row(tmp_path):
    bench.make_policy(tmp_path)
    answerer = bench.make_answerer(tmp_path)
    with serving(answerer) as (server, client):
        row = bench.measure(answerer, client.base_url.port, "mixed", 2, 3, seconds=0.3, repeats=1)
        drawn = server.metrics.tokens.labels("drawn")._value.get()
    assert row["requests"] >= 3 and 0 < row["p50_s"] <= row["p99_s"] and row["spread"] == [row["ratio"]] * 2 and row["ratio"] > 0
    assert row["tokens_per_s"] / row["answers_per_s"] * row["requests"] == pytest.approx(drawn)
    assert 2 <= drawn / row["requests"] <= 2 * 128 and row["short_p50_s"] > 0

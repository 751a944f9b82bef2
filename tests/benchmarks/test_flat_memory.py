"""Memory stays flat as a pool grows: ten times the samples, and the peak of a process that goes through them part by part is the same."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("benchmark_flat_memory", Path(__file__).parents[2] / "benchmarks/flat_memory.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_ten_times_the_samples_need_no_more_memory(tmp_path):
    """Two parts, then nineteen; samples held at once would add a KiB each, 68 MiB."""
    few, many = (bench._apart("parts", samples, tmp_path / str(samples))["peak_mib"] for samples in (8_192, 77_824))
    assert many - few < 15

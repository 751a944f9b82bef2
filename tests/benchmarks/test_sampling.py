"""The sampling benchmark measures what it says: lengths by their law, ratios to `generate`, a roofline above all."""

import contextlib
import importlib.util
import os
import sys
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
    assert 0 < low <= rows[1]["ratio"] <= high and 0 < rows[1]["roofline_share"] < 1


def test_workers_draw_every_answer(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmark sets both, and they go with the test
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    with contextlib.ExitStack() as until:
        seconds, lengths = importlib.import_module("sampling_workers").runner("llama 0.9 M", "fixed", "float32", 2, until)(
            bench.make_prompts(3, 1024)
        )
    assert lengths == [96] * 48 and seconds > 0


STAND_IN = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    sys.stdout.write('["vllm"]')
    sys.exit()
wanted = json.loads(sys.stdin.readline())
print(json.dumps({loaded}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == {lives}:
        sys.exit("killed")
    print(json.dumps({{"seconds": 0.5, "lengths": [len(ids) for ids in json.loads(line) for _ in range(wanted["answers"])]}}), flush=True)
    if number == {answers} - 1:
        os._exit(print("killed", file=sys.stderr, flush=True) or 9)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A program in place of the peers' Python, which has vLLM alone: its answers are as long as their prompts."""

    def make(loaded='{"about": wanted["dtype"]}', lives=-1, answers=-1):
        path = tmp_path / "python"
        path.write_text(STAND_IN.format(python=sys.executable, loaded=loaded, lives=lives, answers=answers), encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def test_absent_peers_are_named(stand_in, tmp_path):
    found = bench.present(stand_in())
    assert found == ["vllm"] and bench.present(tmp_path / "nowhere") == [] and bench.absent(["ctranslate2", "vllm"]) == ""
    line = bench.absent(found)
    assert "not measured: ctranslate2 (" in line and "make bench-peers" in line


def test_a_peer_has_its_own_clock_and_a_shape_it_cannot_serve_has_no_row(stand_in, capsys):
    how = {"prompts": 2, "repeats": 1, "engines": [("generate", "float32"), ("vllm", "float32")], "limits": {"float32": 1e6, "memory": 1e6}}
    rows = bench.measure("llama 0.9 M", "realistic", python=stand_in(), **how)
    prompts = [len(ids) for ids in bench.make_prompts(2, 1024)]
    assert rows[1]["engine"] == "vllm" and rows[1]["tokens_per_s"] == 16 * sum(prompts) / 0.5
    assert rows[1]["mean_length"] == sum(prompts) / 2
    rows = bench.measure("llama 0.9 M", "realistic", python=stand_in('{"error": "head size 31"}'), **how)
    assert [row["engine"] for row in rows] == ["generate"] and "not measured from here on: vllm: head size 31" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["lives", "answers"])  # with a question before it, and before the next is asked
def test_a_peer_that_dies_has_the_repeats_it_finished_and_the_others_have_all(stand_in, capsys, ends):
    engines, limits = [("generate", "float32"), ("vllm", "float32")], {"float32": 1e6, "memory": 1e6}
    how = {"prompts": 1, "repeats": 2, "engines": engines, "limits": limits}
    rows = bench.measure("llama 0.9 M", "realistic", python=stand_in(**{ends: 2}), **how)  # the first call is the warm-up
    assert [(row["engine"], row["repeats"]) for row in rows] == [("generate", 2), ("vllm", 1)]
    assert "not measured from here on: vllm: its process ended: killed" in capsys.readouterr().out


def test_plan_puts_peers_in_turn_with_ours():
    for peers in ((), ("ctranslate2", "vllm")):
        shapes = dict(bench.plan(False, False, peers))
        assert list(shapes) == ["llama 0.9 M", "gpt-2 small"]
        several = [f"{e} workers" for e in ("ctranslate2", "irlign") if e in (*peers, "irlign")]
        assert shapes["gpt-2 small"]["engines"] == [
            (e, d) for d in ("float32", "bfloat16") for e in ("generate", *peers, "irlign", *several)
        ]


@pytest.mark.parametrize("shape", ["llama 0.9 M", "gpt-2 small"])
def test_the_law_is_in_the_folder(tmp_path, shape):
    """Read again from its folder, the model gives EOS the hazard after every token; no other weight says so."""
    bench.make_model(shape, "realistic", torch.float32).save_pretrained(tmp_path)
    model = bench.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.bias is None
    ids = torch.tensor([bench.make_prompts(1, 1024)[0]])
    with torch.no_grad():
        hazard = model(ids).logits.softmax(-1)[0, :, 1]
    assert hazard.mean().item() == pytest.approx(0.0228, rel=0.1) and hazard.std() < 0.003

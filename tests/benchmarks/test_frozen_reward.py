"""The study of the frozen reward: one seed with a tiny recipe, both arms; that they share round 1, differ in whose reward, and the table by hand."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from small import small_recipe

SPEC = importlib.util.spec_from_file_location("benchmark_frozen_reward", Path(__file__).parents[2] / "benchmarks/frozen_reward.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def _round(golden, tokens, alarms=()):
    return {"golden": [golden] * 3, "tokens": [tokens] * 3, "finished": [1.0] * 3, "judged": [0.5, 1.5], "alarms": list(alarms)}


def test_the_table_by_hand():
    """Two seeds; golden 1 and 3 make 2; an alarm in one of them."""
    seeds = {}
    for seed, golden in ((0, 1.0), (1, 3.0)):
        start, first = _round(golden, 10.0), _round(golden, 20.0)
        seeds[seed] = {
            "frozen": [start, first, _round(golden, 90.0, ["grown"] if seed else [])],
            "refreshed": [start, first, _round(4.0, 20.0)],
        }
    lines = bench.table(seeds)
    names = [[cell.strip() for cell in line.split("|")][1:3] for line in lines[2:]]
    assert names == [["0", "SFT"], ["1", "both"], ["2", "frozen"], ["2", "refreshed"]]
    assert "| 2.00 [1.00, 3.00] | 90 [90, 90] | 100% [100%, 100%] | +1.00" in lines[4] and lines[4].endswith("| 1 of 2 |")
    assert "| 4.00 [4.00, 4.00] |" in lines[5] and lines[5].endswith("| 0 of 2 |")


def test_both_arms_of_a_small_world(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from irlign.optimise import methods

    own = {k: bench.RECIPE["optimise"][k] for k in ("method", "refresh", "on_policy")}
    small = small_recipe(tmp_path, best_of_n={"likelihood": 0.0}, optimise={**own, "max_steps": 1}, reward={"contrast": "init-demo"})
    monkeypatch.setattr(bench, "RECIPE", small)
    loaded = []
    load = methods.load_resident
    monkeypatch.setattr(methods, "load_resident", lambda path: loaded.append(path) or load(path))
    bench.main([str(tmp_path), "--seeds", "0", "--rounds", "2", "--json", str(tmp_path / "found.json")])
    assert [path.name for path in loaded] == ["init-demo", "init-demo", "current-demo"]
    arms = json.loads((tmp_path / "found.json").read_text())["0"]
    assert arms["frozen"][:2] == arms["refreshed"][:2] and [len(arms[arm]) for arm in bench.ARMS] == [3, 3]
    assert [one["told_apart"] is not None for one in arms["refreshed"][1:]] == [False, True]
    assert len(arms["frozen"][2]["golden"]) == 8 and len(arms["frozen"][2]["judged"]) == 20
    assert np.isfinite([one[key] for arm in arms.values() for one in arm for key in bench.MEASURES[:3]]).all()

"""What `report_to` sends, read back from the trackers themselves: the names that docs/metrics.md gives, stage by stage."""

import re
from pathlib import Path

import pytest
from small import small_recipe

from irlign.pipeline import run

EVERY = {"trainer": {"logging_steps": 1}}
METRICS = Path(__file__).parents[1] / "docs/metrics.md"
STAGES = {"sft", "reward", "optimise"}


def _recipe(root, tracker):
    return small_recipe(root, report_to=tracker, sft=EVERY, reward=EVERY, optimise={"method": "spin", **EVERY})


def _documented():
    """The names in the table of what training says, for the stages of this run."""
    rows = [line for line in METRICS.read_text(encoding="utf-8").splitlines() if "trackers" in line and line.startswith("| `")]
    assert rows and "dpo" in rows[2]
    return [re.findall(r"`([\w/]+)`", row.split(" | ")[0]) for row in rows[:3]]


def test_tensorboard(tmp_path, monkeypatch):
    """The curves lie in trackers/STAGE and outlive the checkpoints; nothing of them is an output, so no stage runs again for them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = _recipe(tmp_path / "run", "tensorboard")
    run(recipe)
    found = {}
    for folder in (tmp_path / "run/trackers").iterdir():
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        found[folder.name] = {tag.removeprefix("train/"): len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    every, trainers, preference = _documented()
    assert set(found) == STAGES and all(set(names) >= {*every, *trainers} and names["loss"] > 1 for names in found.values())
    assert set(found["optimise"]) >= set(preference) - {"kl"}  # that is kto's
    before = sorted((tmp_path / "run/trackers").rglob("*"))
    run(recipe)
    assert sorted((tmp_path / "run/trackers").rglob("*")) == before


def test_trackio(tmp_path, monkeypatch):
    """Its own local store, without a Space: the same names."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    run(_recipe(tmp_path / "run", "trackio"))
    names = set()
    for project in SQLiteStorage.get_projects():
        for one in SQLiteStorage.get_runs(project):
            names |= {key.removeprefix("train/") for row in SQLiteStorage.get_logs(project, one) for key in row}
    every, trainers, preference = _documented()
    assert names >= {*every, *trainers, *preference} - {"kl"}

"""The arena: shares by hand, a cell that goes on where it was, methods that never see the true reward."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from irlign.arena import leaderboard as board
from irlign.arena import methods
from irlign.arena.cell import BASE, Cell, Place
from irlign.arena.leaderboard import CellResult, Measured, measure, rows_named, table
from irlign.arena.page import cells_of
from irlign.arena.studies import STUDIES, run_study
from irlign.errors import ConfigError
from irlign.runs import Run

TINY = (
    ("world.name", "dialogue"),
    ("world.corpus_lines", 200),
    ("world.demonstrations", 24),
    ("world.dev_prompts", 20),
    ("world.test_prompts", 8),
    ("pretrain.hidden_size", 16),
    ("pretrain.num_hidden_layers", 1),
    ("pretrain.num_train_epochs", 1),
    ("sampling.num_generations", 4),
    ("sampling.train_generations", 2),
    ("sampling.max_new_tokens", 24),
)


def cell_of(gain: float, seed: int, top: float = 1.0) -> CellResult:
    """SFT at 1, demonstrations at 3, a method at 1 + gain after n = 2, whose best value, at n = 4, is 1 + `top`."""
    one = np.ones(40)
    curve = np.stack([one, one + gain, one + top], axis=1)
    return CellResult(
        "dialogue",
        seed,
        (1, 2, 4),
        3 * one,
        2 * one,
        5.0,
        {
            "SFT": Measured("policy", 1, one, one[:, None], 0.0, 0.0, 100.0),
            "it": Measured("learned", 2, one + gain, curve, 10.0, 2.0, 200.0, 0.5, 0.8),
        },
    )


def test_shares_are_ratios_of_sums_over_runs():
    row = table([cell_of(0.5, 0), cell_of(-0.1, 1)])[1]
    assert row["golden"]["mean"] == pytest.approx(1.2) and row["gain"]["mean"] == pytest.approx(0.2)
    assert row["gap_closed"]["mean"] == pytest.approx((0.5 - 0.1) / (2 + 2))
    assert row["of_oracle"]["mean"] == pytest.approx((0.5 - 0.1) / (1 + 1)) and row["memory"] == 200.0
    assert row["correlation"]["mean"] == 0.5 and row["accuracy"]["mean"] == 0.8
    assert row["regret"]["mean"] == pytest.approx((0.5 + 1.1) / (1 + 1))
    assert row["worst_seed"] == pytest.approx(-0.1) and row["last"] == pytest.approx(2.0) and row["n"] == [2]
    assert (row["worse"], row["worse_holm"], row["runs"]) == (1, 1, 2)
    assert table([cell_of(0.5, 0)])[0]["regret"] is None  # SFT has no curve
    assert cells_of(row)[-3] == "1 of 2 (Holm 1)" and cells_of(row)[3].startswith("10% [")


def test_settings_may_have_unlike_numbers_of_answers():
    """The curve over both runs has the points that both have, the largest n is each one's own."""
    wide = cell_of(0.5, 1)
    it = wide.methods["it"]
    wider = np.concatenate([it.curve_P_n, it.curve_P_n[:, -1:] + 1], axis=1)
    wide = replace(wide, n=(1, 2, 4, 8), methods={**wide.methods, "it": replace(it, curve_P_n=wider)})
    row = table([cell_of(0.5, 0), wide])[1]
    assert row["curve"] == pytest.approx([1, 1.5, 2]) and row["last"] == pytest.approx((2 + 3) / 2)


def test_rows_are_named_by_patterns():
    assert rows_named(None) == list(methods.METHODS)
    assert rows_named("log-ratio*") == ["initial policy", "SFT", "log-ratio", "log-ratio a token"]
    assert rows_named("three*") == ["initial policy", "SFT", "three contrasts mean", "three contrasts mean+likelihood"]
    assert rows_named("init-demo by *lower*") == ["initial policy", "SFT", "init-demo by judge (lower bound)"]
    with pytest.raises(ConfigError, match="no method is called 'magic'"):
        rows_named("init-sft,magic")


def test_every_study_names_cells_and_methods_that_exist(tmp_path):
    for study in STUDIES.values():
        rows_named(study.rows)
        names = [Place(str(tmp_path), tuple(setting.items()), 0).name for setting in study.settings]
        assert len(set(names)) == len(names)
        for setting in study.settings:
            Place(str(tmp_path), tuple(setting.items()), 0).recipe()
    with pytest.raises(ConfigError, match="no study is called 'all'"):
        run_study("all", tmp_path, quick=True, jobs=1)
    with pytest.raises(ConfigError, match="known: dialogue, heterogeneity 0"):
        run_study("reference", tmp_path, only="moon*", quick=True, jobs=1)


def test_a_cell_goes_on_where_it_was(tmp_path, monkeypatch):
    place = Place(str(tmp_path), TINY, 0)
    first = measure(place, ["initial policy", "SFT", methods.CHOSEN, "likelihood"])
    manifest = json.loads((place.folder / "manifest.json").read_text())
    again = measure(place, ["initial policy", "SFT", methods.CHOSEN, "likelihood", "init-demo"])
    after = json.loads((place.folder / "manifest.json").read_text())
    assert set(after["stages"]) - set(manifest["stages"]) == {"reward-init-demo"}
    assert all(after["stages"][name] == entry for name, entry in manifest["stages"].items())
    for name, one in first.methods.items():
        assert np.array_equal(one.curve_P_n, again.methods[name].curve_P_n), name
    assert first.n == (1, 2, 4) and len(first.demonstrations_P) == 8
    chosen = again.methods[methods.CHOSEN]
    assert chosen.curve_P_n.shape == (8, 3) and np.allclose(chosen.curve_P_n[:, 0], again.methods["SFT"].chosen_P)


def test_no_method_but_the_labelled_ones_reaches_the_true_reward(tmp_path, monkeypatch):
    """A golden reward that raises while the methods run: only those that say `labelled` ask for it."""
    place = Place(str(tmp_path), TINY, 1)
    recipe = place.recipe()

    def forbidden(*_):
        raise AssertionError("the true reward was asked for")

    with Run.open(recipe.output_dir, recipe) as run:
        cell = Cell(recipe, run)
        monkeypatch.setattr(type(recipe.world), "golden", staticmethod(forbidden))
        for name, method in methods.METHODS.items():
            if "(labels" in name:
                with pytest.raises(AssertionError, match="asked for"):
                    method(cell)
            elif not name.startswith("init-sft 4 seeds"):  # three more trainings of what was trained
                assert method(cell).what != "labelled"


def test_rows_that_want_trl_say_so_before_any_compute(tmp_path, monkeypatch):
    monkeypatch.setattr("irlign.optimise.preference.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trl is not installed"):
        run_study("labels", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_settings_that_are_the_base_share_a_cell(tmp_path):
    """Under names of their own; a setting that differs has a folder of its own."""
    place = Place(str(tmp_path), (("world.name", "dialogue"), ("world.demonstrations", 400)), 0)
    assert place.name == "dialogue, demonstrations 400" and place.folder == tmp_path / "dialogue/seed-0"
    few = Place(str(tmp_path), (("world.name", "dialogue"), ("world.demonstrations", 25)), 0)
    assert few.folder == tmp_path / "dialogue-demonstrations_25/seed-0" and few.recipe().output_dir == str(few.folder)


def test_ones_own_recipe_is_a_cell(tmp_path, monkeypatch):
    """Its keys and overrides reach the cell; without a golden reward there is nothing to compare by."""
    own = tmp_path / "own.yaml"
    own.write_text("model_name_or_path: m/small\ndataset_name: d/answers.jsonl\nsft:\n  num_train_epochs: 2\n")
    place = Place(str(tmp_path), (("sft.learning_rate", "1e-3"),), 3, config=str(own))
    recipe = place.recipe()
    assert (recipe.sft.learning_rate, recipe.sft.num_train_epochs, recipe.seed) == (1e-3, 2, 3)
    assert recipe.output_dir == str(place.folder) and place.folder == tmp_path / "small-answers/seed-3"
    monkeypatch.setattr("irlign.arena.studies.preflight", lambda recipe: None)
    with pytest.raises(ConfigError, match="the recipe has none"):
        run_study("reference", tmp_path, config=str(own))
    with pytest.raises(ConfigError, match="--quick has small cells of its own"):
        run_study("reference", tmp_path, config=str(own), quick=True)
    world = tmp_path / "world.yaml"
    world.write_text("world: dialogue\n")
    assert Place(str(tmp_path), (), 3, config=str(world)).folder == tmp_path / "world/seed-3"
    with pytest.raises(ConfigError, match="give --config"):
        run_study("reference", tmp_path, overrides=["sft.learning_rate=1"])


def test_the_table_and_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "run_cells", lambda places, rows, jobs: [cell_of(0.5, 0), cell_of(0.3, 1)])
    found = board.leaderboard([], ["SFT", "it"], 1, tmp_path, "study")
    assert found["seeds"] == [0, 1] and json.loads((tmp_path / "study.json").read_text())["all"][1]["method"] == "it"
    assert "| it | 1.40 |" in (tmp_path / "study.md").read_text()
    page = (tmp_path / "study.html").read_text()
    assert "<svg" in page and "it" in page and 'src="http' not in page and "<script" not in page


def test_sigterm_does_not_wait_for_the_cells_that_run(tmp_path):
    """Their processes end with it, and a cell says that it was interrupted where it was."""
    command = [sys.executable, "-m", "irlign", "arena", "count", "--seeds", "0,1", "--jobs", "2", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "IRLIGN_CACHE": str(tmp_path / "cache")})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (begun := [*tmp_path.glob("cells/*/*/manifest.json")]):
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    inside = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and "goes on where it stopped" in process.stderr.read()
    assert begun and inside and not any(os.path.exists(f"/proc/{pid}") for pid in inside)


def test_the_base_recipe_holds_known_keys():
    assert Place("x", (("world.name", "dialogue"),), 0).recipe().sampling.num_generations == BASE["sampling"]["num_generations"]


def test_a_method_is_measured_with_its_correlation_and_accuracy(tmp_path, monkeypatch):
    """Where the true reward is the length, length follows it (a cut answer is scored by its whole sentences); a trained reward says how often it was right; a policy says neither."""
    monkeypatch.setattr("irlign.worlds.dialogue.DialogueWorld.golden", staticmethod(lambda prompts, texts: [float(len(t)) for t in texts]))
    found = measure(Place(str(tmp_path), TINY, 0), ["SFT", "init-sft", "control: length"]).methods
    assert found["SFT"].correlation is None and found["SFT"].accuracy is None
    assert found["control: length"].correlation > 0.8 and found["control: length"].accuracy is None
    assert -1 <= found["init-sft"].correlation < 0.8 and 0 <= found["init-sft"].accuracy <= 1
    assert found["init-sft"].memory > 0 and found["init-sft"].seconds > 0

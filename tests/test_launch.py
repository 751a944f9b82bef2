"""Two gloo processes through accelerate train as one does with as many rows a step; one writes; an error is one line; nothing outlives its parent."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import small_recipe
from tiny import make_tiny_policy

from irlign.errors import ConfigError, ModelError, RunError
from irlign.files import read_json
from irlign.launch import COMMON, PRESETS, ProcessSettings, _command, launch
from irlign.policy.sft import SFTSettings, train_sft
from irlign.recipe import as_recipe
from irlign.records import Contrast, Demonstration, Prompt
from irlign.reward.learn import train_reward_of
from irlign.reward.train import RewardSettings

TWO = ProcessSettings(num_processes=2)
# The same rows a step and the same sums, added in another order: float32 rounds at 6e-8 of a value, AdamW's step is at most the
# learning rate whatever the gradient, and 8 steps of it stand between the first and the last loss.
TOLERANCE = 2e-5
WORDS = ("cat", "dog", "bird", "home")


def _demonstrations():
    """32 rows of 1 to 8 words: 4 steps of 8, none left over."""
    return [
        Demonstration(
            Prompt.of(f"the {WORDS[i % 4]} {WORDS[i // 4 % 4]} {i // 16}", "train"), " " + " ".join(["sat", WORDS[i % 4]] * (1 + i % 4))
        )
        for i in range(32)
    ]


def _settings(kind, rows, **changes):
    values = {"learning_rate": 1e-3, "num_train_epochs": 2, "warmup_steps": 0, "trainer": {"logging_steps": 1}, **changes}
    return kind(per_device_train_batch_size=rows, **values)


def _sft(folder, processes, rows, **changes):
    init = folder.parent / "init"
    if not init.exists():
        make_tiny_policy(init, seed=1)
    options = {"chat_template": "none", "folder": folder / "sft", "checkpoints": folder / "checkpoints", "seed": 3, "report_to": "none"}
    shown = _demonstrations()
    return launch(processes, train_sft, init, shown, shown[:4], _settings(SFTSettings, rows, **changes), **options)


def _file(folder, **content):
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "own.yaml")


def _weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_sft_in_two_processes_is_that_of_one(tmp_path):
    one, two = _sft(tmp_path / "one", ProcessSettings(), 8), _sft(tmp_path / "two", TWO, 4)
    assert two.pop("processes") == 2 and one["steps"] == two["steps"] == 8 and len(one["losses"]) == 8
    assert two["losses"] == pytest.approx(one["losses"], rel=TOLERANCE) and one["losses"][-1] < one["losses"][0] - 0.1
    assert two["dev_nll"]["initial"] == one["dev_nll"]["initial"] and two["dev_nll"]["sft"] == pytest.approx(
        one["dev_nll"]["sft"], rel=TOLERANCE
    )
    ours, theirs = _weights(tmp_path / "one/sft"), _weights(tmp_path / "two/sft")
    assert all(abs(ours[name] - theirs[name]).max() < 1e-4 for name in ours)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"sft", "checkpoints"}


@pytest.mark.slow
def test_a_file_of_accelerates_says_how_many(tmp_path):
    file = _file(tmp_path, num_processes=2, **COMMON, **PRESETS[None])
    one, two = _sft(tmp_path / "one", ProcessSettings(), 8), _sft(tmp_path / "two", ProcessSettings(accelerate_config=file), 4)
    assert two["processes"] == 2 and two["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)


@pytest.mark.slow
def test_rewards_in_two_processes_are_those_of_one(tmp_path):
    backbone = make_tiny_policy(tmp_path / "sft", seed=1)
    pairs = {"init-sft": [Contrast(d.prompt, d.completion, " a a bird") for d in _demonstrations()]}

    def train(name, processes, rows, **changes):
        settings = _settings(RewardSettings, rows, **changes)
        places = {"folder": tmp_path / name / "reward", "checkpoints": tmp_path / name / "checkpoints"}
        return train_reward_of(settings, backbone, pairs, pairs, chat_template="none", seed=3, processes=processes, **places)

    for kind, changes in (("plain", {}), ("members", {"members": 2})):
        one, two = train(f"one-{kind}", ProcessSettings(), 8, **changes), train(f"two-{kind}", TWO, 4, **changes)
        for ours, theirs in zip(*([log["training"]] if kind == "plain" else log["training"] for log in (one, two)), strict=True):
            assert len(ours["losses"]) == ours["steps"] and theirs["losses"][:8] == pytest.approx(ours["losses"][:8], rel=TOLERANCE)
        assert two["dev"]["margin"] == pytest.approx(one["dev"]["margin"], rel=1e-3)
        assert read_json(tmp_path / f"two-{kind}/reward/reward.json")["kind"] == ("classifier" if kind == "plain" else "ensemble")


@pytest.mark.slow
def test_what_stops_a_process_is_the_error_of_the_whole(tmp_path):
    with pytest.raises(ModelError, match="training has diverged") as error:
        _sft(tmp_path / "nan", TWO, 4, learning_rate=1e30)
    assert error.value.where == "sft" and not (tmp_path / "nan/sft").exists()
    with pytest.raises(RunError, match=r"unexpected TypeError in process \d: dumps"):
        launch(TWO, json.dumps, checkpoints=tmp_path / "bug")


def _sleep(place, *, checkpoints):
    """Says which process it is, and stays."""
    (Path(place) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(300)
    return {}


def _ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    code = "import sys; from pathlib import Path; from irlign.launch import *; import test_launch as t; "
    code += "launch(ProcessSettings(num_processes=2), t._sleep, sys.argv[1], checkpoints=Path(sys.argv[1]) / 'c')"
    reach = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": reach})
    try:
        places = [tmp_path / f"pid-{rank}" for rank in range(2)]
        _until(lambda: all(p.exists() and p.read_text() for p in places), 120)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(p.read_text()) for p in places]
    _until(lambda: all(map(_ended, pids)), 60)


def _until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_whole_run_trains_in_two_processes_and_says_so(tmp_path):
    from irlign.pipeline import run

    run(small_recipe(tmp_path / "run", processes={"num_processes": 2}))
    stages = read_json(tmp_path / "run/manifest.json")["stages"]
    assert {name for name, entry in stages.items() if "processes" in entry["settings"]} == {"sft", "reward", "optimise"}
    assert stages["sft"]["notes"]["processes"] == 2 and stages["sft"]["settings"]["processes"]["num_processes"] == 2
    assert all(entry["status"] == "complete" for entry in stages.values())
    assert read_json(tmp_path / "run/rewards/init-sft/reward.json")["training"]["steps"] > 0


def test_one_process_stays_here_and_leaves_no_mark(tmp_path):
    assert launch(ProcessSettings(), lambda a, *, checkpoints: {"here": a}, 5, checkpoints=tmp_path) == {"here": 5}
    assert ProcessSettings().identity == {} and not list(tmp_path.iterdir())


def test_the_manifest_says_how_many_and_which_file(tmp_path):
    assert TWO.identity == {"processes": {"num_processes": 2, "accelerate_config": None}}
    file = tmp_path / "own.yaml"
    file.write_text("distributed_type: FSDP\n")
    first = ProcessSettings(accelerate_config=str(file)).identity
    file.write_text("distributed_type: MULTI_GPU\n")
    assert first != ProcessSettings(accelerate_config=str(file)).identity and first["processes"]["num_processes"] == 1


def test_the_number_in_a_file_counts_everywhere(tmp_path):
    for content, given, count in (
        ({"num_processes": 2}, 1, 2),
        ({"num_processes": 2}, 2, 2),
        ({"num_processes": -1}, 3, 3),  # left open
        ({"distributed_type": "MULTI_GPU"}, 1, 1),
    ):
        processes = ProcessSettings(num_processes=given, accelerate_config=_file(tmp_path, **content))
        processes.check()
        assert processes.count == count and processes.identity["processes"]["num_processes"] == count
        assert f"--num_processes {count} " in " ".join(_command(processes, tmp_path))
    for content, said in (("num_processes: 2", "8 processes, and .*own.yaml says 2"), ("- 2", "is no configuration"), ("{", "is no conf")):
        (tmp_path / "own.yaml").write_text(content)
        with pytest.raises(ConfigError, match=said):
            ProcessSettings(num_processes=8, accelerate_config=str(tmp_path / "own.yaml")).check()


def test_a_plan_takes_the_number_from_the_file_too(tmp_path):
    from irlign.plan import planned

    def trained(**processes):
        recipe = as_recipe({"world": "dialogue", "processes": processes, "sft": {"max_steps": 10}})
        return next(stage.trained for stage in planned(recipe) if stage.name == "sft")

    assert trained(accelerate_config=_file(tmp_path, num_processes=2)) == trained(num_processes=2) > trained()


def test_a_call_that_cannot_be_told_is_an_error_here(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        launch(TWO, json.dumps, lambda: 0, checkpoints=tmp_path)


def test_a_configuration_that_cannot_serve_is_found_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("irlign.launch.has_cuda", lambda: False)
    for name, said in (("fsdp3", "no file 'fsdp3'"), ("zero3", "deepspeed is not installed"), ("fsdp2", "torch finds none here")):
        with pytest.raises(ConfigError, match=said):
            ProcessSettings(num_processes=2, accelerate_config=name).check()
    monkeypatch.setattr("irlign.launch.has_cuda", lambda: True)
    ProcessSettings(num_processes=8, accelerate_config="fsdp2").check()
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\n")
    assert not ProcessSettings(accelerate_config=str(tmp_path / "own.yaml")).sharded


def test_what_needs_the_whole_model_is_refused_where_it_is_split(monkeypatch):
    from irlign.preflight import preflight

    monkeypatch.setattr("irlign.launch.has_cuda", lambda: True)
    split = {"world": "dialogue", "processes": {"num_processes": 2, "accelerate_config": "fsdp2"}}
    for changes, where in (
        ({"reward": {"use_peft": True}}, "reward.use_peft"),
        ({"sft": {"keep_checkpoints": [0.5]}}, "sft.keep_checkpoints"),
    ):
        with pytest.raises(ConfigError, match="split over processes") as error:
            preflight(as_recipe({**split, **changes}))
        assert error.value.where == where
    preflight(as_recipe(split))


def test_the_command_line_reaches_every_stage():

    recipe = as_recipe({"world": "dialogue"}, ["--num_processes", "4", "--accelerate_config", "fsdp2"])
    assert recipe.processes == ProcessSettings(num_processes=4, accelerate_config="fsdp2")


def test_errors_cross_the_border_whole():
    error = pickle.loads(pickle.dumps(ModelError("broken", where="sft", do="mend it")))
    assert (error.what, error.where, error.do) == ("broken", "sft", "mend it")

"""kill -9 at every moment of every stage, then the same command: the result is that of the uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from killed import MOMENTS, STAGES
from small import small_recipe

from irlign.files import hash_path
from irlign.pipeline import run


def test_a_run_killed_everywhere_equals_the_uninterrupted_one(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IRLIGN_CACHE": str(tmp_path / "cache")}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(torn)))
    command = [sys.executable, str(Path(__file__).parent / "killed.py"), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    attempts = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    died = {name for name, signal_number in attempts if int(signal_number) == signal.SIGKILL}
    assert died == {f"{stage} {moment}" for stage in STAGES for moment in MOMENTS} - {"report third"}
    assert attempts[-1] == ["left alone", "0"]

    command[-1] = str(tmp_path / "whole.json")
    Path(command[-1]).write_text(json.dumps(small_recipe(whole)))
    code = "import json, sys; from irlign.pipeline import run; run(json.load(open(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, command[-1]], check=True, capture_output=True, env=environment, timeout=600)
    for name in ("data", "policies", "pools", "rewards", "best_of_n", "optimise", "evaluation/prompts.parquet"):
        assert hash_path(torn / name) == hash_path(whole / name), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (torn, whole)]
    assert all(entry["status"] == "complete" for manifest in manifests for entry in manifest["stages"].values())
    assert not list(torn.rglob("*irlign-partial")) and not (torn / ".work").exists()
    results = [json.loads((folder / "evaluation/results.json").read_text()) for folder in (torn, whole)]
    for result in results:
        del result["run"]["seconds"], result["run"]["output_dir"]
    assert results[0] == results[1]


def test_a_second_process_is_refused(tmp_path):
    from irlign.errors import RunError
    from irlign.runs import Run

    with Run.open(tmp_path / "run", small_recipe(tmp_path / "run")):
        try:
            run(small_recipe(tmp_path / "run"))
        except RunError as error:
            assert f"pid {os.getpid()}" in str(error)
        else:
            raise AssertionError("the second was let in")

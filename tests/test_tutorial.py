"""The tutorial's commands, run as they stand on the page; only the model is smaller, and the guards that it cannot pass are off."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import small_recipe

from irlign.cli import main

pytestmark = pytest.mark.slow  # 17 s of a core

DOCS = Path(__file__).parents[1] / "docs"
SMALLER = ["sampling.max_cut_share=1", "reward.max_leak_accuracy=1", "sampling.num_generations=4", "evaluation.resamples=200"]
SMALLER += [f"{stage}.num_train_epochs=1" for stage in ("sft", "reward", "optimise")]


def _commands() -> list[str]:
    """Line for line; a block with a here-document as a whole."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.M | re.S)
    return [command for block in blocks for command in ([block] if "<<" in block else block.splitlines())]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """A folder in which every command of the page has run."""
    folder, home = tmp_path_factory.mktemp("tutorial"), os.getcwd()
    (folder / "recipes").mkdir()
    (folder / "recipes/quickstart.yaml").write_text(yaml.safe_dump(small_recipe("set on the page")))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    os.chdir(folder)
    try:
        for command in _commands():
            if not command.startswith("irlign "):
                subprocess.run(["bash", "-ec", command], check=True, env=environment, capture_output=True)
                continue
            with pytest.raises(SystemExit) as exit_:
                main([*shlex.split(command)[1:], *(SMALLER if command.startswith("irlign init ") else [])])
            assert not exit_.value.code, command
    finally:
        os.chdir(home)
    return folder


def test_the_page_keeps_its_promises(walked):
    assert len(_commands()) == 13
    assert len((walked / "scored.jsonl").read_text().splitlines()) == 3
    choices = [json.loads((walked / f"runs/{run}/best_of_n/choice.json").read_text())["reward"] for run in ("tutorial", "mine")]
    assert choices[0] == "init-sft" and choices[1] in ("init-sft+likelihood", "likelihood")
    results = {run: json.loads((walked / f"runs/{run}/evaluation/results.json").read_text()) for run in ("tutorial", "mine")}
    assert results["tutorial"]["golden"] and results["mine"]["golden"] is None
    for run in ("tutorial", "mine"):
        assert (walked / f"runs/{run}/report.html").is_file() and (walked / f"runs/{run}/policies/aligned/config.json").is_file()


def _keys(of: dict, deeper: tuple[str, ...] = ()) -> set[str]:
    return {*of, *(key for name in deeper if isinstance(of.get(name), dict) for key in of[name])}


def test_every_key_of_results_stands_on_the_page_of_metrics(walked):
    known = set(re.findall(r"`([^`]+)`", (DOCS / "metrics.md").read_text(encoding="utf-8")))
    results = json.loads((walked / "runs/tutorial/evaluation/results.json").read_text())
    found = _keys(results, ("golden", "heldout", "choice", "optimise", "curve", "run")) | _keys(
        results["heldout"]["reward"], ("controls", "dev")
    )
    found |= {key for test in results["tests"] for key in test} | {key for alarm in results["alarms"] for key in alarm}
    found |= {key for one in results["optimise"]["candidates"].values() for key in _keys(one, ("training",))} | _keys(
        results["curve"]["gao"] or {}
    )
    assert found - known == set()

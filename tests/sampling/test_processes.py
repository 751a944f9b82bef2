"""Several processes of this machine: the bytes of one, scores as of one, errors in one line, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import WORDS, to_score
from tiny import make_tiny_policy

from irlign.config import load_recipe
from irlign.errors import ConfigError, DataError, RunError
from irlign.recipe import Recipe
from irlign.records import Prompt
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool
from irlign.sampling.processes import Processes

WANTED = [(Prompt.of(f"{a} {b}", "train"), 3) for a in WORDS for b in WORDS[:2]]  # 20 prompts, 5 parts
HERE = Path(__file__)


@pytest.fixture(autouse=True)
def reach(monkeypatch):
    """The processes find these tests, and have one thread as this one has."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, HERE.parents[:2]), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _draw(policy, folder, processes):
    settings = SamplingSettings(part_prompts=4, max_new_tokens=8, batch_size=4, num_workers=processes)
    return draw_pool(policy, WANTED, settings, chat_template="none", folder=folder, seed=7, name="sft")


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def test_two_processes_give_the_bytes_of_one(tmp_path):
    policy = make_tiny_policy(tmp_path / "sft", seed=3)
    whole = _draw(policy, tmp_path / "whole", 1)
    assert _draw(policy, tmp_path / "spread", 2) == whole
    assert _bytes(tmp_path / "spread") == _bytes(tmp_path / "whole") and len(_bytes(tmp_path / "whole")) == 5
    (tmp_path / "spread/part-00003.parquet").unlink()  # what is left of an interrupted draw, gone on with in one process and in three
    assert _draw(policy, tmp_path / "spread", 1) == whole and _bytes(tmp_path / "spread") == _bytes(tmp_path / "whole")
    (tmp_path / "spread/part-00000.parquet").unlink()
    assert _draw(policy, tmp_path / "spread", 3) == whole and _bytes(tmp_path / "spread") == _bytes(tmp_path / "whole")


def test_scores_are_those_of_one_process_to_the_last_digit(tmp_path, monkeypatch):
    from irlign.data import batches
    from irlign.optimise.scoring import scores_of

    rewards, prompts, answers = to_score(tmp_path)
    monkeypatch.setattr(batches, "BLOCK", 30)
    here = scores_of(rewards, prompts, answers, SamplingSettings(), tmp_path / "none")
    there = scores_of(rewards, prompts, answers, SamplingSettings(num_workers=2), tmp_path / "kept")
    assert all(np.array_equal(here[name], there[name]) for name in rewards) and len(list((tmp_path / "kept").iterdir())) == 4


def _doing(kind, told):
    """What a process loads: its work doubles a shard, beside what the first process told, or fails at the shard 3."""

    def work(shard):
        if shard == 3 and kind == "own":
            raise DataError("no good", where="prompt 3", do="leave it out")
        if shard == 3 and kind == "bug":
            raise ValueError("a bug")
        if shard == 3 and kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "dies as it answers":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return b"more than the line between them holds" * 10**6
        return 2 * shard, told, os.environ["OMP_NUM_THREADS"]

    if kind == "loads not":
        raise ConfigError("no engine 'x'", where="sampling.engine")
    return work, told or f"settled by {os.getpid()}"


def test_what_the_first_settles_on_holds_for_all():
    with Processes(2, partial(_doing, "well"), "test") as processes:
        found = dict(processes.work({n: 10 + n for n in range(6)}))
        again = dict(processes.work({7: 1}))
        ids = [worker.process.pid for worker in processes.workers]
    assert {n: found[n][0] for n in found} == {n: 20 + 2 * n for n in range(6)} and again[7][0] == 2
    assert {told for _, told, _ in found.values()} <= {None, f"settled by {ids[0]}"} and {threads for *_, threads in found.values()} == {
        "1"
    }
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("own", DataError, "prompt 3: no good\n  leave it out"),
        ("bug", RunError, "unexpected ValueError in a process: a bug"),
        ("dies", RunError, "test: a process was lost: killed by SIGKILL"),
        ("loads not", ConfigError, "no engine 'x'"),
    ],
)
def test_an_error_in_a_process_is_one_line_here(kind, error, words):
    with pytest.raises(error) as found, Processes(2, partial(_doing, kind), "test") as processes:
        list(processes.work({n: n for n in range(6)}))
    assert words in str(found.value)
    assert kind != "bug" or 'raise ValueError("a bug")' in found.value.__notes__[0]  # which --debug shows


def test_a_process_that_is_lost_in_the_middle_of_its_answer(tmp_path):
    with Processes(1, partial(_doing, "dies as it answers"), "test") as processes:
        worker = processes.workers[0]
        worker.send(1)
        worker.process.wait(60)  # the beginning of its answer is on the line
        with pytest.raises(RunError, match="test: a process was lost: killed by SIGKILL"):
            worker.receive()


def test_no_more_processes_share_the_memory_than_there_are_parts(tmp_path, monkeypatch):
    policy = make_tiny_policy(tmp_path / "sft", seed=3)
    monkeypatch.setattr("irlign.sampling.transformers_engine.free_memory", lambda kind: 2**19)
    settings = SamplingSettings(max_new_tokens=8, num_workers=1000)  # all prompts are one part, which this process draws
    many, one = (
        draw_pool(policy, WANTED, s, chat_template="none", folder=tmp_path / str(s.num_workers), seed=7, name="sft")
        for s in (settings, settings.model_copy(update={"num_workers": 1}))
    )
    assert many == one and one["settled"]["batch_tokens"] > 8
    assert _bytes(tmp_path / "1000") == _bytes(tmp_path / "1")


def test_a_parent_that_is_killed_leaves_no_process(tmp_path):
    script = tmp_path / "parent.py"  # without a guard for __main__: the processes do not run it
    script.write_text(
        "import functools, time, test_processes\n"
        "from irlign.sampling.processes import Processes\n"
        "with Processes(2, functools.partial(test_processes._doing, 'well'), 'test') as processes:\n"
        "    print(*[worker.process.pid for worker in processes.workers], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        ids = parent.stdout.readline().split()
        parent.kill()
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in ids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ids) == 2 and not any(_lives(pid) for pid in ids)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("engine", ["openai", "cluster"])
def test_an_engine_that_is_spread_by_itself_takes_no_workers(engine):
    with pytest.raises(ConfigError, match=f"engine={engine} is spread in a way of its own"):
        load_recipe(Recipe, {"world": "dialogue"}, [f"sampling.engine={engine}", "sampling.num_workers=2"])


def test_processes_are_no_part_of_what_samples_depend_on():
    assert SamplingSettings(num_workers=4).identity == SamplingSettings().identity

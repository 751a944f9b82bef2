"""Full disks, closed doors, damaged and vanished files, odd clocks, second hosts: one clear error or the same result, and the rest intact."""

import errno
import json
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from small import small_recipe

from irlign import pipeline
from irlign.errors import ModelError, RunError
from irlign.files import hash_path, read_json, read_table
from irlign.pipeline import run_stage
from irlign.policy.load import load_policy
from irlign.reward.load import load_reward
from irlign.runs import Run
from irlign.serve import Wanted
from irlign.serving.load import load_answerer

REWARD = "rewards/init-sft"
MADE = {  # a file and the stage that publishes it
    "data/train.parquet": "data",
    "policies/init/model.safetensors": "pretrain",
    "policies/sft/model.safetensors": "sft",
    "policies/sft/tokenizer.json": "sft",
    "pools/sft.parquet/part-00000.parquet": "sample",
    f"{REWARD}/model.safetensors": "reward",
    f"{REWARD}/reward.json": "reward",
    "best_of_n/candidates.parquet": "bon",
    "best_of_n/choice.json": "bon",
    "evaluation/results.json": "eval",
    "report.html": "report",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "run"
    pipeline.run(small_recipe(folder, optimise={"method": "none"}))
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def small_disk(finished, tmp_path):
    """The run on a file system of its own, of 32 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield Path(shutil.copytree(finished, place / "run"))
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # weights that were read stay mapped


def _recipe(folder: Path) -> dict:
    return small_recipe(folder, optimise={"method": "none"})


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of every published file."""
    return {p.relative_to(folder).as_posix(): hash_path(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.parent != folder}


def _flip(path: Path, place: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 1 << bit
    path.write_bytes(bytes(raw))


def _damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        _flip(path, path.stat().st_size // 2, 3)
    elif how == "gone":
        path.unlink()


@pytest.mark.parametrize("room", [0, 40_000, 80_000])
@pytest.mark.parametrize("stage", ["sft", "sample"])
def test_a_full_disk_is_one_error_and_then_goes_on(small_disk, finished, stage, room):
    """The file system itself says that it is full: before the stage has begun, while it works, or when it publishes."""
    before = _hashes(small_disk)
    for output in read_json(small_disk / "manifest.json")["stages"][stage]["outputs"]:
        shutil.rmtree(small_disk / output)
    kept = _hashes(small_disk)
    full = small_disk.parent / "full"
    with full.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * (1 << 16)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(full, full.stat().st_size - room)
    with pytest.raises(RunError, match="no space left on the disk") as caught:
        run_stage(stage, _recipe(small_disk))
    assert "free some space and run the same command again" in str(caught.value)
    assert {path: value for path, value in _hashes(small_disk).items() if not path.startswith(".work")} == kept
    full.unlink()
    run_stage(stage, _recipe(small_disk))
    assert _hashes(small_disk) == before


def test_a_read_only_disk_can_be_read(small_disk):
    """Nothing is written: a run is refused in words, and what only reads it works."""
    place = small_disk.parent
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(RunError, match="cannot be used: read-only file system") as caught:
        pipeline.run(_recipe(small_disk))
    assert "output_dir that you can write to" in str(caught.value)
    assert Run.read(small_disk).stages["report"]["status"] == "complete"
    assert len(load_reward(small_disk / REWARD).score(["How do I fix my bike?"], ["With care."])) == 1


def _as_nobody(work) -> str:
    """What `work` raises in a fork that root's privileges do not help."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was raised"
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as stream:
        return stream.read()


def test_permission_denied(finished):
    place = Path(tempfile.mkdtemp())
    try:
        run = Path(shutil.copytree(finished, place / "run"))
        for folder, mode in ((place, 0o555), (run, 0o555)):
            folder.chmod(mode)
        for path in (*run.glob("*"), run / ".lock"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for target in (run, place / "another"):
            said = _as_nobody(lambda target=target: Run.open(target, {"seed": 0}))
            assert said.startswith("RunError") and "permission denied" in said and "output_dir that you can write to" in said
        run.chmod(0)
        said = _as_nobody(lambda: Run.open(run, {"seed": 0}))
        assert said.startswith("RunError") and "permission denied" in said
    finally:
        for path in (place, run):
            path.chmod(0o755)
        shutil.rmtree(place)


class Again(Exception):
    """A stage was about to run again."""


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_every_damaged_file_is_noticed_by_the_stage_that_makes_it(copied, monkeypatch, how):
    """One bit is enough; nothing of the others runs again first."""

    def again(self, name, entry):
        raise Again(name)

    monkeypatch.setattr(Run, "_work", again)
    for file, stage in MADE.items():
        whole = (copied / file).read_bytes()
        _damage(copied / file, how)
        with pytest.raises(Again) as caught:
            pipeline.run(_recipe(copied))
        assert str(caught.value) == stage, file
        (copied / file).write_bytes(whole)


def test_what_was_damaged_is_made_again_and_is_the_same(copied):
    whole = _hashes(copied)
    _damage(copied / "data/dev.parquet", "flipped")
    _damage(copied / "policies/sft/model.safetensors", "truncated")
    shutil.rmtree(copied / "best_of_n")
    pipeline.run(_recipe(copied))
    now = _hashes(copied)
    assert set(now) == set(whole)
    assert {path for path in whole if now[path] != whole[path]} <= {"evaluation/results.json"}  # it tells the seconds


def test_readers_of_damaged_files_say_so(copied):
    """Where no stage stands between a file and its reader. Weights that load although a bit is wrong are found by their hash."""
    for file, read, kind in (
        ("data/train.parquet", lambda: read_table(copied / "data/train.parquet"), RunError),
        ("best_of_n/choice.json", lambda: read_json(copied / "best_of_n/choice.json"), RunError),
        ("policies/sft/model.safetensors", lambda: load_policy(str(copied / "policies/sft")), ModelError),
        (f"{REWARD}/model.safetensors", lambda: load_reward(copied / REWARD).score(["x"], ["y"]), ModelError),
        (f"{REWARD}/reward.json", lambda: load_reward(copied / REWARD), RunError),
    ):
        whole = (copied / file).read_bytes()
        _damage(copied / file, "truncated")
        with pytest.raises(kind):
            read()
        (copied / file).write_bytes(whole)
    load_answerer(copied, Wanted(policy="best-of-n"))
    for file in ("policies/sft/model.safetensors", f"{REWARD}/model.safetensors"):
        whole = (copied / file).read_bytes()
        _damage(copied / file, "flipped")
        with pytest.raises(RunError, match="is damaged, or was changed since the stage"):
            load_answerer(copied, Wanted(policy="best-of-n"))
        (copied / file).write_bytes(whole)


def test_a_file_that_vanishes_between_two_stages(copied, monkeypatch):
    """In the middle of a run: an error that says which and what to do; the same command then makes it again."""
    whole, sample = _hashes(copied), pipeline.STAGES["sample"]

    def vanishing(recipe, run):
        sample(recipe, run)
        shutil.rmtree(copied / "pools/init.parquet")

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "sample", vanishing)
        with pytest.raises(RunError, match=r"pools/init\.parquet is missing") as caught:
            pipeline.run(_recipe(copied))
    assert "run the stage that makes it first" in str(caught.value)
    pipeline.run(_recipe(copied))
    assert _hashes(copied) == whole


def test_a_manifest_with_any_byte_wrong_is_taken_or_refused(copied):
    """Each of 600 seeded flips: the run is read, or one error says that the manifest is damaged."""
    rng, path, refused = random.Random(100), copied / "manifest.json", 0
    whole = path.read_bytes()
    for _ in range(600):
        _flip(path, rng.randrange(len(whole)), rng.randrange(8))
        try:
            Run.read(copied)
        except RunError as error:
            assert "damaged" in str(error)
            refused += 1
        path.write_bytes(whole)
    assert 0 < refused < 600


@pytest.mark.parametrize("output", ["../precious", "/precious", "a/../../precious", ".", ""])
def test_a_manifest_leads_nowhere_else(tmp_path, output):
    """Outputs that a stage no longer names are removed: never what lies outside of the run, whatever the manifest says."""
    with Run.open(tmp_path / "run", {"seed": 0}) as run:
        run.do("a", lambda folder: (folder / "x").write_text("x") and None, outputs=["x"])
    (tmp_path / "precious").write_text("x")
    path = tmp_path / "run/manifest.json"
    stored = read_json(path)
    stored["stages"]["a"]["outputs"][output] = "0" * 64
    path.write_text(json.dumps(stored))
    with pytest.raises(RunError, match="the manifest is damaged"):
        Run.open(tmp_path / "run", {"seed": 0})
    assert (tmp_path / "precious").read_text() == "x" and (tmp_path / "run/x").exists()


@pytest.mark.parametrize("moment", [1, 4_000_000_000])
def test_a_clock_that_jumped_changes_nothing(copied, monkeypatch, moment):
    """All files date from 1970, or from the year 2096, and so does the clock."""

    def never(self, name, entry):
        raise AssertionError(f"{name} ran again")

    for path in copied.rglob("*"):
        os.utime(path, (moment, moment))
    monkeypatch.setattr("time.time", lambda: float(moment))
    monkeypatch.setattr(Run, "_work", never)
    pipeline.run(_recipe(copied))


def test_a_second_host_is_refused_by_name(tmp_path):
    """The lock is the file system's, so it holds between hosts that share it; its file tells who has it."""
    with Run.open(tmp_path, {"seed": 0}) as run:
        (tmp_path / ".lock").write_text("4711 on another-host")
        with pytest.raises(RunError, match=r"in use by another process \(pid 4711 on another-host\)"):
            Run.open(tmp_path, {"seed": 0})
        assert run.do("a", lambda folder: (folder / "x").write_text("x") and None, outputs=["x"])
    assert not run.path(".work").exists()


def test_a_file_system_without_locks_is_no_second_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RunError, match="its file system knows no locks: No locks available"):
        Run.open(tmp_path / "run", {"seed": 0})

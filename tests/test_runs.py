"""The run directory: skip, rerun with a reason, publish whole or not at all, resume, refuse."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import yaml
from safetensors import SafetensorError

from irlign import progress, runs
from irlign.errors import ModelError, RunError
from irlign.files import disk_errors, write_rows
from irlign.runs import Run, request_seed


@pytest.fixture
def said(monkeypatch):
    """What a run tells its user."""
    lines: list[str] = []
    monkeypatch.setattr(runs, "say", lines.append)
    return lines


def _write(name, text):
    def build(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return {"characters": len(text)}

    return build


def _open(folder, seed=0):
    return Run.open(folder, {"seed": seed})


def _never(folder):
    raise AssertionError("this stage was to be skipped")


def test_a_finished_stage_is_skipped(tmp_path, said):
    with _open(tmp_path / "run") as run:
        assert run.do("a", _write("out/x", "one"), {"rate": 1}, outputs=["out"])
    with _open(tmp_path / "run") as run:
        assert not run.do("a", _never, {"rate": 1}, outputs=["out"])
    assert said == ["a: complete, nothing has changed"]
    entry = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["a"]
    assert (entry["status"], entry["notes"], entry["seed"]) == ("complete", {"characters": 3}, 0)
    assert (tmp_path / "run/out/x").read_text() == "one" and not (tmp_path / "run/.work").exists()
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()) == {"seed": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"rate": 2, "deep": {"k": 1}}}, "rate 1 -> 2"),
        ({"settings": {"rate": 1, "deep": {"k": 5}}}, "deep.k 1 -> 5"),
        ({"settings": {"rate": 1, "deep": {"k": 1}, "new": True}}, "new none -> True"),
        ({"seed": 7}, "seed 0 -> 7"),
        ({"outside": "changed"}, "has changed"),
        ({"inputs": {}}, "input file is gone"),
        ({"outputs": ["out", "more"]}, "output more is new"),
        ({"damage": "edit"}, "output out was changed since"),
        ({"damage": "remove"}, "output out was removed since"),
    ],
)
def test_every_reason_to_run_again_is_said(tmp_path, said, change, reason):
    outside = tmp_path / "outside.txt"
    outside.write_text("as it was")
    settings, inputs, outputs = {"rate": 1, "deep": {"k": 1}}, {"file": str(outside)}, ["out"]

    def build(folder):
        for name in change.get("outputs", outputs):
            _write(f"{name}/x", "one")(folder)

    with _open(tmp_path / "run") as run:
        run.do("a", _write("out/x", "one"), settings, inputs, outputs)
    outside.write_text(change.get("outside", "as it was"))
    if change.get("damage") == "edit":
        (tmp_path / "run/out/x").write_text("two")
    if change.get("damage") == "remove":
        (tmp_path / "run/out/x").unlink()
        (tmp_path / "run/out").rmdir()
    with _open(tmp_path / "run", change.get("seed", 0)) as run:
        assert run.do("a", build, change.get("settings", settings), change.get("inputs", inputs), change.get("outputs", outputs))
    assert len(said) == 1 and said[0].startswith("a: ") and reason in said[0] and said[0].endswith(", so it runs again")


def test_a_changed_stage_takes_what_follows_with_it(tmp_path, said):
    for text in ("one", "two"):
        with _open(tmp_path / "run") as run:
            first = run.do("a", _write("a/x", text), {"text": text}, outputs=["a"])
            second = run.do("b", _write("b/x", "b" + text), inputs={"a": "a"}, outputs=["b"])
            assert (first, second) == (True, True)
    assert said[-1] == "b: input a has changed, so it runs again"


def test_a_same_output_leaves_the_rest_alone(tmp_path):
    for rate in (1, 2):
        with _open(tmp_path / "run") as run:
            assert run.do("a", _write("a/x", "same"), {"rate": rate}, outputs=["a"])
            assert run.do("b", _write("b/x", "b"), inputs={"a": "a"}, outputs=["b"]) == (rate == 1)


def test_a_failed_stage_leaves_what_was_published(tmp_path):
    def fails(folder):
        _write("a/x", "half")(folder)
        raise ValueError("no\nsecond line")

    with _open(tmp_path / "run") as run:
        run.do("a", _write("a/x", "whole"), {"rate": 1}, outputs=["a"])
        with pytest.raises(ValueError):
            run.do("a", fails, {"rate": 2}, outputs=["a"])
        assert run.path("a/x").read_text() == "whole"
        assert (run.stages["a"]["status"], run.stages["a"]["error"]) == ("failed", "no")
        with pytest.raises(RunError, match="the stage a is failed"):
            run.do("b", _never, inputs={"a": "a"}, outputs=["b"])


def test_an_interrupted_attempt_finds_its_folder_again_only_for_the_same_work(tmp_path):
    def stops(folder):
        _write("a/part", "half")(folder)
        raise KeyboardInterrupt

    def goes_on(folder):
        seen.append((folder / "a/part").exists())
        _write("a/part", "whole")(folder)

    seen: list[bool] = []
    for settings, found in (({"rate": 1}, True), ({"rate": 2}, False)):
        folder = tmp_path / str(found)
        with _open(folder) as run:
            with pytest.raises(KeyboardInterrupt):
                run.do("a", stops, {"rate": 1}, outputs=["a"])
            assert run.stages["a"]["status"] == "interrupted"
        with _open(folder) as run:
            run.do("a", goes_on, settings, outputs=["a"])
        assert seen[-1] is found


def test_an_interruption_counts_as_one_where_a_library_made_another_error_of_it(tmp_path):
    def stops(folder):
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("nothing to undo")

    with _open(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="nothing to undo"):
            run.do("a", stops, outputs=["a"])
        assert run.stages["a"]["status"] == "interrupted" and "error" not in run.stages["a"]


def test_an_output_that_is_not_written_is_an_error(tmp_path):
    with _open(tmp_path / "run") as run, pytest.raises(RunError, match="did not write b"):
        run.do("a", _write("a", "x"), outputs=["a", "b"])


def test_outputs_no_longer_named_go_away(tmp_path):
    with _open(tmp_path / "run") as run:
        run.do("a", _write("rewards/old", "x"), {"name": "old"}, outputs=["rewards/old"])
        run.do("a", _write("rewards/new", "x"), {"name": "new"}, outputs=["rewards/new"])
        assert not run.path("rewards/old").exists() and run.path("rewards/new").exists()


def test_a_missing_input_says_which_stage_to_run(tmp_path):
    with _open(tmp_path / "run") as run, pytest.raises(RunError, match="pools is missing") as caught:
        run.do("a", _never, inputs={"pools": "pools"}, outputs=["a"])
    assert "run the stage that makes it first" in str(caught.value)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from irlign.runs import Run
    calls, replace = 0, os.replace
    def counted(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
    def build(text):
        def write(folder):
            for name in ("a", "b"):
                (folder / name).mkdir(exist_ok=True)
                (folder / name / "x").write_text(text + name)
        return write
    os.replace = counted
    with Run.open(sys.argv[1], {"seed": 0}) as run:
        run.do("stage", build(sys.argv[3]), {"text": sys.argv[3]}, outputs=["a", "b"])
    print("end", calls)
    """
)


def _attempt(folder, at, text):
    return subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at), text], capture_output=True, text=True)


def test_killed_at_any_rename_the_next_run_makes_it_whole(tmp_path):
    assert _attempt(tmp_path / "whole", 0, "old").returncode == 0
    count = int(_attempt(tmp_path / "count", 0, "old").stdout.split()[-1])
    assert count >= 6
    for at in range(1, count + 3):
        folder = tmp_path / str(at)
        assert _attempt(folder, 0, "old").returncode == 0
        killed = _attempt(folder, at, "new").returncode
        assert killed in (-9, 0)
        either = {(folder / name / "x").read_text() for name in "ab" if (folder / name / "x").exists()}
        assert either <= {"olda", "oldb", "newa", "newb"}  # never half a file
        with _open(folder) as run:
            run.do("stage", lambda f: [_write(f"{n}/x", "new" + n)(f) for n in "ab"] and None, {"text": "new"}, outputs=["a", "b"])
        assert [(folder / name / "x").read_text() for name in "ab"] == ["newa", "newb"]
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "a", "b", "manifest.json", "recipe.yaml"]


def test_the_second_process_is_refused(tmp_path):
    with _open(tmp_path / "run"), pytest.raises(RunError, match=f"in use by another process .pid {os.getpid()}."):
        _open(tmp_path / "run")
    with _open(tmp_path / "run"):
        pass


def test_what_no_run_made_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious").write_text("x")
    with pytest.raises(RunError, match="holds data, and no manifest"):
        _open(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_disk_errors_in_words(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with _open(tmp_path / "run") as run, pytest.raises(RunError, match="no space left on the disk"):
        run.do("a", full, outputs=["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not a directory"):
        _open(tmp_path / "file/run")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left on the disk"),
        (Exception("No space left on device (os error 28)"), "no space left on the disk"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "no space left on the disk"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "cannot be used: permission denied"),
    ],
)
def test_disk_errors_that_are_no_oserror(tmp_path, error, message):
    """As safetensors, tokenizers and torch raised them on a full file system."""

    def build(folder):
        raise error

    with _open(tmp_path / "run") as run, pytest.raises(RunError, match=message) as caught:
        run.do("a", build, outputs=["a"])
    assert caught.value.__cause__ is error and "stage a" in str(caught.value)


def test_other_errors_pass(tmp_path):
    for error in (ModelError("it holds os error 28"), FileNotFoundError(errno.ENOENT, "the user's file"), ValueError("3")):
        with pytest.raises(type(error)), disk_errors(tmp_path, "a"):
            raise error
    with pytest.raises(RunError, match="no such file or directory"), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")


def test_rows_as_json_lines(tmp_path):
    rows = [
        {"prompt": "a\nb\u2028é", "completion": "\ud800 x", "reward": 0.1},
        {"prompt": [{"role": "user", "content": "é"}], "reward": -2.0},
    ]
    write_rows(tmp_path / "best_of_n/selected.jsonl", rows)
    raw = (tmp_path / "best_of_n/selected.jsonl").read_bytes()
    assert [json.loads(line) for line in raw.decode("utf-8").rstrip("\n").split("\n")] == rows
    assert "é".encode() in raw


def test_a_damaged_manifest_is_one_clear_error(tmp_path):
    with _open(tmp_path / "run") as run:
        run.do("a", _write("a", "x"), outputs=["a"])
    for damage in ("{", "[]", '{"stages": 3}'):
        (tmp_path / "run/manifest.json").write_text(damage)
        with pytest.raises(RunError, match="damaged"):
            _open(tmp_path / "run")


def test_a_run_is_read_without_a_lock(tmp_path):
    with _open(tmp_path / "run") as run:
        run.do("a", _write("a", "x"), outputs=["a"])
        other = Run.read(tmp_path / "run")
        assert other.stages["a"]["status"] == "complete"
        with pytest.raises(RunError, match="opened to be read"):
            other.do("a", _never, outputs=["a"])
    with pytest.raises(RunError, match="no run directory"):
        Run.read(tmp_path)


def test_request_seeds_differ_in_every_part():
    seeds = {request_seed(*key) for key in ((0, "s", "p", 0), (1, "s", "p", 0), (0, "t", "p", 0), (0, "s", "q", 0), (0, "s", "p", 1))}
    assert len(seeds) == 5 and all(0 <= seed < 2**64 for seed in seeds)
    assert request_seed(0, "s", "p", 0) == request_seed(0, "s", "p", 0)


def test_progress_in_words(capsys, monkeypatch):
    monkeypatch.setenv("IRLIGN_QUIET", "0")
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with progress.Progress("sft", 4, "steps") as bar:
        bar.advance(1, "loss 1.2")
        assert bar.line().startswith("sft: 1/4 steps") and bar.line().endswith("loss 1.2")
        bar.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("sft: 4 steps in ") and lines[-1].endswith("loss 1.2")
    assert progress.clock(59.6) == "1:00" and progress.clock(3725) == "1:02:05"
    monkeypatch.setenv("IRLIGN_QUIET", "1")
    progress.say("nothing")
    assert capsys.readouterr().err == ""


def test_the_time_left_where_slow_things_end_in_pairs(monkeypatch):
    """Two at a time, 100 s each pair, the second a second after the first: 50 s each; of quick things only the last half minute counts."""
    times = iter([0.0, 0.0, *(t for pair in range(1, 6) for t in (100.0 * pair, 100.0 * pair + 1))])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    monkeypatch.setenv("IRLIGN_QUIET", "1")
    bar = progress.Progress("arena", 40, "cells").__enter__()
    bar.advance()
    bar.advance()
    assert bar.line() == "arena: 2/40 cells, 50.5 s each, 31:59 left"
    for _ in range(8):
        bar.advance()
    assert bar.line() == "arena: 10/40 cells, 50.0 s each, 25:00 left"
    times = iter([0.0, 0.0, *(10.0 if step <= 100 else 10.0 + step - 100 for step in range(1, 201))])
    bar = progress.Progress("sft", 400, "steps").__enter__()
    for _ in range(200):
        bar.advance()
    assert bar.rate() == 1.0


def test_what_stands_is_known_while_an_attempt_to_replace_it_has_failed(tmp_path, said):
    """The old settings are up to date again, without any work; others are tried again."""

    def fails(folder):
        raise ModelError("diverged")

    with _open(tmp_path) as run:
        run.do("a", _write("out/x", "one"), {"rate": 1}, outputs=["out"])
        whole = run.stages["a"]
        for _ in range(2):
            with pytest.raises(ModelError):
                run.do("a", fails, {"rate": 9}, outputs=["out"])
            assert run.stages["a"]["status"] == "failed" and run.stages["a"]["stands"] == whole
        assert said[-1] == "a: it failed, so it runs again"
    with _open(tmp_path) as run:
        assert not run.do("a", _never, {"rate": 1}, outputs=["out"]) and run.stages["a"] == whole and not (tmp_path / ".work/a").exists()
        with pytest.raises(ModelError):
            run.do("a", fails, {"rate": 9}, outputs=["out"])
        assert run.do("a", _write("out/x", "two"), {"rate": 2}, outputs=["out"]) and "stands" not in run.stages["a"]


def test_a_stage_is_out_of_date_where_what_it_used_was_made_anew(tmp_path):
    def fails(folder):
        raise ModelError("diverged")

    with _open(tmp_path) as run:
        run.do("a", _write("out/x", "one"), {"rate": 1}, outputs=["out"])
        run.do("b", _write("page", "of one"), inputs={"out": "out"}, outputs=["page"])
        assert run.outdated("b") is None and run.outdated("a") is None and run.outdated("c") is None
        with pytest.raises(ModelError):
            run.do("a", fails, {"rate": 9}, outputs=["out"])
        assert run.outdated("b") is None  # nothing was replaced
        run.do("a", _write("out/x", "one"), {"rate": 2}, outputs=["out"])
        assert run.outdated("b") is None  # the same once more
        run.do("c", _write("last", "of b"), inputs={"page": "page"}, outputs=["last"])
        run.do("a", _write("out/x", "two"), {"rate": 3}, outputs=["out"])
        assert run.outdated("b") == run.outdated("c") == "a"  # by way of b too
        with pytest.raises(ModelError):
            run.do("b", fails, inputs={"out": "out"}, outputs=["page"])
        assert run.outdated("b") == "a"  # its page is still that of the first
        run.do("b", _write("page", "of two"), inputs={"out": "out"}, outputs=["page"])
        assert run.outdated("b") is None
        run.do("a", lambda folder: None)  # takes back what it had published
        assert run.outdated("b") == "b"

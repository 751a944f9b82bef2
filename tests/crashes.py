"""The crash matrix: every stage and every policy method killed at seeded moments, then run again.

    python tests/crashes.py [--kills 20] [--method-kills 5] [--only sft,dpo] [--seed 100]

torch is imported once and each attempt is a fork, which starts from a copied run directory in which the earlier stages are done. Half of
the kills (SIGKILL) come at a seeded moment of the stage's time, half right before a seeded one of the calls that change the file system
(rename, make, remove, sync); one attempt more ends by SIGTERM and one by Ctrl-C. The directory is then copied to another path and the same
stage is run again: its end has to equal the uninterrupted one file by file, no file may be left over beside it, and no more than one part
of the work may have been done twice: the training steps between two checkpoints, the answers of one part of a pool.
"""

import argparse
import collections
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(IRLIGN_QUIET="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import torch
import transformers
import trl.trainer.dpo_trainer
import trl.trainer.grpo_trainer
import trl.trainer.kto_trainer
import trl.trainer.rloo_trainer  # noqa: F401 -- all of it imported once, before the forks
from small import small_recipe

import irlign.pipeline
from irlign.cli import main
from irlign.files import hash_path, read_json
from irlign.sampling.transformers_engine import TransformersEngine

STAGES = ("pretrain", "data", "sft", "sample", "reward", "bon", "optimise", "eval", "report")
METHODS = ("distill", "weighted-sft", "dpo", "spin", "ditto", "kto", "gsil", "rloo", "grpo", "rlsr", "gad")
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "fsync")
STEPS = 2  # between two checkpoints
SAVING = {"trainer": {"save_strategy": "steps", "save_steps": STEPS, "use_cpu": True}}
OPTIMISE = {
    "num_train_epochs": 4,
    "learning_rate": 1e-4,
    "generations": 2,
    "per_device_train_batch_size": 4,
    "on_policy": {"num_generations": 2},
    **SAVING,
}


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: its exit code (a signal's number, negative), seconds, calls that change files, and the work done: training
    steps and answers drawn."""

    code: int
    seconds: float
    calls: int
    steps: int
    answers: int


@dataclass
class Row:
    """What the kills of one stage came to."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    work: str = ""  # training steps and answers of the uninterrupted stage
    killed: int = 0
    early: int = 0  # attempts that were over before their moment came, and were made again
    survived: int = 0
    signals: int = 0
    steps: int = 0  # done twice, the most of any attempt
    answers: int = 0
    faults: list[str] = field(default_factory=list)


def recipe(root: Path, method: str = "distill") -> dict[str, Any]:
    """The smallest run that goes through every stage, with checkpoints; the model has some 25,000 parameters."""
    world = {"corpus_lines": 160, "demonstrations": 24, "dev_prompts": 20, "test_prompts": 8}
    trained = {
        "pretrain": {"num_train_epochs": 4, "learning_rate": 1e-2, **SAVING},
        "sft": {"num_train_epochs": 4, "learning_rate": 3e-3, **SAVING},
        "reward": {"num_train_epochs": 2, **SAVING},
        "optimise": {**OPTIMISE, "method": method},
    }
    return small_recipe(root, world=world, **trained)


class Counts:
    """What an attempt has done so far, in a file that outlives it: a byte for each call, training step and answer."""

    def __init__(self, path: Path):
        self.path, self.file = path, os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def add(self, what: str, n: int = 1) -> None:
        os.write(self.file, what.encode() * n)

    @staticmethod
    def read(path: Path) -> collections.Counter[str]:
        return collections.Counter(path.read_text()) if path.exists() else collections.Counter()


def watch(counts: Counts, kill_at: int | None) -> None:
    """In the child: count work and calls, and die right before call number `kill_at`."""
    numbers = itertools.count(1)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **options: Any) -> Any:
            if next(numbers) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            counts.add("c")
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    step, answers = transformers.Trainer.training_step, TransformersEngine.answers

    def watched_step(*args: Any, **options: Any) -> Any:
        counts.add("s")
        return step(*args, **options)

    def watched_answers(self: Any, requests: Any) -> Any:
        found = answers(self, requests)
        counts.add("a", len(found))
        return found

    transformers.Trainer.training_step, TransformersEngine.answers = watched_step, watched_answers  # type: ignore[method-assign]


def attempt(
    root: Path, stage: str, method: str, *, kill_at: int | None = None, after: float | None = None, number: int = signal.SIGKILL
) -> Ended:
    """The command of a stage in a fork, with a signal `after` so many seconds, or SIGKILL at call `kill_at`. Its cache lies beside the run."""
    place = root.parent
    log, counted = place / "log.txt", place / f"counts-{time.monotonic_ns()}"
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            to = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(to, 1)
            os.dup2(to, 2)
            torch.set_num_threads(1)
            (place / "tmp").mkdir(exist_ok=True)
            os.environ.update(IRLIGN_CACHE=str(place / "cache"), TMPDIR=str(place / "tmp"))
            tempfile.tempdir = None
            watch(Counts(counted), kill_at)
            up_to(stage)
            os.write(begins, b".")
            main(words_of(stage, root, method))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            os._exit(code)
    os.close(begins)
    os.read(begun, 1)  # the clock starts when the command does
    os.close(begun)
    started = time.monotonic()
    code = _ending(child, None if after is None else started + after, number)
    seconds, found = time.monotonic() - started, Counts.read(counted)
    counted.unlink(missing_ok=True)
    return Ended(code, seconds, found["c"], found["s"], found["a"])


def _ending(child: int, moment: float | None, number: int) -> int:
    """Wait for the child, and signal it at the moment if it is still at work then."""
    while True:
        over, status = os.waitpid(child, os.WNOHANG)
        if over:
            return os.waitstatus_to_exitcode(status)
        if moment is not None and time.monotonic() >= moment:
            os.kill(child, number)
            moment = None
        time.sleep(0.002)


def words_of(stage: str, root: Path, method: str) -> list[str]:
    """The command that brings a run directory from before the stage to its end."""
    verb = stage if stage not in ("pretrain", "data") else "sft"
    return [verb, *([method] if verb == "optimise" else []), "--config", str(root.parent / "recipe.yaml"), f"output_dir={root}"]


def up_to(stage: str) -> None:
    """In the child: the chain ends with this stage, so that stages without a verb of their own can be run alone."""
    names = list(irlign.pipeline.STAGES)
    kept = names[: names.index("init" if stage == "pretrain" else stage) + 1]
    irlign.pipeline.STAGES = {name: irlign.pipeline.STAGES[name] for name in kept}


def listing(root: Path) -> dict[str, str]:
    """Every file of a run with the hash of its content; of the manifest what does not tell the time, of the page what is not its path."""
    found = {p.relative_to(root).as_posix(): hash_path(p) for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"}
    stages = read_json(root / "manifest.json")["stages"]
    kept = {n: {k: e[k] for k in ("status", "inputs", "settings_sha256", "outputs", "seed")} for n, e in stages.items()}
    if "report.html" in found:
        place = re.escape(str(root.parent.parent)) + "/[^/]+/run"  # a page that was ready before the run was moved tells its old path
        page = re.sub(place, "RUN", (root / "report.html").read_text(encoding="utf-8"))
        found["report.html"] = kept["report"]["outputs"]["report.html"] = hashlib.sha256(page.encode()).hexdigest()
    return {**found, "manifest.json": json.dumps(kept, sort_keys=True), "recipe.yaml": ""}


def prepare(place: Path, before: Path | None, method: str) -> Path:
    """A fresh place for an attempt, the run directory copied from `before`, and the recipe beside it."""
    root = place / "run"
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text(json.dumps(recipe(root, method)))
    if before is not None:
        shutil.copytree(before, root)
    return root


def moved(root: Path, place: Path, method: str) -> Path:
    """The torn run directory with its cache at another path; what was there is gone."""
    target = prepare(place, root, method) if root.exists() else prepare(place, None, method)
    if (root.parent / "cache").exists():
        shutil.copytree(root.parent / "cache", place / "cache")
    shutil.rmtree(root.parent)
    return target


def where(a: Path, b: Path, path: str) -> str:
    """The first place in which two JSON files differ."""
    if not path.endswith(".json"):
        return ""
    one, other = (read_json(root / path) for root in (a, b))
    way = ""
    while type(one) is type(other) and isinstance(one, dict | list):
        keys = range(len(one)) if isinstance(one, list) else [k for k in one if k in other]
        key = next((k for k in keys if len(one) != len(other) or one[k] != other[k]), None)
        if key is None or len(one) != len(other):
            break
        one, other, way = one[key], other[key], f"{way}.{key}"
    return f" at {way}: {one!r:.200} and {other!r:.200}"


def left_over(root: Path) -> list[str]:
    """What lies beside the run that no whole attempt leaves: halves of cached policies."""
    return [str(p) for p in (root.parent / "cache").rglob("*") if p.name.startswith(("tmp", ".building"))]


class Matrix:
    """All kills from one seed, in a scratch folder."""

    def __init__(self, scratch: Path, seed: int):
        self.scratch, self.rng, self.numbers = scratch, random.Random(seed), itertools.count()
        self.root = prepare(scratch / "whole", None, "distill")

    def stage(self, stage: str, kills: int, method: str = "distill", signals: bool = True) -> Row:
        """The uninterrupted end of one stage, from where the whole run stands, and all the kills on the way there."""
        before = self.scratch / f"before-{stage}-{method}"
        if self.root.exists():
            shutil.copytree(self.root, before)
        root = prepare(self.scratch / f"end-{stage}-{method}", before if before.exists() else None, method)
        whole = attempt(root, stage, method)
        assert whole.code == 0, (root.parent / "log.txt").read_text()
        row = Row(stage if stage != "optimise" else method, whole.seconds, whole.calls, f"{whole.steps}/{whole.answers}")
        for trap in self._traps(whole, kills, signals):
            self._kill(row, before if before.exists() else None, root, stage, method, whole, trap)
        shutil.rmtree(before, ignore_errors=True)
        if method == "distill":
            shutil.rmtree(self.root, ignore_errors=True)
            shutil.copytree(root, self.root)
        return row

    def _traps(self, whole: Ended, kills: int, signals: bool) -> Iterator[dict[str, Any]]:
        for number in range(kills):
            if number % 2:
                yield {"kill_at": self.rng.randint(1, whole.calls)}
            else:
                yield {"after": whole.seconds * self.rng.random()}
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            yield {"after": whole.seconds * self.rng.uniform(0.2, 0.8), "number": number}

    def _kill(self, row: Row, before: Path | None, end: Path, stage: str, method: str, whole: Ended, trap: dict[str, Any]) -> None:
        root, torn = self._torn(row, before, stage, method, trap)
        log = (root.parent / "log.txt").read_text() if (root.parent / "log.txt").exists() else ""
        root = moved(root, self.scratch / f"again-{next(self.numbers)}", method)
        again = attempt(root, stage, method)
        faults = list(self._faults(torn, again, whole, trap, root, end))
        if "Traceback" in log:
            faults.append("a traceback was printed")
        row.signals += "number" in trap and torn.code in (130, 143)
        row.killed += torn.code == -signal.SIGKILL
        row.survived += not faults
        row.steps = max(row.steps, torn.steps + again.steps - whole.steps)
        row.answers = max(row.answers, torn.answers + again.answers - whole.answers)
        row.faults += [f"{trap}: {fault}" for fault in faults]
        if faults:
            print(row.name, trap, *faults, (root.parent / "log.txt").read_text()[-800:], sep="\n  ", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(root.parent)

    def _torn(self, row: Row, before: Path | None, stage: str, method: str, trap: dict[str, Any]) -> tuple[Path, Ended]:
        """A run directory whose stage ended at the trap. One that is over before its moment came is tried again, its moment a little earlier."""
        while True:
            root = prepare(self.scratch / f"torn-{next(self.numbers)}", before, method)
            torn = attempt(root, stage, method, **trap)
            if torn.code != 0 or "kill_at" in trap:
                return root, torn
            row.early += 1
            trap["after"] = min(0.9 * trap["after"], torn.seconds)
            shutil.rmtree(root.parent)

    def _faults(self, torn: Ended, again: Ended, whole: Ended, trap: dict[str, Any], root: Path, end: Path) -> Iterator[str]:
        """What is wrong with an attempt and the one after it."""
        expected = {signal.SIGTERM: 143, signal.SIGINT: 130}.get(trap.get("number", 0), -signal.SIGKILL)
        if torn.code != expected:
            yield f"the torn attempt ended with {torn.code}, not {expected}"
        if again.code != 0:
            yield f"the second attempt ended with {again.code}"
            return
        want, have = listing(end), listing(root)
        yield from (f"left over: {path}" for path in sorted(have.keys() - want.keys()))
        yield from (f"missing: {path}" for path in sorted(want.keys() - have.keys()))
        yield from (f"differs: {path}{where(end, root, path)}" for path in sorted(want.keys() & have.keys()) if want[path] != have[path])
        yield from (f"left over: {path}" for path in left_over(root))
        if torn.steps + again.steps - whole.steps > STEPS:
            yield f"{torn.steps} + {again.steps} training steps, {whole.steps} uninterrupted"
        part = small_recipe("")["sampling"]
        if torn.answers + again.answers - whole.answers > part["part_prompts"] * part["num_generations"]:
            yield f"{torn.answers} + {again.answers} answers drawn, {whole.answers} uninterrupted"


HEAD = f"{'stage':<14}{'seconds':>8}{'writes':>8}{'steps/answers':>15}{'killed':>8}{'over':>6}{'signals':>9}{'survived':>10}{'steps twice':>13}{'answers twice':>15}"


def line(row: Row) -> str:
    """A row of the printed table."""
    tried = row.killed + row.signals
    return (
        f"{row.name:<14}{row.seconds:>8.1f}{row.calls:>8}{row.work:>15}{row.killed:>8}{row.early:>6}{row.signals:>9}{f'{row.survived}/{tried}':>10}"
        f"{row.steps:>13}{row.answers:>15}"
    )


def run(kills: int, method_kills: int, only: list[str], seed: int, until: str = "report") -> list[Row]:
    """The matrix, each row printed as it is done. Every stage of the chain runs; only those named are killed."""
    rows = []
    print(f"seed {seed}\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(prefix="irlign-crashes-") as scratch:
        matrix = Matrix(Path(scratch), seed)
        plan = [(stage, "distill", kills) for stage in STAGES[:6]]
        plan += [("optimise", method, method_kills) for method in METHODS[1:]] + [(stage, "distill", kills) for stage in STAGES[6:]]
        plan = [row for row in plan if STAGES.index(row[0]) <= STAGES.index(until)]
        wanted = [(s, m, n) for s, m, n in plan if m == "distill" or not only or m in only]
        for stage, method, count in wanted:
            named = not only or (method if stage == "optimise" else stage) in only
            row = matrix.stage(stage, count if named else 0, method, named)
            if named:
                rows.append(row)
                print(line(row), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each stage")
    parser.add_argument("--method-kills", type=int, default=5, help="SIGKILLs of each policy method besides distill")
    parser.add_argument("--only", default="", help="stages and methods, comma-separated")
    parser.add_argument("--until", default="report", choices=STAGES, help="the last stage")
    parser.add_argument("--seed", type=int, default=100)
    given = parser.parse_args()
    start = time.monotonic()
    table = run(given.kills, given.method_kills, [name for name in given.only.split(",") if name], given.seed, given.until)
    total = {name: sum(getattr(row, name) for row in table) for name in ("killed", "early", "signals", "survived")}
    print(f"{total['killed']} kills, {total['signals']} signals, {total['early']} over before; {total['survived']} survived, "
          f"{sum(len(row.faults) for row in table)} faults, {(time.monotonic() - start) / 60:.1f} min")  # fmt: skip
    sys.exit(any(row.faults for row in table))

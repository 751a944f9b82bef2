"""A process that runs a recipe again and again, and is killed with SIGKILL at every moment of every stage.

    python killed.py RECIPE.json

Each attempt is a fork that dies at its moment: the first and the third sign of progress in the stage's build, once the
outputs are sealed, and once they are moved but not yet recorded. The last attempt is left alone. Prints each attempt.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401 -- imported once, before the forks
import transformers  # noqa: F401

import irlign.files
import irlign.pipeline
import irlign.runs
from irlign.progress import Progress
from irlign.runs import Run

STAGES = ("pretrain", "data", "sft", "sample", "reward", "bon", "optimise", "eval", "report")
MOMENTS = ("first", "third", "sealed", "moved")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str, moment: str) -> None:
    """Set the trap."""
    here = {"stage": "", "signs": 0}
    do, advance, record, seal, replace = Run.do, Progress.advance, Run._record, Run._seal, os.replace

    def sign() -> None:
        if here["stage"] == stage:
            here["signs"] += 1
            if here["signs"] == {"first": 1, "third": 3}.get(moment):
                die()

    def watched_do(self: Run, name: str, build: Any, *args: Any, **options: Any) -> bool:
        def watched(folder: Path) -> Any:
            here["stage"] = name
            try:
                return build(folder)
            finally:
                here["stage"] = ""

        return do(self, name, watched, *args, **options)

    def watched_advance(self: Progress, *args: Any, **options: Any) -> None:
        advance(self, *args, **options)
        sign()

    def watched_replace(*args: Any, **options: Any) -> None:
        replace(*args, **options)
        sign()

    def watched_seal(self: Run, folder: Path, entry: dict[str, Any]) -> None:
        seal(self, folder, entry)
        if moment == "sealed" and folder.name == stage:
            die()

    def watched_record(self: Run, name: str, entry: dict[str, Any]) -> None:
        if moment == "moved" and name == stage and entry["status"] == "complete":
            die()
        record(self, name, entry)

    Run.do, Run._record, Run._seal = watched_do, watched_record, watched_seal  # type: ignore[method-assign]
    Progress.advance, os.replace = watched_advance, watched_replace  # type: ignore[method-assign]


def attempt(recipe: dict[str, Any], trap: tuple[str, str] | None) -> int:
    """Run in a fork; the number of the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        if trap:
            arm(*trap)
        irlign.pipeline.run(recipe)
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    recipe = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for stage in STAGES:
        for moment in MOMENTS:
            if (stage, moment) == ("report", "third"):
                continue  # it writes one file
            print(stage, moment, os.WTERMSIG(attempt(recipe, (stage, moment))), flush=True)
    print("left alone", attempt(recipe, None), flush=True)

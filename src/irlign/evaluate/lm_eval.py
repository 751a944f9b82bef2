"""lm-evaluation-harness on pi_0, pi_SFT and the aligned policy, in a process with a Python of its own: what alignment cost elsewhere.

The harness decides what is asked and what counts; here its values of each document are compared between policies, paired. What it wrote stays
in the run, so that nothing is asked twice.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from irlign import statistics
from irlign.config import Settings
from irlign.errors import ModelError
from irlign.files import digest, hash_path, read_json
from irlign.machine import python_with

SECTION = "evaluation.lm_eval"
PYTHON = "IRLIGN_LM_EVAL_PYTHON"  # the environment's word for evaluation.lm_eval.python
INSTALL = "`pip install 'irlign[lm-eval]'`, or give the Python that has it: evaluation.lm_eval.python=PATH"
PAIRS = (("sft", "initial"), ("aligned", "initial"), ("aligned", "sft"))
Values = dict[tuple[str, str, str], dict[str, float]]  # (task, metric, filter) -> document -> value


class LMEvalSettings(Settings):
    """What lm-evaluation-harness is asked about the policies."""

    tasks: list[str] = Field(min_length=1, description="tasks or groups by the harness's names")
    include_path: str | None = Field(None, description="folder with task definitions of your own")
    limit: int | None = Field(None, ge=1, description="documents of a task at most; null = all")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each document; null = what the task says")
    batch_size: int = Field(8, ge=1, description="documents at once")
    apply_chat_template: bool = Field(False, description="ask in the policy's chat template")
    python: str | None = Field(None, description=f"the Python that has lm_eval; null = {PYTHON}, or this one")


def lm_eval_python(settings: LMEvalSettings) -> str:
    """The Python that has the harness. Raises ConfigError where it has none."""
    return python_with(
        "lm_eval", settings.python or os.environ.get(PYTHON), name="lm-evaluation-harness", where=f"{SECTION}.python", do=INSTALL
    )


def ask_harness(policies: Mapping[str, Path], settings: LMEvalSettings, kept: Path, *, resamples: int, seed: int) -> dict[str, Any]:
    """`version`, `tasks`, `limit` and `rows`, a row for each task, metric and filter as `compared` gives it. `policies` are folders by source.

    What the harness wrote about a policy lies in `kept`, under the hash of the policy and of the settings, and is read from there the next time.
    Raises ConfigError without the harness, ModelError where it fails.
    """
    python, tasks = lm_eval_python(settings), hash_path(Path(settings.include_path).expanduser()) if settings.include_path else None
    said = {}
    for source, folder in policies.items():
        answer = kept / digest([hash_path(folder), settings.model_dump(exclude={"python"}), tasks, seed])[:16]
        if not answer.is_dir():
            _run([python, "-m", "lm_eval", *arguments(folder, settings, seed)], answer)
        said[source] = read_answer(answer)
    about = {source: results for source, (results, _) in said.items()}
    version = next(iter(about.values())).get("lm_eval_version")
    rows = compared(about, {source: values for source, (_, values) in said.items()}, resamples=resamples, seed=seed)
    return {"version": version, "tasks": settings.tasks, "limit": settings.limit, "rows": rows}


def arguments(folder: Path, settings: LMEvalSettings, seed: int) -> list[str]:
    """The harness's words for one policy, but for where its output goes. The model's as JSON: a path may hold a comma."""
    words = ["run", "--model", "hf", "--model_args", json.dumps({"pretrained": str(folder)}), "--tasks", ",".join(settings.tasks)]
    words += ["--batch_size", str(settings.batch_size), "--seed", str(seed), "--log_samples"]
    words += ["--include_path", str(Path(settings.include_path).expanduser())] if settings.include_path else []
    words += ["--limit", str(settings.limit)] if settings.limit else []
    words += ["--num_fewshot", str(settings.num_fewshot)] if settings.num_fewshot is not None else []
    return [*words, *(["--apply_chat_template"] if settings.apply_chat_template else [])]


def _run(command: Sequence[str], answer: Path) -> None:
    """Runs the harness; what it writes becomes the folder `answer`, whole or not at all. Raises ModelError with its last line."""
    answer.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=answer.parent) as place, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        code = subprocess.run([*command, "--output_path", place], stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code or not any(Path(place).rglob("results_*.json")):
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            said = lines[-1] if lines else f"exit code {code}"
            raise ModelError(f"lm-evaluation-harness failed: {said}", where=SECTION, do="`lm-eval ls tasks` lists the tasks it knows")
        shutil.copytree(place, answer)


def read_answer(folder: Path) -> tuple[dict[str, Any], Values]:
    """The harness's results, and its values of each document where they are numbers. Raises ModelError where they cannot be read."""
    values: Values = {}
    try:
        results: dict[str, Any] = read_json(next(iter(sorted(folder.rglob("results_*.json")))))
        for task in results["results"]:
            for file in sorted(folder.rglob(f"samples_{task}_[0-9]*.jsonl")):
                for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
                    for metric in row.get("metrics", ()):
                        if isinstance(value := row.get(metric), int | float):
                            values.setdefault((task, metric, row.get("filter", "none")), {})[str(row["doc_id"])] = float(value)
    except (StopIteration, ValueError, KeyError, TypeError, AttributeError) as error:
        do = "delete that folder; irlign reads what version 0.4.13 writes"
        raise ModelError(f"lm-evaluation-harness wrote what cannot be read ({error})", where=folder, do=do) from error
    return results, values


def compared(results: Mapping[str, Mapping[str, Any]], values: Mapping[str, Values], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """A row for each task, metric and filter of all policies: `task`, `metric`, `higher_is_better`, `means` by source, and `tests`: paired over the
    same documents, of pi_SFT and the aligned policy against where they came from. A mean is an E over documents where the harness tells a number
    of each and their mean is its own figure, else that figure without interval, which is not tested."""
    first = next(iter(results.values()))
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    rows = []
    for task, metric, filtered in _figures(first):
        figures = {source: float(of["results"][task][f"{metric},{filtered}"]) for source, of in results.items()}
        known = {source: of.get((task, metric, filtered), {}) for source, of in values.items()}
        told = all(known[s] and np.isclose(np.mean(list(known[s].values())), figure) for s, figure in figures.items())
        told &= len({tuple(sorted(of)) for of in known.values()}) == 1
        docs = sorted(next(iter(known.values())))
        by = {source: [of[doc] for doc in docs] for source, of in known.items()} if told else {}
        plain = {source: {"mean": figure, "ci95": None, "prompts": None} for source, figure in figures.items()}
        means = {source: statistics.estimate(of, **options).to_json() for source, of in by.items()} or plain
        tests = [statistics.paired_test(a, b, by[a], by[b], **options).to_json() for a, b in PAIRS if a in by and b in by]
        higher = first.get("higher_is_better", {}).get(task, {}).get(metric)
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        rows.append({"task": task, "metric": name, "higher_is_better": higher, "means": means, "tests": tests})
    return rows


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Task, metric and filter of every figure of the harness."""
    for task, of in results["results"].items():
        for key, value in of.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield task, metric, filtered


def regressions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """An alarm for each policy that is worse than the initial one on a task, the whole interval on that side; a metric whose better side the
    harness does not say is left to the reader."""
    found = []
    for policy, words in (("sft", "SFT"), ("aligned", "the aligned policy")):
        worse = []
        for row in rows:
            test = next((t for t in row["tests"] if (t["a"], t["b"]) == (policy, "initial")), None)
            sign = {True: 1, False: -1}.get(row["higher_is_better"], 0)
            if test and max(sign * bound for bound in test["ci95"]) < 0:
                worse.append(f"{row['task']} {row['metric']} {test['mean_difference']:+.3f}")
        if worse:
            seen = f"on {len(worse)} of {len(rows)} figures of lm-evaluation-harness: {', '.join(worse)}"
            do = "lower sft.learning_rate or optimise.learning_rate, or train fewer epochs, if that task matters to you"
            found.append({"name": f"{words} is worse than the initial policy elsewhere", "seen": seen, "do": do})
    return found

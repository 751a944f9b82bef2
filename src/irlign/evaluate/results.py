"""A run's stored answers become evaluation/results.json: read, scored by what never trained, measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from irlign.data.splits import stored_demonstrations
from irlign.evaluate.equal_tokens import adaptive_point
from irlign.evaluate.golden import Golden, score_golden
from irlign.evaluate.headline import headline
from irlign.evaluate.judge import judge_pairs
from irlign.evaluate.metrics import Evaluation, EvaluationSettings, Group
from irlign.evaluate.overoptimisation import alarms
from irlign.files import read_json, read_table
from irlign.records import SCORE, Demonstration, Prompt, PromptContent, Sample, mean_logprobs
from irlign.reward.contrasts import ended
from irlign.reward.controls import by_prompt, controls, length
from irlign.reward.load import score_all
from irlign.runs import Run

JUDGED = "judged.jsonl"  # of the run: every verdict that was paid for
ABOUT = ("name", "kind", "contrast", "loss", "controls", "dev", "pairs")


def measure(
    run: Run,
    learned: str,
    golden: Golden | None,
    golden_name: str,
    settings: EvaluationSettings,
    summary: Mapping[str, Any],
    aligned: bool = False,
    candidates: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole of results.json and the rows of prompts.parquet, from candidates, initial samples and demonstrations on test, and where
    there is an `aligned` policy its samples. `candidates`: the candidates came from elsewhere, and pi_SFT's own samples stand beside them.

    `learned` names the reward that was trained; which one selects is in choice.json. Golden judges the text a user would get;
    rewards see it under the ending rule of their training.
    """
    choice = read_json(run.path("best_of_n/choice.json"))
    optimised = read_json(run.path("optimise/choice.json")) if aligned else None
    selector = choice["reward"]
    rewards_of = {name: run.path("rewards", name) for name in dict.fromkeys((learned, selector))}

    def drawn(samples: Sequence[Sample], scores: Mapping[str, Any] | None = None) -> Group:
        return group(
            [s.prompt for s in samples], [s.completion for s in samples], [s.finished for s in samples], scores, mean_logprobs(samples)
        )

    def group(
        prompts: Sequence[Prompt],
        raw: Sequence[str],
        done: Sequence[bool],
        scores: Mapping[str, Any] | None = None,
        likelihood: np.ndarray | None = None,
    ) -> Group:
        contents = [p.content for p in prompts]
        seen = [ended(text, finished) for text, finished in zip(raw, done, strict=True)]
        if scores is None:
            scores = {**(score_all(rewards_of, contents, seen) if contents else {selector: []}), "length": length(contents, seen)}
        rewards = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
        true = score_golden(golden, contents, raw, golden_name) if golden and contents else None
        return Group([p.prompt_id for p in prompts], raw, np.array(done, dtype=bool), rewards, true, likelihood)

    candidate_rows = _test_rows(run, "best_of_n/candidates.parquet")
    stored: dict[str, Any] = {
        key.removeprefix(SCORE): [row[key] for row in candidate_rows]
        for key in candidate_rows[0]
        if key.startswith(SCORE) or key in ("judge", "style")
    }
    stored = {name: values for name, values in stored.items() if values[0] is not None}
    pool, initial = ([Sample.from_row(row) for row in of] for of in (candidate_rows, _test_rows(run, "pools/init.parquet")))
    answers = stored_demonstrations(run, "test")
    from_sft = drawn(pool, {**stored, **_controls(pool, answers)})
    measured = Evaluation(
        initial=drawn(initial),
        pool=from_sft,
        sft=drawn([Sample.from_row(row) for row in _test_rows(run, "pools/sft.parquet")]) if candidates else None,
        aligned=_aligned(optimised, from_sft, lambda: drawn([Sample.from_row(row) for row in _test_rows(run, "pools/aligned.parquet")])),
        demonstrations=group([d.prompt for d in answers], [d.completion for d in answers], [True] * len(answers)),
        selector=selector,
        learned=learned,
        settings=settings,
        seed=run.seed,
        chosen=choice["n"],
        used=_used(run, candidate_rows),
    )
    truth = measured.golden(golden_name) if golden else None
    about = read_json(run.path("rewards", learned, "reward.json"))
    nll = run.stages.get("sft", {}).get("notes", {}).get("dev_nll")
    heldout = {
        "reward": {key: about.get(key) for key in ABOUT},
        **measured.heldout(),
        "judge": measured.judged(),
        "demonstration_nll": nll,
    }
    tests = measured.tests("golden" if golden else selector)
    adaptive, more = adaptive_point(measured, np.array([s.tokens for s in pool])) if choice["adaptive"] else (None, [])
    results = {
        "golden": truth,
        "heldout": heldout,
        "alarms": [*alarms(heldout, choice), *_kept_alarms(optimised)],
        "choice": choice,
        "optimise": optimised,
        "base": measured.base,
        "adaptive": adaptive,
        "tests": [*tests, *more],
        "curve": measured.curve_info(truth),
        "run": dict(summary),
    }
    rows = measured.rows({s.prompt.prompt_id: shown(s.prompt.content) for s in pool})
    results["pairwise"] = _pairwise(results, rows, settings, run) if settings.judge else None
    return {"headline": headline(results), **results}, rows


def _pairwise(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], settings: EvaluationSettings, run: Run) -> dict[str, Any]:
    """What a judge at an endpoint says of the aligned policy and of the selection against what they came from, and of pi_SFT against pi_0."""
    assert settings.judge is not None
    optimised, choice, base = results["optimise"], results["choice"], results["base"]
    pairs = [("aligned", "sft")] if optimised and optimised["published"] != "sft" else []
    pairs += [("best_of_n", base)] if choice["n"] > 1 else []
    options: dict[str, Any] = {"resamples": settings.resamples, "seed": run.seed}
    return judge_pairs(rows, [*pairs, ("sft", "initial")], settings.judge, run.path(JUDGED), **options)


def _used(run: Run, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which candidates selection looked at: the first `n` of each prompt in selected.jsonl. Shape [rows]."""
    with run.path("best_of_n/selected.jsonl").open(encoding="utf-8") as lines:
        n = {row["prompt_id"]: row["n"] for row in map(json.loads, lines)}
    return np.array([row["index"] < n[row["prompt_id"]] for row in rows])


def _aligned(optimised: Mapping[str, Any] | None, sft: Group, samples: Callable[[], Group]) -> Group | None:
    """The answers of the aligned policy; pi_SFT's own where it was published, so that nothing but the policy can differ."""
    if optimised is None:
        return None
    return sft if optimised["published"] == "sft" else samples()


def _kept_alarms(optimised: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The alarms of the policy that was published."""
    return optimised["candidates"].get(optimised["published"], {}).get("alarms", []) if optimised else []


def _controls(pool: Sequence[Sample], answers: Sequence[Demonstration]) -> dict[str, np.ndarray]:
    """What length, chance and the demonstration itself (oracle-like) would select from the pool."""
    return controls([s.prompt.content for s in pool], [ended(s.completion, s.finished) for s in pool], by_prompt(answers))


def shown(content: PromptContent) -> str:
    """A prompt for people to read: the text, or the turns with their roles."""
    return content if isinstance(content, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in content)


def _test_rows(run: Run, path: str) -> list[dict[str, Any]]:
    return [row for row in read_table(run.path(path)) if row["split"] == "test"]

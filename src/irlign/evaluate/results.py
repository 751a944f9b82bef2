"""A run's stored answers become evaluation/results.json: read, scored by what never trained, measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.splits import stored_demonstrations
from irlign.evaluate.equal_tokens import adaptive_point
from irlign.evaluate.golden import Golden, score_golden
from irlign.evaluate.goldens import judge_by_others, opposed
from irlign.evaluate.group import Group
from irlign.evaluate.headline import headline
from irlign.evaluate.judge import judge_pairs
from irlign.evaluate.lm_eval import ask_harness, regressions
from irlign.evaluate.metrics import Evaluation, EvaluationSettings
from irlign.evaluate.overoptimisation import alarms
from irlign.evaluate.reward_bench import bench
from irlign.files import read_json, read_table
from irlign.records import SCORE, Demonstration, Prompt, PromptContent, Sample, mean_logprobs
from irlign.reward.contrasts import ended
from irlign.reward.controls import by_prompt, controls, length
from irlign.reward.load import score_all
from irlign.runs import Run

JUDGED = "judged.jsonl"  # of the run: every verdict that was paid for
HARNESS = "lm_eval"  # of the run: everything that lm-evaluation-harness wrote
ABOUT = ("name", "kind", "contrast", "loss", "controls", "dev", "pairs")


@dataclass(frozen=True)
class Reader:
    """Answers as groups, by the rewards in folders and by the golden reward, which judges the text a user would get; rewards see it under
    the ending rule of their training."""

    rewards: Mapping[str, Path]
    golden: Golden | None
    golden_name: str

    def samples(self, samples: Sequence[Sample], scores: Mapping[str, Any] | None = None) -> Group:
        """A policy's answers; `scores` where they are known already."""
        return self._group(
            [s.prompt for s in samples], [s.completion for s in samples], [s.finished for s in samples], scores, mean_logprobs(samples)
        )

    def demonstrations(self, shown: Sequence[Demonstration]) -> Group:
        """What was demonstrated, whole and of no policy."""
        return self._group([d.prompt for d in shown], [d.completion for d in shown], [True] * len(shown), None, None)

    def _group(
        self,
        prompts: Sequence[Prompt],
        raw: Sequence[str],
        done: Sequence[bool],
        scores: Mapping[str, Any] | None,
        likelihood: np.ndarray | None,
    ) -> Group:
        contents = [p.content for p in prompts]
        if scores is None:
            seen = [ended(text, finished) for text, finished in zip(raw, done, strict=True)]
            known: Mapping[str, Any] = score_all(self.rewards, contents, seen) if contents else {key: [] for key in self.rewards}
            scores = {**known, "length": length(contents, seen)}
        rewards = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
        true = score_golden(self.golden, contents, raw, self.golden_name) if self.golden and contents else None
        return Group([p.prompt_id for p in prompts], raw, np.array(done, dtype=bool), rewards, true, likelihood)


def measure(
    run: Run,
    learned: str,
    golden: Golden | None,
    golden_name: str,
    settings: EvaluationSettings,
    summary: Mapping[str, Any],
    aligned: bool = False,
    candidates: bool = False,
    others: Mapping[str, Golden] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole of results.json and the rows of prompts.parquet, from candidates, initial samples and demonstrations on test, and where
    there is an `aligned` policy its samples. `candidates`: the candidates came from elsewhere, and pi_SFT's own samples stand beside them.
    `others`: further golden rewards by name.

    `learned` names the reward that was trained; which one selects is in choice.json.
    """
    choice = read_json(run.path("best_of_n/choice.json"))
    optimised = read_json(run.path("optimise/choice.json")) if aligned else None
    pool = _test_rows(run, "best_of_n/candidates.parquet")
    reader = Reader({name: run.path("rewards", name) for name in dict.fromkeys((learned, choice["reward"]))}, golden, golden_name)
    measured = _evaluation(run, reader, pool, choice, optimised, learned=learned, settings=settings, candidates=candidates)
    truth = measured.golden(golden_name) if golden else None
    about = read_json(run.path("rewards", learned, "reward.json"))
    heldout = {
        "reward": {key: about.get(key) for key in ABOUT},
        **measured.heldout(),
        "judge": measured.judged(),
        "demonstration_nll": run.stages.get("sft", {}).get("notes", {}).get("dev_nll"),
    }
    adaptive, more = adaptive_point(measured, np.array([row["tokens"] for row in pool])) if choice["adaptive"] else (None, [])
    results: dict[str, Any] = {
        "golden": truth,
        "heldout": heldout,
        "alarms": [*alarms(heldout, choice), *_kept_alarms(optimised)],
        "choice": choice,
        "optimise": optimised,
        "base": measured.base,
        "adaptive": adaptive,
        "tests": [*measured.tests("golden" if golden else choice["reward"]), *more],
        "curve": measured.curve_info(truth),
        "run": dict(summary),
    }
    contents = {row["prompt_id"]: Prompt.from_row(row).content for row in pool}
    rows = measured.rows({prompt_id: shown(content) for prompt_id, content in contents.items()})
    results |= _elsewhere(run, measured, reader, others or {}, contents, settings)
    results["alarms"] += [*opposed(results["tests"], results["goldens"]), *regressions((results["lm_eval"] or {}).get("rows", []))]
    results["pairwise"] = _pairwise(results, rows, settings, run) if settings.judge else None
    return {"headline": headline(results), **results}, rows


def _evaluation(
    run: Run,
    reader: Reader,
    pool: Sequence[Mapping[str, Any]],
    choice: Mapping[str, Any],
    optimised: Mapping[str, Any] | None,
    *,
    learned: str,
    settings: EvaluationSettings,
    candidates: bool,
) -> Evaluation:
    """Everything on the test prompts: the pool, whose scores are stored, and what is scored now."""

    def drawn(name: str) -> Group:
        return reader.samples([Sample.from_row(row) for row in _test_rows(run, f"pools/{name}.parquet")])

    columns = [key for key in pool[0] if key.startswith(SCORE) or key in ("judge", "style")]
    stored = {key.removeprefix(SCORE): [row[key] for row in pool] for key in columns if pool[0][key] is not None}
    samples, answers = [Sample.from_row(row) for row in pool], stored_demonstrations(run, "test")
    from_sft = reader.samples(samples, {**stored, **_controls(samples, answers)})
    return Evaluation(
        initial=drawn("init"),
        pool=from_sft,
        sft=drawn("sft") if candidates else None,
        aligned=_aligned(optimised, from_sft, lambda: drawn("aligned")),
        demonstrations=reader.demonstrations(answers),
        selector=choice["reward"],
        learned=learned,
        settings=settings,
        seed=run.seed,
        chosen=choice["n"],
        used=_used(run, pool),
    )


def _elsewhere(
    run: Run,
    measured: Evaluation,
    reader: Reader,
    others: Mapping[str, Golden],
    contents: Mapping[str, PromptContent],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """What is asked beyond the run's own measure: further golden rewards, preference files, and lm-evaluation-harness."""
    options: dict[str, Any] = {"resamples": settings.resamples, "seed": run.seed}
    talks = any(not isinstance(content, str) for content in contents.values())
    policies = {source: run.path("policies", "init" if source == "initial" else source) for source in ("initial", "sft", "aligned")}
    if (own := measured.groups.get("aligned")) is None or own is measured.groups["sft"]:  # pi_SFT itself is published
        del policies["aligned"]
    asked = {**contents, **{row["prompt_id"]: Prompt.from_row(row).content for row in read_table(run.path("data/test.parquet"))}}

    def score(prompts: Sequence[PromptContent], answers: Sequence[str]) -> dict[str, np.ndarray]:
        return score_all(reader.rewards, prompts, [ended(answer, True) for answer in answers])

    return {
        "goldens": judge_by_others(measured, others, asked),
        "reward_bench": [bench(file, score, conversational=talks, **options) for file in settings.reward_bench],
        "lm_eval": ask_harness(policies, settings.lm_eval, run.path(HARNESS), **options) if settings.lm_eval else None,
    }


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
    """Where SFT was kept, the alarms of what the judge shows to be better: they keep it from being published. One without a gain needs no alarm."""
    if optimised is None or optimised["published"] != "sft":
        return []
    better = {name: of for name, of in optimised["candidates"].items() if name != "sft" and of["gain"]["low"] > 0}
    words = "{name}, which is not published though judged better than SFT: {seen}"
    return [
        {**alarm, "seen": words.format(name=name.replace("-", " "), seen=alarm["seen"])}
        for name, of in better.items()
        for alarm in of["alarms"]
    ]


def _controls(pool: Sequence[Sample], answers: Sequence[Demonstration]) -> dict[str, np.ndarray]:
    """What length, chance and the demonstration itself (oracle-like) would select from the pool."""
    return controls([s.prompt.content for s in pool], [ended(s.completion, s.finished) for s in pool], by_prompt(answers))


def shown(content: PromptContent) -> str:
    """A prompt for people to read: the text, or the turns with their roles."""
    return content if isinstance(content, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in content)


def _test_rows(run: Run, path: str) -> list[dict[str, Any]]:
    return read_table(run.path(path), split="test")

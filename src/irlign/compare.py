"""Finished runs side by side on one page: what each of them showed, paired differences, and the settings that differ. Reads records only."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.errors import ConfigError, RunError
from irlign.files import disk_errors, read_json, read_table
from irlign.records import verdict
from irlign.report import render
from irlign.runs import Run
from irlign.statistics import paired_test

RESULTS = "evaluation/results.json"
NEEDED = ("headline", "golden", "heldout", "choice", "alarms", "run")
SOURCES = {"initial": "initial", "sft": "SFT", "aligned": "aligned", "best_of_n": "Best-of-n", "demonstrations": "demonstrations"}
OWN = ("output_dir",)  # keys that differ between any two runs


def compare_runs(folders: Sequence[str | Path], target: Path) -> list[str]:
    """Write one page over the finished runs in `folders`, the first being the one that the others are compared with. Returns its headline.

    Raises ConfigError for fewer than two runs, RunError for a folder that is no run, or whose evaluation is not there.
    """
    roots = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(roots)) < 2 or len(set(roots)) < len(roots):
        raise ConfigError("a comparison needs two runs or more, each given once", do="irlign compare RUN_A RUN_B ...")
    with disk_errors(target.parent):
        runs = {name: Run.read(root) for name, root in zip(_names(folders, roots), roots, strict=True)}
        results = {name: _results(run) for name, run in runs.items()}
        tests = _tests(runs, results)
        headline = _headline(results, tests)
        context = {
            "headline": headline,
            "runs": results,
            "sources": SOURCES,
            "rows": {name: _row(of) for name, of in results.items()},
            "heldout": {name: _heldout(of) for name, of in results.items()},
            "tests": tests,
            "side": lambda t: verdict(t["ci95"]),
            "settings": differing({name: run.recipe for name, run in runs.items()}),
        }
        render("compare.html", target, context)
    return headline


def _names(folders: Sequence[str | Path], roots: Sequence[Path]) -> list[str]:
    """The folders' own names where they tell the runs apart, else the paths as they were given."""
    names = [root.name for root in roots]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _results(run: Run) -> dict[str, Any]:
    finish = f"irlign run output_dir={run.root}"
    if not run.path(RESULTS).is_file():
        raise RunError(f"this run is not finished: it has no {RESULTS}", where=run.root, do=f"finish it: {finish}")
    if stage := run.outdated("eval"):
        what = "uses what is there no more" if stage == "eval" else f"is older than its {stage}"
        raise RunError(f"its evaluation {what}", where=run.root, do=f"measure again: {finish}")
    if unfinished := [name for name, entry in run.stages.items() if entry["status"] != "complete"]:
        what = f"its recipe is that of an attempt that {unfinished[0]} did not finish, and its results are of before"
        raise RunError(what, where=run.root, do=f"finish it, or give the settings of before: {finish}")
    results = read_json(run.path(RESULTS))
    if not isinstance(results, dict) or not set(NEEDED) <= set(results) or not {"n", "reward"} <= set(results["choice"] or ()):
        raise RunError("its results are not as this version of irlign writes them", where=run.path(RESULTS), do=f"measure again: {finish}")
    return results


def _measure(results: Mapping[str, Any]) -> str | None:
    """What the run's answers were judged by; None where only the reward that selects says something of them."""
    return results["golden"]["name"] if results["golden"] else None


def _row(results: Mapping[str, Any]) -> dict[str, Any]:
    """A run's means with their intervals by source, Best-of-n at the n that it chose."""
    of, n = results["golden"] or results["heldout"]["rewards"], results["choice"]["n"]
    return {**{key: of.get(key) for key in SOURCES}, "best_of_n": of["best_of_n"][str(n)], "measure": _measure(results)}


def _heldout(results: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said without a golden reward, each with its format."""
    of, n = results["heldout"], str(results["choice"]["n"])
    return {
        "reward tells SFT from initial": (of["reward_auc"], ".0%"),
        "length alone does": (of["length_auc"], ".0%"),
        "label-free judge, gain of the chosen n in sd": ((of["judge"] or {}).get(n), ".2f"),
        "picks that finished": (of["finished"]["best_of_n"], ".0%"),
        "words of a pick": (of["completion_length"]["best_of_n"], ".1f"),
        "trigrams repeated in a pick": (of["repetition"]["best_of_n"], ".1%"),
    }


def _tests(runs: Mapping[str, Run], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run against the first, over the same prompts, by the golden reward that both have: the aligned policies, and Best-of-n at the n
    that each chose. Nothing where golden rewards or test prompts differ."""
    (first, *others), found = list(runs), []
    rows = {name: {row["prompt_id"]: row for row in read_table(run.path("evaluation/prompts.parquet"))} for name, run in runs.items()}
    columns = {name: {"Best-of-n": f"golden/best_of_{of['choice']['n']}", "aligned": "golden/aligned"} for name, of in results.items()}
    for name in others:
        if _measure(results[name]) is None or _measure(results[name]) != _measure(results[first]) or set(rows[name]) != set(rows[first]):
            continue
        for what in ("aligned", "Best-of-n"):
            sides = [[rows[r][p].get(columns[r][what]) for p in sorted(rows[first])] for r in (name, first)]
            if all(value is not None for side in sides for value in side):
                found.append({"what": what, **paired_test(name, first, *sides).to_json()})  # type: ignore[arg-type]
    return found


def _headline(results: Mapping[str, Mapping[str, Any]], tests: Sequence[Mapping[str, Any]]) -> list[str]:
    measures, first = {_measure(of) for of in results.values()}, next(iter(results))
    if measures == {None}:
        lines = [
            f"{len(results)} runs without a golden reward: each reward has a scale of its own, so nothing here says which run is better."
        ]
    elif len(measures) > 1:
        lines = [
            f"{len(results)} runs that were not all judged by the same measure: their means do not compare, only what a line below puts side by side does."
        ]
    else:
        lines = [f"{len(results)} runs, judged by {measures.pop()}."]
        if len({t["a"] for t in tests}) < len(results) - 1:
            lines.append(f"Runs without a comparison below have other test prompts than {first}.")
    for t in tests:
        low, high = t["ci95"]
        words = {"better": "is better than", "worse": "is worse than", "": "is not shown to differ from"}[verdict(t["ci95"])]
        name = f"{t['a']}, {'the aligned policy' if t['what'] == 'aligned' else 'Best-of-n'},"
        lines.append(f"{name} {words} {t['b']}: {t['mean_difference']:+.2f} [{low:.2f}, {high:.2f}] over {t['prompts']} test prompts.")
    return lines


def differing(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all recipes, as `{dotted key: [value in each]}`; "–" where a recipe has no such key."""
    flat = [dict(_flat(recipe)) for recipe in recipes.values()]
    keys = dict.fromkeys(key for one in flat for key in one if key not in OWN)
    values = {key: [_word(one[key]) if key in one else "–" for one in flat] for key in keys}
    return {key: of for key, of in values.items() if len(set(of)) > 1}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: Any) -> str:
    return "none" if value is None else str(value)

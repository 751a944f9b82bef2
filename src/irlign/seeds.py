"""A folder of seeds becomes one table: every run, means with intervals over seeds, and the answer in a few sentences. Reads records only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.files import read_table, write_json
from irlign.records import find_test, verdict
from irlign.report import render
from irlign.statistics import nested_estimate


def write_seeds(root: Path, results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One table over the runs in ROOT/seed-K: seeds.json and seeds.html; every seed shown. Returns what seeds.json holds.

    `chosen` is Best-of-n at the n that each run chose.
    """
    measure = "golden" if all(r["golden"] for r in results.values()) else "reward"
    rows = {seed: read_table(root / f"seed-{seed}/evaluation/prompts.parquet") for seed in results}
    n = [k for k in next(iter(results.values()))["curve"]["n"] if all(k in r["curve"]["n"] for r in results.values())]
    columns = {key: [key] * len(results) for key in ("initial", "sft", "aligned", "demonstrations", *(f"best_of_{k}" for k in n[1:]))}
    columns["chosen"] = [f"best_of_{r['choice']['n']}" for r in results.values()]
    values = {
        key: [
            [row[f"{measure}/{of}"] for row in rows[seed] if row.get(f"{measure}/{of}") is not None]
            for seed, of in zip(results, place, strict=True)
        ]
        for key, place in columns.items()
    }
    keys, last = [key for key in columns if all(values[key])], f"best_of_{n[-1]}"
    gaps = {
        f"{a} - {b}": nested_estimate([np.subtract(x, y).tolist() for x, y in zip(values[a], values[b], strict=True)]).to_json()
        for a, b in (("sft", "initial"), (last, "initial"), ("chosen", "sft"), (last, "sft"), ("aligned", "sft"))
        if all(values[a]) and all(len(x) == len(y) for x, y in zip(values[a], values[b], strict=True))
    }
    table = [
        _seed_row(seed, r, {key: float(np.mean(values[key][i])) for key in keys}, n[-1]) for i, (seed, r) in enumerate(results.items())
    ]
    name = results[next(iter(results))]["golden"]["name"] if measure == "golden" else "the reward that selects"
    found = {
        "measure": name,
        "seeds": table,
        "pooled": {key: nested_estimate(values[key]).to_json() for key in keys},
        "differences": gaps,
        "regret": _regret(table) if measure == "golden" else None,
        "headline": _seeds_headline(table, gaps, n[-1], measure),
    }
    write_json(root / "seeds.json", found)
    side = verdict(gaps["chosen - sft"]["ci95"])
    seen = side if measure == "golden" or side == "worse" else ""
    render("seeds.html", root / "seeds.html", {"name": root.name, "columns": keys, "verdict": seen, **found})
    return found


def _seed_row(seed: int, results: Mapping[str, Any], means: Mapping[str, float], last: int) -> dict[str, Any]:
    """One seed: its means, the n it chose, the best n by golden, and both differences to SFT with their intervals."""
    best, n = results["curve"]["best_n"], results["choice"]["n"]
    fall = find_test(results, f"best_of_{last}", "sft" if best == 1 else f"best_of_{best}")
    oracle = find_test(results, "best_of_oracle_n", "sft")
    return {
        "seed": seed,
        **means,
        "chosen_n": n,
        "best_n": best,
        "over_optimised": fall is not None and fall["ci95"][1] < 0,
        "oracle_gain": oracle["mean_difference"] if oracle else None,
        "aligned_gain": _side(find_test(results, "aligned", "sft")),
        "chosen_gain": _side(find_test(results, f"best_of_{n}", "sft")),
        "last_gain": _side(find_test(results, f"best_of_{last}", "sft")),
    }


def _side(test: Mapping[str, Any] | None) -> dict[str, Any]:
    """A difference in words and whether its interval lies above or below 0; none for SFT against itself."""
    if test is None:
        return {"text": "–", "verdict": "", "mean": 0.0}
    text = f"{test['mean_difference']:+.3f} [{test['ci95'][0]:.3f}, {test['ci95'][1]:.3f}]"
    return {"text": text, "verdict": verdict(test["ci95"]), "mean": test["mean_difference"]}


def _regret(table: Sequence[Mapping[str, Any]]) -> float | None:
    """What the chosen n left of the oracle n's gain over SFT, summed over seeds (method.md section 8)."""
    total = sum(row["oracle_gain"] for row in table)
    return float(sum(row["oracle_gain"] - row["chosen_gain"]["mean"] for row in table) / total) if total > 0 else None


def _seeds_headline(table: Sequence[Mapping[str, Any]], gaps: Mapping[str, Any], last: int, measure: str) -> list[str]:
    count = len(table)
    if measure != "golden":
        return [f"{count} seeds without a golden reward: whether Best-of-n beats SFT is not shown."]
    lines = []
    aligned = [("The aligned policy", "aligned - sft", "aligned_gain")] if "aligned - sft" in gaps else []
    best = [("The chosen n", "chosen - sft", "chosen_gain"), (f"Best-of-{last}", f"best_of_{last} - sft", "last_gain")]
    for what, key, name in [*aligned, *best]:
        mean, (low, high) = gaps[key]["mean"], gaps[key]["ci95"]
        words = {"better": "beats SFT", "worse": "is worse than SFT", "": "is not shown to beat SFT"}[verdict((low, high))]
        better, worse = (sum(row[name]["verdict"] == side for row in table) for side in ("better", "worse"))
        by_seed = f"by seed better in {better}, worse in {worse}, not shown in {count - better - worse}"
        lines.append(f"Over {count} seeds, {what} {words}: {mean:+.2f} [{low:.2f}, {high:.2f}]; {by_seed}.".replace("The", "the"))
    if (regret := _regret(table)) is not None:
        missed = f"{regret:.0%}" if regret > 0 else "nothing"
        lines.append(f"The choice of n without labels missed {missed} of the gain that the best n would have brought.")
    turned = [row for row in table if row["best_n"] != last]
    if turned:
        seen = ", ".join(f"seed {row['seed']}: n = {row['best_n']}" for row in turned)
        fallen = ", ".join(str(row["seed"]) for row in turned if row["over_optimised"])
        beyond = f"by more than the noise in seed {fallen}: the reward is over-optimised there" if fallen else "each time within the noise"
        lines.append(f"Best-of-{last} lies below a smaller n in {len(turned)} of {count} ({seen}), {beyond}.")
    return lines

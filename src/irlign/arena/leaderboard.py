"""The arena's table: every method in every cell, measured by the true reward, with intervals over seeds and prompts nested.

Cells run side by side in processes of one thread each; what is finished is not done again.
"""

import fnmatch
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np

from irlign import statistics
from irlign.arena.cell import Cell, Place, golden_of
from irlign.arena.judges import BY, STOPPING
from irlign.arena.methods import CHOSEN, METHODS, Pick
from irlign.arena.page import headline, write_page
from irlign.arena.policies import OF, POLICIES
from irlign.errors import ConfigError
from irlign.evaluate.golden import score_golden
from irlign.files import write_json
from irlign.progress import Progress, hush
from irlign.runs import Run

ALPHA, ORACLE = 0.05, 16
KNOWN = {**METHODS, **POLICIES, **STOPPING}


@dataclass(frozen=True)
class Measured:
    """One method in one cell: golden values of the test prompts at the n it chose, and along its curve (shape [P, n]); `correlation` is the
    rank correlation of its scores with the true reward within a prompt, `accuracy` that of its trained reward on unseen pairs. Of a policy
    method: the tokens trained on, and whether its safety net `kept` pi_SFT."""

    what: str
    n: int
    chosen_P: np.ndarray
    curve_P_n: np.ndarray
    tokens: float
    seconds: float
    memory: float
    correlation: float | None = None
    accuracy: float | None = None
    learned: int | None = None
    kept: bool | None = None


@dataclass(frozen=True)
class CellResult:
    """Every method of one cell, the demonstrations, and `oracle_P`, the best of ORACLE answers of pi_SFT by the true reward itself;
    `kl` is KL(pi_SFT || pi_0) in nats an answer, `n` are the points of the curves."""

    setting: str
    seed: int
    n: tuple[int, ...]
    demonstrations_P: np.ndarray
    oracle_P: np.ndarray
    kl: float
    methods: dict[str, Measured]


def rows_named(patterns: str | None) -> list[str]:
    """The methods that match any of the comma-separated patterns (`*` stands for anything); pi_0 and SFT always. Raises ConfigError."""
    if not patterns:
        return list(METHODS)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    found = {"initial policy", "SFT"}
    for pattern in wanted:
        matched = fnmatch.filter(STOPPING if BY in pattern else POLICIES if pattern.startswith(OF) else METHODS, pattern)
        if not matched:
            raise ConfigError(f"no method is called {pattern!r}", where="--rows", do=f"known: {'; '.join(KNOWN)}")
        found |= {*matched}
    return [name for name in KNOWN if name in found]


def measure(place: Place, rows: Sequence[str]) -> CellResult:
    """Run the methods in a cell, then score what they picked by the world's golden reward, on the test prompts only."""
    recipe = place.recipe()
    with Run.open(recipe.output_dir, recipe) as run:
        cell = Cell(recipe, run)
        picks = {name: KNOWN[name](cell) for name in rows}
        golden = golden_of(recipe)
        values: dict[str, dict[str, Any]] = {}
        for pool in {pick.pool for pick in picks.values()}:
            samples = cell.samples(pool, "test")
            texts = [s.prompt.content for s in samples], [s.completion for s in samples]
            values[pool] = {"golden": score_golden(golden, *texts, "golden"), "samples": samples}
        test = cell.demonstrations("test")
        shown = score_golden(golden, [d.prompt.content for d in test], [d.completion for d in test], "golden")
        sizes = [s.prompt.prompt_id for s in values["sft"]["samples"]]
        n = statistics.powers_of_two(min(sizes.count(p) for p in set(sizes)))
        methods = {name: _measured(cell, pick, n, **values[pick.pool]) for name, pick in picks.items()}
        oracle = Pick("sft", "oracle", score_golden(golden, *cell.texts, "golden"), min(ORACLE, n[-1]))
        best = _measured(cell, oracle, n, **values["sft"]).chosen_P
        return CellResult(place.name, place.seed, tuple(n), np.array(shown), best, cell.kl(), methods)


def _measured(cell: Cell, pick: Pick, n: Sequence[int], golden: np.ndarray, samples: Sequence[Any]) -> Measured:
    """Golden values by prompt, prompts in the order of the demonstrations."""
    prompts = [d.prompt.prompt_id for d in cell.demonstrations("test")]
    rows: dict[str, list[int]] = {p: [] for p in prompts}
    for i, sample in enumerate(samples):
        rows[sample.prompt.prompt_id].append(i)
    scores = None if pick.scores is None else pick.scores[~cell.is_dev]
    finished = np.array([s.finished for s in samples])

    def value(of: list[int], k: int) -> float:
        return float(golden[of].mean()) if scores is None else statistics.best_of_n(scores[of], golden[of], k, finished[of])

    points = n if scores is not None else [1]
    curve = np.array([[value(rows[p], k) for k in points] for p in prompts])
    drawn = np.mean([s.tokens for s in samples]) * pick.n * len(prompts)
    judged = pick.scores is not None or pick.kept is not None
    tokens = drawn + pick.drawn + (cell.tokens("dev") if judged else 0) + cell.tokens("train", pick.read)
    cost = tokens, cell.seconds(pick.stages), cell.memory(pick.stages)
    ranks = [] if scores is None else [statistics.spearman(scores[of], golden[of]) for of in rows.values()]
    known = [rank for rank in ranks if rank is not None]
    of_reward = float(np.mean(known)) if known else None, cell.accuracy(pick.stages)
    return Measured(pick.what, pick.n, curve[:, list(points).index(pick.n)], curve, *cost, *of_reward, pick.learned, pick.kept)


def run_cells(places: Sequence[Place], rows: Sequence[str], jobs: int) -> list[CellResult]:
    """Every cell, `jobs` at a time; the first error ends it once those that run are done, Ctrl-C and SIGTERM at once. What was finished stays."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the processes start
    found: list[CellResult] = []
    with Progress("arena", len(places), "cells") as bar, ProcessPoolExecutor(jobs, get_context("spawn"), _silence) as pool:
        waiting = [pool.submit(measure, place, rows) for place in places]
        try:
            for done in as_completed(waiting):
                found.append(done.result())
                bar.advance(1, f"{found[-1].setting}, seed {found[-1].seed}")
        except BaseException as error:
            if not isinstance(error, Exception):  # whoever ends it does not wait for what goes on next time
                for child in active_children():
                    child.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    order = {(place.name, place.seed): i for i, place in enumerate(places)}
    return sorted(found, key=lambda cell: order[cell.setting, cell.seed])


def _silence() -> None:
    hush()
    os.environ["IRLIGN_QUIET"] = "1"


def table(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """One row for each method over these cells. Shares are ratios of sums over runs (method.md section 8).

    `gap_closed`: gain over SFT of the gap between SFT and the demonstrations. `of_oracle`: the same of the gain of Best-of-16 by the
    true reward, `of_best`: of that of Best-of-16 by the reward that `irlign run` takes. `regret`: what the n that was chosen left of the gain of
    the n that is best by the golden reward (picked on half the test prompts, read on the other half). `worse`: runs significantly
    worse than SFT (paired one-sided permutation over prompts, 0.05), `worse_holm` after Holm's correction over the runs.
    """
    return [_row(name, cells) for name in cells[0].methods]


def _row(name: str, cells: Sequence[CellResult]) -> dict[str, Any]:
    own = [cell.methods[name] for cell in cells]
    sft = [cell.methods["SFT"].chosen_P for cell in cells]
    gains = [m.chosen_P - base for m, base in zip(own, sft, strict=True)]
    ps = [statistics.worse_p(gain) for gain in gains]

    def by_seed(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Settings of one seed share its pi_0, so they are drawn together: all prompts of a seed in one row."""
        return [
            np.concatenate([v for v, c in zip(values, cells, strict=True) if c.seed == seed]) for seed in sorted({c.seed for c in cells})
        ]

    def mean_of(values: Sequence[float | None]) -> dict[str, Any] | None:
        known = [np.array([value]) for value in values if value is not None]
        return statistics.nested_estimate(by_seed(known), resamples=2000).to_json() if len(known) == len(cells) else None

    tops = [[c.demonstrations_P for c in cells], [c.oracle_P for c in cells]]
    tops += [[c.methods[CHOSEN].curve_P_n[:, c.n.index(min(ORACLE, c.n[-1]))] for c in cells]] if CHOSEN in cells[0].methods else []
    gap, of_oracle, *of_best = (
        statistics.nested_ratio(by_seed(gains), by_seed([top - base for top, base in zip(of, sft, strict=True)])) for of in tops
    )
    curve, points = own[0].curve_P_n.shape[1] > 1, min(m.curve_P_n.shape[1] for m in own)  # a setting may have a larger N than others
    best = [statistics.oracle_n(m.curve_P_n, cell.seed) for m, cell in zip(own, cells, strict=True)] if curve else []
    left = [(top - m.chosen_P, top - m.curve_P_n[:, 0]) for m, top in zip(own, best, strict=True)] if curve else []
    regret = statistics.nested_ratio(*(by_seed(side) for side in zip(*left, strict=True))) if curve else None
    return {
        "method": name,
        "what": own[0].what,
        "golden": statistics.nested_estimate(by_seed([m.chosen_P for m in own]), resamples=2000).to_json(),
        "gain": statistics.nested_estimate(by_seed(gains), resamples=2000).to_json(),
        "gap_closed": gap.to_json() if gap else None,
        "of_oracle": of_oracle.to_json() if of_oracle else None,
        "of_best": of_best[0].to_json() if of_best and of_best[0] else None,
        "last": float(np.mean([m.curve_P_n[:, -1].mean() for m in own])),
        "oracle_n": float(np.mean([top.mean() for top in best])) if curve else None,
        "regret": regret.to_json() if regret else None,
        "worst_seed": float(min(gain.mean() for gain in gains)),
        "worse": sum(p < ALPHA for p in ps),
        "worse_holm": sum(p < ALPHA for p in statistics.holm(ps)),
        "runs": len(cells),
        "n": sorted({m.n for m in own}),
        "curve": np.mean([m.curve_P_n[:, :points].mean(0) for m in own], axis=0).tolist(),
        "tokens": float(np.mean([m.tokens for m in own])),
        "seconds": float(np.mean([m.seconds for m in own])),
        "memory": float(max(m.memory for m in own)),
        "correlation": mean_of([m.correlation for m in own]),
        "accuracy": mean_of([m.accuracy for m in own]),
        "learned": mean_of([m.learned for m in own]),
        "kept": None if own[0].kept is None else sum(bool(m.kept) for m in own),
    }


def leaderboard(places: Sequence[Place], rows: Sequence[str], jobs: int, root: Path, title: str) -> dict[str, Any]:
    """Run, measure, and write ROOT/NAME.json, .html and .md. Returns what the JSON holds."""
    cells = run_cells(places, rows, jobs)
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    groups = {setting: [cell for cell in cells if cell.setting == setting] for setting in settings}
    found = {
        "title": title,
        "seeds": sorted({cell.seed for cell in cells}),
        "n": list(max(cell.n for cell in cells)),
        "headline": headline(everything := table(cells)),
        "all": everything,
        "settings": {setting: table(of) for setting, of in groups.items()},
        "sources": {
            setting: {
                "sft": statistics.nested_estimate([c.methods["SFT"].chosen_P for c in of], resamples=2000).to_json(),
                "demonstrations": statistics.nested_estimate([c.demonstrations_P for c in of], resamples=2000).to_json(),
                "kl": statistics.nested_estimate([[c.kl] for c in of], resamples=2000).to_json(),
            }
            for setting, of in groups.items()
        },
    }
    write_json(root / f"{title}.json", found)
    write_page(root, title, found)
    return found

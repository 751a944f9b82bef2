"""Adaptive Best-of-n against the same n for all prompts: tokens for an equal golden reward, on finished cells of the arena.

    python benchmarks/adaptive_bon.py runs/arena/cells [--seeds 0..9] [--only 'dialogue*'] [--reward init-sft] [--json FILE]
    python benchmarks/adaptive_bon.py --quick

Cells are only read; `--quick` makes a small one, in under a minute. In each the reward is the one that `irlign run` selects by, or the one named; the law of a prompt and the cost of an
answer come from the dev prompts as drawn, and the rule is applied to the test prompts, averaged over random orders of their pools. Best-of-n for all is the exact
expectation over subsets. `saved` is the share of its tokens that the rule does without at the golden reward it reaches, both averaged over seeds
(first n that reaches it, between two n in proportion; where no n does, the largest, so that saved is too low); `more` the golden
reward that it adds at equal tokens. Intervals are bootstrapped over seeds with prompts nested (over cells, each setting weighing alike).
"""

import argparse
import fnmatch
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.arena.cell import Cell, Place, golden_of
from irlign.arena.methods import CHOSEN, METHODS
from irlign.config import parse_seeds
from irlign.files import read_table
from irlign.optimise.adaptive import answers_taken, cost_of, expected_gains, laws_of
from irlign.optimise.label_free import choose, judged_curve
from irlign.recipe import as_recipe
from irlign.records import mean_logprobs
from irlign.reward.publish import held_to_likelihood
from irlign.runs import Run
from irlign.sampling.pools import stored_samples
from irlign.statistics import best_of_n_weights

BUDGETS, ORDERS, RESAMPLES = (2, 4, 8), 16, 2000
SMALL = {"world.name": "dialogue", "as": "quick", "pretrain.hidden_size": 48, "pretrain.num_train_epochs": 1, "reward.num_train_epochs": 1}
Scales = list[list[float]]


def quick_cell(root: Path) -> Path:
    """A small cell of the arena, with what CHOSEN needs; the root."""
    recipe = Place(str(root), tuple(SMALL.items()), 0, quick=True).recipe()
    with Run.open(recipe.output_dir, recipe) as run:
        METHODS[CHOSEN](Cell(recipe, run))
    return root


def finished(roots: Sequence[Path], only: str, seeds: Sequence[int]) -> dict[str, list[Path]]:
    """The finished cells of these seeds by setting, whichever root has them."""
    found: dict[str, list[Path]] = {}
    for path in sorted((p for root in roots for p in root.iterdir() if fnmatch.fnmatch(p.name, only)), key=lambda p: p.name):
        own = [path / f"seed-{seed}" for seed in seeds]
        found.setdefault(path.name, []).extend(folder for folder in own if (folder / "scores/judge.parquet").is_file())
    return {setting: folders for setting, folders in found.items() if folders}


def selecting_reward(
    run: Run, name: str, prompt_ids: Sequence[str], dev: np.ndarray, finished: np.ndarray
) -> tuple[np.ndarray, Scales | None]:
    """A reward of the cell's pool from its stored scores; CHOSEN: the one that `irlign run` selects by, decided by the judge on dev. Shape
    [rows]; and the scales by which the learned reward is held to the likelihood, None where it is not."""

    def stored(name: str, *keys: str) -> list[np.ndarray]:
        rows = read_table(run.path(f"scores/{name}.parquet"))
        return [np.array([row[key] for row in rows]) for key in keys]

    nats, tokens = stored("likelihoods", "sft", "tokens")
    if name != CHOSEN:
        return nats / tokens if name == "likelihood" else stored(name, "score")[0], None
    (learned,), (judged,) = stored("init-sft", "score"), stored("judge", "score")
    known = [p if own else None for p, own in zip(prompt_ids, dev, strict=True)]
    held, scales = held_to_likelihood(learned, nats / tokens, known, 1.0)
    rewards = {"held": held, "alone": nats / tokens}
    ids = [p for p in known if p is not None]
    likely = mean_logprobs(stored_samples(run, "sft", "dev"))
    chosen = choose({of: judged_curve(ids, values[dev], judged[dev], finished[dev], likely) for of, values in rewards.items()})[0]
    return rewards[chosen], scales if chosen == "held" else None


def measure(folder: Path, name: str = CHOSEN) -> np.ndarray:
    """One row for each test prompt of a cell: for each budget the adaptive n, tokens and golden reward, then the tokens of an answer, then
    golden Best-of-n for n = 1 to N. Shape [P, 3 len(BUDGETS) + 1 + N]."""
    run = Run.read(folder)
    pool = stored_samples(run, "sft", "dev", "test")
    ids, finished = [s.prompt.prompt_id for s in pool], np.array([s.finished for s in pool])
    dev = np.array([s.prompt.split == "dev" for s in pool])
    (reward, _), size = selecting_reward(run, name, ids, dev, finished), ids.count(ids[0])
    worth = reward - np.ptp(reward[dev]) * ~finished  # as in `stop_early`
    golden = np.zeros(len(pool))
    test = [s for s in pool if s.prompt.split == "test"]
    golden[~dev] = golden_of(as_recipe(run.recipe))([s.prompt.content for s in test], [s.completion for s in test])
    worth_P_N, golden_P_N, tokens_P_N = (of.reshape(-1, size) for of in (worth, golden, np.array([float(s.tokens) for s in pool])))
    is_dev = dev.reshape(-1, size)[:, 0]
    laws = laws_of(worth_P_N[is_dev])
    gains_D_N = np.stack([expected_gains(of, laws, own) for own, of in enumerate(worth_P_N[is_dev])])
    costs, rng = [cost_of(gains_D_N, budget) for budget in BUDGETS], np.random.default_rng(run.seed)
    rows = []
    for keys, values, tokens in zip(worth_P_N[~is_dev], golden_P_N[~is_dev], tokens_P_N[~is_dev], strict=True):
        found = np.mean([_stopped(rng.permutation(size), keys, values, tokens, laws, costs) for _ in range(ORDERS)], axis=0)
        rows.append([*found.ravel(), tokens.mean(), *(best_of_n_weights(keys, n) @ values for n in range(1, size + 1))])
    return np.array(rows)


def _stopped(order: np.ndarray, keys: np.ndarray, golden: np.ndarray, tokens: np.ndarray, laws: Any, costs: Sequence[float]) -> list[Any]:
    """n, tokens and golden reward of the pick at each cost, answers coming in this order."""
    gains_N = expected_gains(keys[order], laws)
    taken = [order[: answers_taken(gains_N, cost)] for cost in costs]
    return [(len(of), tokens[of].sum(), golden[of[keys[of].argmax()]]) for of in taken]


def first_n(curve_N: np.ndarray, value: float) -> float:
    """The first n at which a curve over n = 1 to N reaches the value, between two n in proportion; N where none does."""
    reached = np.flatnonzero(curve_N >= value)
    if not len(reached) or reached[0] == 0:
        return 1.0 if len(reached) else float(len(curve_N))
    i = int(reached[0])
    return float(i + (value - curve_N[i - 1]) / (curve_N[i] - curve_N[i - 1]))


def compare(means_K: np.ndarray, budget: int) -> tuple[float, float]:
    """`saved` and `more` from the mean row of `measure`."""
    _, tokens, golden = means_K[3 * budget : 3 * budget + 3]
    answer, curve_N = means_K[3 * len(BUDGETS)], means_K[3 * len(BUDGETS) + 1 :]
    equal = np.interp(tokens / answer, np.arange(1, len(curve_N) + 1), curve_N)
    return 1 - tokens / (answer * first_n(curve_N, golden)), golden - equal


def summarise(settings: Mapping[str, Sequence[np.ndarray]], seed: int = 0) -> list[dict[str, Any]]:
    """A row for each budget over these settings, each a list of cells as `measure` gives them."""
    rng = np.random.default_rng(seed)
    whole = np.mean([np.mean([cell.mean(0) for cell in cells], axis=0) for cells in settings.values()], axis=0)
    drawn_R_K = np.zeros((RESAMPLES, len(whole)))
    for cells in settings.values():
        weights = [rng.multinomial(len(c), np.full(len(c), 1 / len(c)), size=RESAMPLES) / len(c) for c in cells]
        means_S_R_K = np.stack([of @ cell for of, cell in zip(weights, cells, strict=True)])
        seeds_S_R = rng.integers(len(cells), size=(len(cells), RESAMPLES))
        draws_S_R = rng.integers(RESAMPLES, size=seeds_S_R.shape)  # a seed drawn twice gives two draws of its prompts
        drawn_R_K += means_S_R_K[seeds_S_R, draws_S_R].mean(0) / len(settings)
    rows = []
    for i, budget in enumerate(BUDGETS):
        low, high = np.percentile([compare(means, i) for means in drawn_R_K], [2.5, 97.5], axis=0)
        saved, more = ({"mean": m, "ci95": [a, b]} for m, a, b in zip(compare(whole, i), low.tolist(), high.tolist(), strict=True))
        n, tokens, golden = whole[3 * i : 3 * i + 3].tolist()
        equal = first_n(whole[3 * len(BUDGETS) + 1 :], golden)
        row = {"budget": budget, "n": n, "tokens": tokens, "golden": golden, "equal_n": equal, "saved": saved, "more": more}
        rows.append({**row, "cells": sum(map(len, settings.values()))})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=Path, nargs="?", help="a folder of finished cells, SETTING/seed-K")
    parser.add_argument("--quick", action="store_true", help="one small cell, made for it, under a minute")
    parser.add_argument("--seeds", default="0..9", help="0..9, or 0,3,5")
    parser.add_argument("--only", default="*", help="settings by name, such as 'arithmetic*'")
    parser.add_argument("--reward", default=CHOSEN, help="the one that `irlign run` selects by, or likelihood, init-sft, init-demo, ...")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    if (given.cells is None) != given.quick:
        parser.error("give a folder of finished cells, or --quick")
    if given.quick:
        with tempfile.TemporaryDirectory() as place:
            return report(quick_cell(Path(place)), given, parser)
    return report(given.cells, given, parser)


def report(cells: Path, given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The table over these cells, printed and written."""
    known = finished([cells], given.only, parse_seeds(given.seeds))
    settings = {setting: [measure(folder, given.reward) for folder in folders] for setting, folders in known.items()}
    if not settings:
        parser.error(f"no finished cell of these seeds below {cells}")
    rows = []
    for name, of in {**{name: {name: cells} for name, cells in settings.items()}, "all": settings}.items():
        for row in summarise(of):
            rows.append({"setting": name, **row})
            saved, more = (
                f"{e['mean']:{f}} [{e['ci95'][0]:{f}}, {e['ci95'][1]:{f}}]" for e, f in ((row["saved"], ".0%"), (row["more"], "+.3f"))
            )
            print(f"{name:30} {row['cells']:3} cells  budget {row['budget']}: n {row['n']:5.2f}, {row['tokens']:6.1f} tokens, golden {row['golden']:.3f}, "
                  f"as Best-of-{row['equal_n']:.2f}; saved {saved}, more {more}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

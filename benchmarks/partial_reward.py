"""Best-of-n that stops answers early: those with the worse reward so far are dropped, against Best-of-n of whole answers at equal tokens.

    python benchmarks/partial_reward.py runs/arena/cells [MORE ...] [--only 'dialogue*'] [--tune 100..104] [--seeds 0..9] [--json FILE]
    python benchmarks/partial_reward.py --quick

Cells of the arena, finished and only read; `--quick` makes a small one, in under a minute. In each the reward is the one that `irlign run` selects by. Every one of
the first n answers to a test prompt is drawn for t tokens, t being a share (`seen`) of a dev answer's mean length; the reward reads what is there: the learned one with EOS
behind it, as it reads any text, the likelihood without. Answers that have ended by then cost nothing more; of the others the worse share (`dropped`) is dropped, the rest is
drawn to its end, and the best by the reward of whole answers is taken. `more` is its golden reward less that of Best-of-n over whole answers for as many tokens in all (exact expectation, between
two n in proportion), `saved` the share of the tokens of whole answers for an equal golden reward, both of means over cells, and all the mean over ORDERS random orders of each pool. One `seen` and `dropped` is chosen by the mean of `more` over settings and n on the seeds of `--tune`, and measured on those of `--seeds`; golden
rewards are read for both and by nothing else. 95 % intervals over seeds with prompts nested. Tokens are drawn ones: what the reward reads of parts is not counted. `follows`: the rank correlation of
the reward of a part with that of the whole, among the answers to a prompt that go on.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adaptive_bon import ORDERS, Scales, finished, first_n, quick_cell, selecting_reward
from scipy.stats import spearmanr

from irlign.arena.cell import golden_of
from irlign.arena.methods import CHOSEN
from irlign.config import parse_seeds
from irlign.data.chat import Encoded, Format
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.recipe import as_recipe
from irlign.records import Sample
from irlign.reward.ensemble import combine, standardised
from irlign.reward.load import load_reward
from irlign.reward.model import Classifier
from irlign.runs import Run
from irlign.sampling.pools import stored_samples
from irlign.statistics import best_of_n_weights, nested_estimate

SEEN, DROPPED, SIZES = (0.25, 0.5, 0.75), (0.5, 0.75), (8, 16, 32)
Cells = Mapping[str, Sequence[Path]]  # the seeds of each setting
Choice = tuple[float, float]  # seen and dropped


def rewards_of_parts(run: Run, samples: Sequence[Sample], most: int, scales: Scales | None) -> np.ndarray:
    """The selecting reward of the first `most` tokens of each answer; `scales` None: the likelihood alone. Shape [rows]."""
    policy = load_policy(str(run.path("policies/sft")))
    form = Format(policy.tokenizer, as_recipe(run.recipe).data.chat_template)
    rows = form.encode([s.prompt.content for s in samples], [s.completion for s in samples])
    parts = [Encoded(row.prompt_ids, row.completion_ids[:most]) for row in rows]
    likely = sequence_log_probs(policy, parts) / [len(part.completion_ids) for part in parts]
    if scales is None:
        return likely
    reward, end = load_reward(run.path("rewards/init-sft")), form.tokenizer.eos_token_id
    assert isinstance(reward, Classifier)
    learned = reward.logits([Encoded(part.prompt_ids, [*part.completion_ids, end]) for part in parts])[:, 0]
    return combine(standardised(np.stack([learned, likely]), np.array(scales)), "mean", 0.0)


def pruned(parts: np.ndarray, worth: np.ndarray, golden: np.ndarray, tokens: np.ndarray, most: int, dropped: float) -> tuple[float, float]:
    """Tokens drawn, and the golden reward of the pick: the share `dropped` (rounded down) of those that go on after `most` tokens ends there, lowest
    `parts` first; the highest `worth` of the others is taken. All of shape [n], in the order drawn."""
    going = np.flatnonzero(tokens > most)
    order = going[np.argsort(parts[going], kind="stable")]
    ended = order[: int(dropped * len(going))]
    left = np.setdiff1d(np.arange(len(worth)), ended)
    return float(tokens[left].sum() + most * len(ended)), float(golden[left[worth[left].argmax()]])


def beyond(golden_P: np.ndarray, tokens_P: np.ndarray, answer_P: np.ndarray, curve_P_N: np.ndarray) -> tuple[float, np.ndarray]:
    """The n of whole answers that costs as many tokens over these prompts, and by how much `golden_P` exceeds Best-of-n there: shape [P].
    `answer_P` is the mean length of an answer, `curve_P_N` golden Best-of-n for n = 1 to N."""
    n = float(np.clip(tokens_P.mean() / answer_P.mean(), 1, curve_P_N.shape[1]))
    low = min(int(n), curve_P_N.shape[1] - 1) - 1
    share = n - 1 - low
    return n, golden_P - (1 - share) * curve_P_N[:, low] - share * curve_P_N[:, low + 1]


def measure(folder: Path, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """A row for each choice and n of one cell: the equal n, `golden_P` and `more_P` of shape [P], golden Best-of-n as `curve_N`, and `follows`."""
    run = Run.read(folder)
    pool = stored_samples(run, "sft", "dev", "test")
    ids, finished = [s.prompt.prompt_id for s in pool], np.array([s.finished for s in pool])
    dev = np.array([s.prompt.split == "dev" for s in pool])
    (reward, scales), size = selecting_reward(run, CHOSEN, ids, dev, finished), ids.count(ids[0])
    worth = reward - np.ptp(reward[dev]) * ~finished  # as in `stop_early`
    tokens, test = np.array([float(s.tokens) for s in pool]), [s for s in pool if s.prompt.split == "test"]
    golden = np.array(golden_of(as_recipe(run.recipe))([s.prompt.content for s in test], [s.completion for s in test]))
    golden_P_N, worth_P_N, tokens_P_N = (of.reshape(-1, size) for of in (golden, worth[~dev], tokens[~dev]))
    curve_P_N = np.array([[best_of_n_weights(w, n) @ g for n in range(1, size + 1)] for w, g in zip(worth_P_N, golden_P_N, strict=True)])
    places = {seen: max(1, round(seen * float(tokens[dev].mean()))) for seen, _ in choices}
    parts = {seen: rewards_of_parts(run, test, most, scales).reshape(-1, size) for seen, most in places.items()}
    rows = []
    for seen, dropped in choices:
        alike = [_alike(*of, places[seen]) for of in zip(parts[seen], worth_P_N, tokens_P_N, strict=True)]
        for n in sorted({min(n, size) for n in SIZES}):
            rng, found = np.random.default_rng(run.seed), []
            for of in zip(parts[seen], worth_P_N, golden_P_N, tokens_P_N, strict=True):
                orders = [rng.permutation(size)[:n] for _ in range(ORDERS)]
                found.append(np.mean([pruned(*(value[order] for value in of), places[seen], dropped) for order in orders], axis=0))
            drawn_P, golden_P = np.transpose(found)
            equal, more_P = beyond(golden_P, drawn_P, tokens_P_N.mean(1), curve_P_N)
            about = {"seen": seen, "dropped": dropped, "n": n, "follows": float(np.nanmean(alike)), "curve_N": curve_P_N.mean(0)}
            rows.append({**about, "equal_n": equal, "golden_P": golden_P, "more_P": more_P})
    return rows


def _alike(parts: np.ndarray, worth: np.ndarray, tokens: np.ndarray, most: int) -> float:
    """Rank correlation among the answers that go on; nan where there is none."""
    going = tokens > most
    varied = min(len(set(of[going])) for of in (parts, worth)) > 1
    return float(spearmanr(parts[going], worth[going]).statistic) if varied else np.nan


def choose_one(tuned: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Choice:
    """The choice with the most `more`, over settings, which weigh alike, and n."""
    means: dict[Choice, list[float]] = {}
    for cells in tuned.values():
        own: dict[Choice, list[float]] = {}
        for row in (row for cell in cells for row in cell):
            own.setdefault((row["seen"], row["dropped"]), []).append(float(row["more_P"].mean()))
        for choice, values in own.items():
            means.setdefault(choice, []).append(float(np.mean(values)))
    return max(means, key=lambda choice: np.mean(means[choice]))


def summarise(cells: Sequence[Sequence[Mapping[str, Any]]], **about: Any) -> list[dict[str, Any]]:
    """A row for each choice and n over these cells, as `measure` gives them."""
    rows = []
    for own in zip(*cells, strict=True):
        mean = {key: float(np.mean([row[key] for row in own])) for key in ("equal_n", "follows")}
        key = {key: own[0][key] for key in ("seen", "dropped", "n")}
        golden = float(np.mean([row["golden_P"].mean() for row in own]))
        saved = 1 - mean["equal_n"] / first_n(np.mean([row["curve_N"] for row in own], axis=0), golden)
        more = nested_estimate([row["more_P"] for row in own]).to_json()
        rows.append({**about, **key, "cells": len(own), **mean, "golden": golden, "saved": saved, "more": more})
    return rows


def show(row: Mapping[str, Any]) -> None:
    low, high = row["more"]["ci95"]
    print(f"{row['seeds']:10} {row['setting']:30} {row['cells']:3} cells  seen {row['seen']:.0%}, dropped {row['dropped']:.0%}, follows {row['follows']:.2f}: n {row['n']:2}, tokens of Best-of-{row['equal_n']:.1f}, "
          f"golden {row['golden']:.3f}, saved {row['saved']:.0%}, more {row['more']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)  # fmt: skip


def study(tuning: Cells, cells: Cells) -> list[dict[str, Any]]:
    """All choices on the first cells, the best of them on the others: the rows, printed as they are known."""
    rows: list[dict[str, Any]] = []

    def told(found: Mapping[str, Sequence[Any]], seeds: str) -> None:
        for setting, own in {**found, "all": [cell for of in found.values() for cell in of]}.items():
            rows.extend(summarise(own, seeds=seeds, setting=setting))
        for row in (row for row in rows if row["seeds"] == seeds):
            show(row)

    choices = [(seen, dropped) for seen in SEEN for dropped in DROPPED]
    tuned = {setting: [measure(folder, choices) for folder in folders] for setting, folders in tuning.items()}
    told(tuned, "tuning")
    chosen = choose_one(tuned)
    told({setting: [measure(folder, [chosen]) for folder in folders] for setting, folders in cells.items()}, "evaluation")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=Path, nargs="*", help="folders of finished cells, SETTING/seed-K")
    parser.add_argument("--quick", action="store_true", help="one small cell, made for it, under a minute")
    parser.add_argument("--tune", default="100..104", help="seeds on which what is seen and dropped is chosen")
    parser.add_argument("--seeds", default="0..9", help="seeds on which that is measured: 0..9, or 0,3,5")
    parser.add_argument("--only", default="*", help="settings by name, such as 'arithmetic*'")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    if bool(given.cells) == given.quick:
        parser.error("give folders of finished cells, or --quick")
    if given.quick:
        with tempfile.TemporaryDirectory() as place:
            own = finished([quick_cell(Path(place))], "*", [0])
            rows = study(own, own)
    else:
        tuning, cells = (finished(given.cells, given.only, parse_seeds(seeds)) for seeds in (given.tune, given.seeds))
        if not (tuning and cells):
            parser.error(f"no finished cell of seeds {given.seeds if tuning else given.tune} below {', '.join(map(str, given.cells))}")
        rows = study(tuning, cells)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

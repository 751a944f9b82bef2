"""How many answers each prompt deserves: draw on while one more is expected to gain more than it costs.

With a cost c for an answer and the best so far kept, were the law of a prompt's rewards known, it would be optimal to stop once the best
b has reached the reservation value, where `E max(r - b, 0) = c` (Weitzman's Pandora rule; for Best-of-N arXiv 2510.01394). It is not
known, but the dev prompts show what it may be: each of their pools is a possible law, up to a shift, all alike likely before the first
answer and weighed by Bayes' rule as answers come in. The gain is expected over them, one answer ahead; looking no further is what keeps
the rule from being optimal where the laws differ. The cost is the one at which the dev prompts take the budget.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from irlign.errors import ConfigError, DataError
from irlign.records import SCORE

FEWEST = 20  # dev prompts: fewer say too little about what a prompt may be like


@dataclass(frozen=True)
class Laws:
    """What the rewards of a prompt may be like: the pools of J known prompts, shape [J, M], the mean and the variance of each, shape [J], and
    by how much (standard deviation) a prompt's mean may lie beside that of the pool it is like."""

    pools_J_M: np.ndarray
    means_J: np.ndarray
    variances_J: np.ndarray
    beside: float


def laws_of(pools_J_M: np.ndarray) -> Laws:
    """Each pool as a law. `beside` is a kernel's width by Scott's rule, so that means between those of known prompts are possible; a pool's
    variance is averaged with one answer's worth of the mean variance, so that answers that were all alike make no law without spread."""
    count, size = pools_J_M.shape
    means_J, variance_J = pools_J_M.mean(1), pools_J_M.var(axis=1, ddof=1)
    smoothed_J = ((size - 1) * variance_J + variance_J.mean()) / size
    return Laws(pools_J_M, means_J, np.where(smoothed_J > 0, smoothed_J, 1.0), float(means_J.std() * count**-0.2))


def expected_gains(rewards_N: np.ndarray, laws: Laws, own: int | None = None) -> np.ndarray:
    """After each of a prompt's N answers, in the order drawn, what one more is expected to add to the best, in units of the reward. Shape [N].

    `sum_j w_j E_j max(r + d_j - best, 0)`: E_j is over the pool of law j, d_j its expected shift, and `w_j` the likelihood of the answers so
    far, normal with the law's variance around a mean that is normal around the pool's. `own` is the law that the prompt itself gave: it is
    left out.
    """
    count_N_1, square, variance_J = np.arange(1, len(rewards_N) + 1)[:, None], laws.beside**2, laws.variances_J
    off_N_J = rewards_N[:, None] - laws.means_J
    shift_N_J = square * np.cumsum(off_N_J, axis=0) / (variance_J + count_N_1 * square)
    before_N_J = np.concatenate([np.zeros((1, len(variance_J))), shift_N_J[:-1]])
    predicted_N_J = variance_J * (1 + square / (variance_J + (count_N_1 - 1) * square))
    logs_N_J = np.cumsum(-0.5 * ((off_N_J - before_N_J) ** 2 / predicted_N_J + np.log(predicted_N_J)), axis=0)
    if own is not None:
        logs_N_J[:, own] = -np.inf
    missing_N_J = np.maximum.accumulate(rewards_N)[:, None] - shift_N_J
    ahead_N_J = np.maximum(laws.pools_J_M - missing_N_J[:, :, None], 0.0).mean(-1)
    return (softmax(logs_N_J, axis=1) * ahead_N_J).sum(1)


def answers_taken(gains_N: np.ndarray, cost: float) -> int:
    """How many of N answers are drawn: until one more is expected to gain no more than `cost`, or all."""
    stops = np.flatnonzero(gains_N <= cost)
    return int(stops[0]) + 1 if len(stops) else len(gains_N)


def cost_of(gains_P_N: np.ndarray, budget: float) -> float:
    """The lowest cost at which these prompts take at most `budget` answers on average; 0 where all they could gain is within it.

    A prompt goes past its i-th answer while the running minimum of its gains is above the cost, and `(budget - 1) P` such steps may be
    taken: the cost is the largest that must not be.
    """
    steps = np.sort(np.minimum.accumulate(gains_P_N[:, :-1], axis=1), axis=None)[::-1]
    may = int((budget - 1) * len(gains_P_N) + 1e-9)
    return float(steps[may]) if may < len(steps) else 0.0


def answers_used(
    rows: Sequence[Mapping[str, Any]], choice: Mapping[str, Any], budget: float | None
) -> tuple[dict[str, int], dict[str, Any] | None]:
    """How many answers of each prompt selection looks at: the n of the choice, or with a budget among as many of those as the prompt
    deserves; and what choice.json says of the latter. Raises as `stop_early` does."""
    if budget is None or choice["n"] == 1:
        return {row["prompt_id"]: choice["n"] for row in rows}, None
    return stop_early(rows, choice["reward"], choice["n"], budget)


def stop_early(rows: Sequence[Mapping[str, Any]], reward: str, most: int, budget: float) -> tuple[dict[str, int], dict[str, Any]]:
    """How many answers of each prompt are used, at most `most` and on average `budget` on dev, and what choice.json says of it.

    Rows as in candidates.parquet. Nothing of a test prompt but its own answers decides its number. Raises ConfigError for too few dev
    prompts, DataError for one with fewer than `most` answers.
    """
    split = {row["prompt_id"]: row["split"] for row in rows}
    known = [prompt_id for prompt_id, of in split.items() if of == "dev"]
    if len(known) < FEWEST:
        what = f"{len(known)} dev prompts say too little about what a prompt's rewards may be like ({FEWEST} are needed)"
        raise ConfigError(what, where="best_of_n.budget", do="leave it out, or hold out more prompts (data.dev_prompts)")
    worth, places = _worth(rows, reward, {*known}), {prompt_id: place for place, prompt_id in enumerate(known)}
    size, fewest = min((len(worth[prompt_id]), prompt_id) for prompt_id in known)
    if size < most:
        what = f"dev prompt {fewest} has {size} answer{'s' * (size > 1)}, and a prompt may use {most}"
        raise DataError(what, where="best_of_n.budget", do=f"give it more, lower best_of_n.n to {size}, or leave the budget out")
    laws = laws_of(np.stack([worth[prompt_id][:size] for prompt_id in known]))
    gains = {prompt_id: expected_gains(of[:most], laws, places.get(prompt_id)) for prompt_id, of in worth.items()}
    cost = cost_of(np.stack([gains[prompt_id] for prompt_id in known]), budget)
    used = {prompt_id: answers_taken(of, cost) for prompt_id, of in gains.items()}
    means = {name: float(np.mean([n for p, n in used.items() if split[p] == name])) for name in dict.fromkeys(split.values())}
    return used, {"budget": budget, "most": most, "cost": cost, "n": means}


def _worth(rows: Sequence[Mapping[str, Any]], reward: str, known: set[str]) -> dict[str, np.ndarray]:
    """The rewards of each prompt's answers in the order drawn; those cut at the limit are lowered by the range of the rewards of the known
    prompts, since none is picked before a finished one."""
    column = f"{SCORE}{reward}"
    lower = float(np.ptp([row[column] for row in rows if row["prompt_id"] in known]))
    found: dict[str, list[float]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["index"]):
        found[row["prompt_id"]].append(row[column] - lower * (row["finish_reason"] == "length"))
    return {prompt_id: np.array(of) for prompt_id, of in found.items()}

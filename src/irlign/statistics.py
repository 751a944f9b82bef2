"""Numbers from numbers: bootstrap intervals, permutation tests, the Best-of-n estimator and its KL bound.

Units: prompts within a run, seeds across runs (method.md section 8). Every random choice takes a seed, so a figure can be
computed again.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.special import expit, gammaln
from scipy.stats import rankdata

from irlign.records import Estimate, PairedTest

RESAMPLES = 10_000


def estimate(values_P: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over prompts with its percentile bootstrap interval. Raises ValueError without values."""
    values = np.asarray(values_P, dtype=float)
    if not len(values):
        raise ValueError("no values to average")
    return Estimate(float(values.mean()), _interval(_bootstrap_means(values, resamples, seed)), len(values))


def nested_estimate(values_S_P: Sequence[Sequence[float] | np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over seeds of the mean over prompts; seeds are drawn, then prompts within each drawn seed."""
    groups = [np.asarray(values, dtype=float) for values in values_S_P]
    rng = np.random.default_rng(seed)
    means_S_R = np.stack([_bootstrap_means(group, resamples, rng) for group in groups])
    seeds_S_R, draws_S_R = rng.integers(len(groups), size=means_S_R.shape), rng.integers(resamples, size=means_S_R.shape)
    means_R = means_S_R[seeds_S_R, draws_S_R].mean(0)  # a seed drawn twice gives two draws of its prompts
    return Estimate(float(np.mean([group.mean() for group in groups])), _interval(means_R), sum(map(len, groups)))


def nested_ratio(
    numerators_S_P: Sequence[np.ndarray], denominators_S_P: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """The sum of the numerators' means over seeds, over that of the denominators' (method.md section 8: gap closed, regret); seeds
    are drawn, then the same prompts of both sides within each drawn seed. None where the denominator is not above 0; a resample in
    which it is not counts as unbounded.
    """
    pairs = [np.stack([a, b]).astype(float) for a, b in zip(numerators_S_P, denominators_S_P, strict=True)]
    rng = np.random.default_rng(seed)
    drawn_S = []
    for pair in pairs:
        weights_R_P = rng.multinomial(pair.shape[1], np.full(pair.shape[1], 1 / pair.shape[1]), size=resamples) / pair.shape[1]
        drawn_S.append(weights_R_P @ pair.T)
    seeds_S_R, draws_S_R = (rng.integers(most, size=(len(pairs), resamples)) for most in (len(pairs), resamples))
    sums_R_2 = np.stack(drawn_S)[seeds_S_R, draws_S_R].sum(0)
    whole = sum(pair.mean(1) for pair in pairs)
    if whole[1] <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios_R = np.where(sums_R_2[:, 1] > 0, sums_R_2[:, 0] / sums_R_2[:, 1], np.copysign(np.inf, sums_R_2[:, 0]))
    low, high = np.quantile(ratios_R, [0.025, 0.975], method="closest_observation")
    return Estimate(float(whole[0] / whole[1]), (float(low), float(high)), sum(pair.shape[1] for pair in pairs))


def worse_p(difference_P: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """One-sided p of a sign-flip permutation test over prompts that the mean difference is below 0; never 0, 1 without a difference."""
    difference = np.asarray(difference_P, dtype=float)
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(resamples, len(difference)):
        signs = rng.integers(0, 2, size=(size, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((signs @ difference <= difference.sum() + 1e-9).sum())
    return (1 + extreme) / (1 + resamples)


def paired_test(
    a: str,
    b: str,
    values_a_P: Sequence[float] | np.ndarray,
    values_b_P: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """a minus b over the same prompts: mean, bootstrap interval, two-sided p of a sign-flip permutation test.

    p counts the observed signs as one of the permutations, so it is never 0.
    """
    difference = np.asarray(values_a_P, dtype=float) - np.asarray(values_b_P, dtype=float)
    difference[np.abs(difference) < 1e-9 * max(1.0, float(np.abs(values_a_P).max()))] = 0.0  # what rounding left is no difference
    mean = estimate(difference, resamples=resamples, seed=seed)
    rng = np.random.default_rng(seed + 1)
    extreme = 0
    observed = abs(difference.sum()) - 1e-9
    for size in _chunks(resamples, len(difference)):
        signs = rng.integers(0, 2, size=(size, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return PairedTest(a, b, mean.mean, mean.ci95, (1 + extreme) / (1 + resamples), len(difference))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: each p as it counts among all of them, in the given order."""
    corrected, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = running
    return corrected


def best_of_n(selecting_N: np.ndarray, measured_N: np.ndarray, n: int, finished_N: np.ndarray | None = None) -> float:
    """Expected `measured` of the answer that `selecting` picks among n drawn without replacement from the pool of N.

    `sum_{i=n..N} C(i-1, n-1) / C(N, n) g_(i)`, i ranking by the selecting reward ascending, g averaged over equal rewards
    (method.md section 4). With `finished`, an unfinished answer ranks below every finished one. Raises ValueError for n > N.
    """
    return float(best_of_n_weights(rank_keys(selecting_N, finished_N), n) @ np.asarray(measured_N, dtype=float))


def best_of_n_weights(keys_N: np.ndarray, n: int) -> np.ndarray:
    """The probability that each of N answers is the pick among n of them, ties shared; shape [N], sums to 1."""
    total = len(keys_N)
    if not 1 <= n <= total:
        raise ValueError(f"n={n} does not lie between 1 and the pool's {total}")
    i = np.arange(1, total + 1)
    with np.errstate(invalid="ignore"):
        log_weights = _log_choose(i - 1, n - 1) - _log_choose(np.array(total), n)
    by_rank = np.where(i >= n, np.exp(log_weights), 0.0)
    cumulative = np.concatenate([[0.0], np.cumsum(by_rank)])
    high, low = rankdata(keys_N, "max"), rankdata(keys_N, "min") - 1
    return (cumulative[high] - cumulative[low]) / (high - low)


def best_of_n_law(base_Y: np.ndarray, reward_Y: np.ndarray, n: int) -> np.ndarray:
    """The exact law of the best of n independent draws from `base`, equal rewards shared in proportion. Shape [Y].

    A group of equal rewards is the best with probability `F(<=)^n - F(<)^n`.
    """
    _, group_Y = np.unique(reward_Y, return_inverse=True)
    mass = np.bincount(group_Y, base_Y)
    upto = np.cumsum(mass)
    best = upto**n - np.concatenate([[0.0], upto[:-1]]) ** n
    share = np.divide(best, mass, out=np.zeros_like(best), where=mass > 0)
    return base_Y * share[group_Y]


def kl_bound(n: int) -> float:
    """`KL(Best-of-n || policy) <= log n - (n - 1) / n`, in nats (method.md section 4); loose where answers repeat."""
    return float(np.log(n) - (n - 1) / n)


def best_of_n_kl(answers_N: Sequence[str], keys_N: np.ndarray, n: int) -> float:
    """KL(Best-of-n || policy) in nats, estimated from a pool: the law of the best of n draws from the pool's own distinct
    answers. Never above `kl_bound`; well below it where answers repeat. A pool hardly larger than n gives a little less than the truth.
    """
    names, group_N, counts = np.unique(np.asarray(answers_N, dtype=object), return_inverse=True, return_counts=True)
    base = counts / len(group_N)
    reward = np.bincount(group_N, np.asarray(keys_N, dtype=float)) / counts  # one answer, one reward
    law = best_of_n_law(base, reward, n)
    return float(np.sum(law * np.log(np.divide(law, base, out=np.ones(len(names)), where=law > 0))))


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself."""
    powers = [2**k for k in range(largest.bit_length()) if 2**k <= largest]
    return powers if powers[-1] == largest else [*powers, largest]


def oracle_n(curves_P_n: np.ndarray, seed: int = 0) -> np.ndarray:
    """Each prompt's value at the n that is best on the other half of the prompts (method.md section 8). Shape [P].

    `curves_P_n` holds one curve for each prompt. One prompt alone is read at its own best n.
    """
    half_P = np.zeros(len(curves_P_n), dtype=bool)
    half_P[np.random.default_rng(seed).permutation(len(curves_P_n))[: len(curves_P_n) // 2]] = True
    values_P = np.zeros(len(curves_P_n))
    for side in (True, False):
        other = curves_P_n[half_P != side]
        best = int((other if len(other) else curves_P_n).mean(0).argmax())
        values_P[half_P == side] = curves_P_n[half_P == side, best]
    return values_P


def auc(better: Sequence[float] | np.ndarray, worse: Sequence[float] | np.ndarray) -> float:
    """The probability that a better one scores higher than a worse one, a tie counting half."""
    ranks = rankdata([*better, *worse])
    wins = ranks[: len(better)].sum() - len(better) * (len(better) + 1) / 2
    return float(wins / (len(better) * len(worse)))


def spread_within(groups: Sequence[str], values: Sequence[float] | np.ndarray) -> float:
    """The standard deviation of values around their group's mean; 1 where none varies."""
    which, found = np.unique(np.asarray(groups), return_inverse=True)[1], np.asarray(values, dtype=float)
    if not len(found):
        return 1.0
    means = np.bincount(which, found) / np.bincount(which)
    return float(np.sqrt(np.mean((found - means[which]) ** 2))) or 1.0


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation, -1 to 1; None where one side does not vary."""
    ranks_x, ranks_y = rankdata(x), rankdata(y)
    if len(ranks_x) < 2 or np.ptp(ranks_x) == 0 or np.ptp(ranks_y) == 0:
        return None
    return float(np.corrcoef(ranks_x, ranks_y)[0, 1])


def length_controlled(
    scores_P: Sequence[float] | np.ndarray, differences_P: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The win rate at equal length, with its percentile bootstrap interval: `s(theta)` of the logistic regression
    `P(win) = s(theta + phi tanh(d / sd(d)))` of the scores (1 won, 0.5 tied, 0 lost) on the differences in length `d` (own minus other).

    The form of length-controlled AlpacaEval (arXiv 2404.04475) without its terms for the instruction. A ridge of 1e-4 on phi alone keeps it
    finite where length tells everything. Raises ValueError without values.
    """
    y_P, d_P = np.asarray(scores_P, dtype=float), np.asarray(differences_P, dtype=float)
    if not len(y_P):
        raise ValueError("no values to average")
    x_P = np.tanh(d_P / (float(d_P.std()) or 1.0))
    rng = np.random.default_rng(seed)
    whole = _rates_at_equal_length(y_P, x_P, np.full((1, len(y_P)), 1 / len(y_P)))
    drawn = [
        _rates_at_equal_length(y_P, x_P, rng.multinomial(len(y_P), np.full(len(y_P), 1 / len(y_P)), size=size) / len(y_P))
        for size in _chunks(resamples, len(y_P))
    ]
    return Estimate(float(whole[0]), _interval(np.concatenate(drawn)), len(y_P))


def _rates_at_equal_length(y_P: np.ndarray, x_P: np.ndarray, weights_R_P: np.ndarray, ridge: float = 1e-4) -> np.ndarray:
    """`s(theta)` for each row of weights, by Newton's method with steps of at most 2. Shape [R]."""
    theta_R, phi_R = np.zeros(len(weights_R_P)), np.zeros(len(weights_R_P))
    for _ in range(40):
        p_R_P = expit(theta_R[:, None] + phi_R[:, None] * x_P)
        left_R_P, curve_R_P = weights_R_P * (y_P - p_R_P), weights_R_P * p_R_P * (1 - p_R_P)
        g_theta, g_phi = left_R_P.sum(1), left_R_P @ x_P - 2 * ridge * phi_R
        a, b, c = curve_R_P.sum(1) + 1e-9, curve_R_P @ x_P, curve_R_P @ x_P**2 + 2 * ridge
        determinant = a * c - b * b
        step_R_2 = np.stack([c * g_theta - b * g_phi, a * g_phi - b * g_theta], axis=1) / determinant[:, None]
        step_R_2 = np.clip(step_R_2, -2, 2)
        theta_R, phi_R = theta_R + step_R_2[:, 0], phi_R + step_R_2[:, 1]
        if np.abs(step_R_2).max() < 1e-9:
            break
    return expit(theta_R)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all word n-grams of the texts together; 0 where there is none."""
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's word n-grams that stood in it before; 0 for a text shorter than n words."""
    counts = Counter(_ngrams(text.split(), n))
    total = sum(counts.values())
    return 1 - len(counts) / total if total else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def rank_keys(selecting_N: np.ndarray, finished_N: np.ndarray | None) -> np.ndarray:
    """Numbers in the order of preference: first whether it finished, then the reward."""
    ranks = rankdata(selecting_N, "min")
    return ranks if finished_N is None else ranks + (len(ranks) + 1) * np.asarray(finished_N, dtype=float)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _bootstrap_means(values: np.ndarray, resamples: int, seed: int | np.random.Generator) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(1) for size in _chunks(resamples, len(values))])


def _chunks(resamples: int, width: int) -> list[int]:
    """Rows at a time, so that no table passes about 2 million cells."""
    step = max(1, 2_000_000 // max(1, width))
    return [min(step, resamples - done) for done in range(0, resamples, step)]


def _interval(means_R: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)

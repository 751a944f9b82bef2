"""Where more samples make the answer worse: Gao's law fitted to a Best-of-n curve, the peak that it predicts, and alarms.

Source of the law: arXiv 2210.10760, `R_bon(d) = d (alpha - beta d)` with `d = sqrt(KL(Best-of-n || policy))` (method.md section 4).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GaoFit:
    """`gain = d (alpha - beta d)` by least squares over the curve's points, gains counted from n = 1.

    `peak_n` is where it is highest, between 1 and the largest n; `beyond` says that the fit still rises there, so that the
    peak lies further out. `ci95` is the bootstrap interval of `peak_n` over prompts. `r2` is the share of the curve's
    variation that the law explains.
    """

    alpha: float
    beta: float
    peak_n: float
    beyond: bool
    ci95: tuple[float, float]
    r2: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95)}


def fit_gao(curves_P_n: np.ndarray, n: list[int], kl_n: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> GaoFit | None:
    """The law fitted to the mean of each prompt's curve, `kl_n` in nats at each n; None for fewer than three points."""
    d = np.sqrt(np.maximum(kl_n, 0.0))
    if len(n) < 3 or d[-1] <= 0:
        return None
    gains_P_n = curves_P_n - curves_P_n[:, :1]
    solve = np.linalg.pinv(np.stack([d, -(d**2)], axis=1))
    mean_n = gains_P_n.mean(0)
    alpha, beta = solve @ mean_n
    rng = np.random.default_rng(seed)
    weights_R_P = rng.multinomial(len(gains_P_n), np.full(len(gains_P_n), 1 / len(gains_P_n)), size=resamples) / len(gains_P_n)
    fits_R = (weights_R_P @ gains_P_n) @ solve.T
    peaks = [_peak(a, b, d, n) for a, b in fits_R]
    left = mean_n - (alpha * d - beta * d**2)
    total = float(((mean_n - mean_n.mean()) ** 2).sum())
    low, high = np.percentile(peaks, [2.5, 97.5])
    peak = _peak(alpha, beta, d, n)
    r2 = 1 - float((left**2).sum()) / total if total > 0 else 0.0
    return GaoFit(float(alpha), float(beta), peak, peak > n[-1] * (1 - 1e-9), (float(low), float(high)), r2)


def _peak(alpha: float, beta: float, d: np.ndarray, n: list[int]) -> float:
    """The n of the highest point of `d (alpha - beta d)` between the first and the last d, log n interpolated in d."""
    ends = max((0.0, float(d[-1])), key=lambda x: x * (alpha - beta * x))
    top = alpha / (2 * beta) if beta > 0 and 0 <= alpha / (2 * beta) <= d[-1] else ends
    return float(np.exp(np.interp(top, d, np.log(n))))


MEANT = {"style": "the demonstrator's style (what tells its answers to other prompts from initial samples)"}
FOLLOWS, OUTLIERS, SPREAD, CHANCE, SATURATED = 0.5, 0.2, 0.2, 0.55, 0.99  # where an alarm goes off


def alarms(heldout: Mapping[str, Any], choice: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a user should look at before trusting the result, each `{"name", "seen", "do"}`; none needs a golden reward.

    Measures are of the test prompts; an alarm goes off where the whole 95 % interval lies past its threshold.
    """
    found = [*_weak_links(heldout, choice), *_hacking(heldout, choice)]
    return [{"name": name, "seen": seen, "do": do} for name, seen, do in found]


def _weak_links(heldout: Mapping[str, Any], choice: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Weak alignment, and which link is weak (SFT, reward, pool)."""
    nll, auc, distinct = heldout["demonstration_nll"], heldout["reward_auc"], heldout["distinct_answers"]
    if nll and nll["initial"] is not None and nll["sft"] >= nll["initial"]:
        seen = f"the loss on unseen demonstrations did not fall: {nll['initial']:.3f} before SFT, {nll['sft']:.3f} after"
        yield (
            "SFT did not move toward the demonstrator",
            seen,
            "train SFT longer or with another learning rate, or check the data with `irlign validate`",
        )
    if auc and auc["ci95"][1] < CHANCE:
        seen = f"on unseen prompts the reward tells SFT's answers from initial ones in {auc['mean']:.0%} of the pairs"
        yield "the reward is at chance", seen, "draw more sampling.train_generations, train it longer, or move SFT further"
    if auc and auc["ci95"][0] > SATURATED:
        seen = f"on unseen prompts the reward tells SFT's answers from initial ones in {auc['mean']:.1%} of the pairs"
        yield "the reward is saturated", seen, "read what separates them: an ending, a format; it may see nothing finer"
    if distinct["ci95"][1] < SPREAD:
        seen = f"only {distinct['mean']:.0%} of a prompt's answers differ"
        yield "the pool has no spread", seen, "raise sampling.temperature or top_p, or train SFT less: there is little to choose from"


def _hacking(heldout: Mapping[str, Any], choice: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What selection by a wrong reward looks like."""
    for what in ("length", "repetition", "style"):
        e = heldout[f"{what}_correlation"]
        if e and (e["ci95"][0] > FOLLOWS or e["ci95"][1] < -FOLLOWS):
            seen = f"its rank correlation with {MEANT.get(what, what)} within a prompt is {e['mean']:+.2f}"
            yield (
                f"the reward follows {what}",
                seen,
                f"compare the picks with the control; keep reward.ending=match, and judge {what} by eye",
            )
    outliers, agreement, judged = (heldout[key] for key in ("outlier_picks", "judge_correlation", "judge"))
    if outliers and outliers["ci95"][0] > OUTLIERS:
        seen = f"{outliers['mean']:.0%} of the picks lie two standard deviations below their pool in log-probability a token"
        yield "picks are outliers under SFT", seen, "lower best_of_n.n: the reward picks what SFT hardly ever says"
    if agreement and agreement["ci95"][1] < 0:
        seen = f"within a prompt its rank correlation with the judge of held-out demonstrations is {agreement['mean']:+.2f}"
        yield "the reward and the judge disagree", seen, "try another reward.contrast, or keep SFT"
    if (told := choice.get("auc")) is not None and told < CHANCE:
        seen = f"on prompts it was not fitted on, its AUC is {told:.2f} over {choice['demonstrations']} demonstrations; 0.5 is chance"
        yield (
            "the judge cannot tell demonstrations from other answers",
            seen,
            "do not rely on its choice of n: set best_of_n.n, and read the samples",
        )
    if judged:
        top = max(judged, key=lambda n: judged[n]["mean"])
        last = list(judged)[-1]
        if judged[last]["ci95"][1] < judged[top]["mean"] and int(last) > choice["n"]:
            seen = f"the gain is {judged[top]['mean']:+.2f} sd at n = {top} and {judged[last]['mean']:+.2f} at n = {last}"
            yield (
                "by the judge, the held-out curve turns down",
                seen,
                f"n = {choice['n']} is used; a larger best_of_n.n would be over-optimised",
            )
    if choice["label_free"] is not None and choice["n"] > choice["label_free"]:
        seen = f"best_of_n.n={choice['n']} was given, and the judge would take {choice['label_free']}"
        yield "n is larger than the judge would take", seen, "leave best_of_n.n out, or read the curve before you publish"


FAR, REPEATS = 2.0, 0.1  # standard deviations from the pool's mean; share of repeated trigrams


def deviation(value: float, pool_N: np.ndarray) -> float:
    """How many standard deviations of its prompt's pool a value lies above the mean; 0 where nothing varies."""
    return float((value - pool_N.mean()) / (pool_N.std() or np.inf))


def pick_alarms(finished: bool, words: float, likelihood: float | None, repeated: float) -> list[str]:
    """What looks wrong with one pick: whether it ended, its words and its log-probability a token as `deviation` from its pool (None where that
    is not known), and its share of repeated trigrams."""
    found = {
        "cut at the length limit": not finished,
        "far longer than its pool": words > FAR,
        "hardly ever said by its policy": likelihood is not None and likelihood < -FAR,
        "repeats itself": repeated > REPEATS,
    }
    return [name for name, seen in found.items() if seen]

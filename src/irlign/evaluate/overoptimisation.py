"""Where more samples make the answer worse: Gao's law fitted to a Best-of-n curve, and the peak that it predicts.

Source: arXiv 2210.10760, `R_bon(d) = d (alpha - beta d)` with `d = sqrt(KL(Best-of-n || policy))` (method.md section 4).
"""

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

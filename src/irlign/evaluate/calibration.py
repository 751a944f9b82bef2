"""Is the reward's probability the share that is observed? Held-out answers of pi_SFT and of pi_0 in pairs, by how sure the reward is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit


def calibration(
    better: Mapping[str, np.ndarray], worse: Mapping[str, np.ndarray], *, bins: int = 10, resamples: int, seed: int
) -> dict[str, Any] | None:
    """How often the answer that the reward puts first is pi_SFT's, against the probability that its logits give to that.

    `better` and `worse` hold each prompt's logits of both sides. Of a pair with exactly one answer of pi_SFT the logits say that it is the
    first with probability `s(r1 - r2)`: Bradley-Terry's by definition (method.md section 3), the classifier's by Bayes' rule. A pair stands
    under the answer that is put first, so probabilities lie between 0.5 and 1; a tie is right in half of the cases.

    Returns `bins` of equally many pairs, each with `predicted` (mean), `observed` (E, ratio of means over prompts) and `pairs`, and
    `error` (E): the mean distance between the two over the bins, weighed by pairs. None where no prompt has both sides.
    """
    prompts = [p for p in better if p in worse]
    if not prompts:
        return None
    margins = [np.subtract.outer(better[p], worse[p]).ravel() for p in prompts]
    which = np.repeat(np.arange(len(prompts)), [len(of) for of in margins])
    margin = np.concatenate(margins)
    said, right = expit(np.abs(margin)), np.where(margin == 0, 0.5, margin > 0)
    edges = np.unique(np.quantile(said, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, said, side="right")
    place = np.unique(place, return_inverse=True)[1]
    sums_3_P_B = np.stack([_sums(values, which, place, len(prompts)) for values in (np.ones_like(said), said, right)])
    return _found(sums_3_P_B, resamples, seed)


def _sums(values: np.ndarray, which: np.ndarray, place: np.ndarray, prompts: int) -> np.ndarray:
    """The sum of the values of each prompt in each bin. Shape [P, B]."""
    bins = int(place.max()) + 1
    return np.bincount(which * bins + place, values, prompts * bins).reshape(prompts, bins)


def _found(sums_3_P_B: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Shares by bin with bootstrap intervals over prompts, from the pairs, the probabilities and the right ones of each prompt."""
    prompts = sums_3_P_B.shape[1]
    rng = np.random.default_rng(seed)
    weights_R_P = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    drawn_3_R_B = weights_R_P @ sums_3_P_B
    whole_3_B = sums_3_P_B.sum(1)
    with np.errstate(invalid="ignore"):
        shares_R_B = drawn_3_R_B[2] / drawn_3_R_B[0]
    low_B, high_B = np.nanquantile(shares_R_B, [0.025, 0.975], axis=0)
    held_B = (sums_3_P_B[0] > 0).sum(0)
    observed_B, predicted_B = whole_3_B[2] / whole_3_B[0], whole_3_B[1] / whole_3_B[0]
    errors_R = np.abs(drawn_3_R_B[2] - drawn_3_R_B[1]).sum(1) / drawn_3_R_B[0].sum(1)
    error = float(np.abs(whole_3_B[2] - whole_3_B[1]).sum() / whole_3_B[0].sum())
    return {
        "bins": [
            {
                "predicted": float(predicted_B[i]),
                "observed": {"mean": float(observed_B[i]), "ci95": [float(low_B[i]), float(high_B[i])], "prompts": int(held_B[i])},
                "pairs": int(whole_3_B[0, i]),
            }
            for i in range(len(observed_B))
        ],
        "error": {"mean": error, "ci95": [float(q) for q in np.quantile(errors_R, [0.025, 0.975])], "prompts": prompts},
    }

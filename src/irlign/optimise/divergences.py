"""What a policy is paid for an answer, by the divergence from the demonstrator that it then makes small (method.md section 2).

With `h = logit D`, D the probability that an answer is a demonstration and not the policy's: at the best D `h = log beta - log pi`.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

Objective = Literal["reverse-kl", "gail", "fairl"]
MOST = 3.0  # h above it is taken for it in fairl: there -h e^h is -60, and one answer would outweigh a batch


def reverse_kl(h_B: np.ndarray) -> np.ndarray:
    """`log D - log(1 - D) = h` (AIRL, arXiv 1710.11248): at the best D `E_pi[h] = -KL(pi || beta)`. Shape [B]."""
    return h_B


def gail(h_B: np.ndarray) -> np.ndarray:
    """`-log(1 - D) = softplus(h)` (arXiv 1606.03476): at the best D `E_pi[softplus(h)] + E_beta[softplus(-h)] = 2 log 2 - 2 JS`. Never below 0,
    so every answer is worth something. Shape [B]."""
    return np.logaddexp(0.0, h_B)


def fairl(h_B: np.ndarray, most: float = MOST) -> np.ndarray:
    """`-h e^h`, h clipped at `most` (arXiv 1911.02256): at the best D, unclipped, `E_pi[-h e^h] = -KL(beta || pi)`. Highest at h = -1: an
    answer that is the demonstrator's for sure costs, since the policy should give it more often. Shape [B]."""
    h_B = np.minimum(h_B, most)
    return -h_B * np.exp(h_B)


OBJECTIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"reverse-kl": reverse_kl, "gail": gail, "fairl": fairl}

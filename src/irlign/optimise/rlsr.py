"""RLSR's reward: the cosine between an answer and the demonstration of its prompt, in the space of a frozen encoder (arXiv 2510.14200).

No reward is learned. It needs a demonstration of the very prompt, so it can train a policy and select nothing at inference.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from irlign.policy.load import load_policy
from irlign.records import PromptContent, prompt_identity
from irlign.reward.features import Features, load_encoder


class DemonstrationCosine:
    """`cos(E(y), E(y*))` with `y*` the demonstration of the prompt, the nearest where it has several; 0 for a prompt without one. `encoder`
    is WORDS (hashed words and word pairs), or a checkpoint whose hidden states are averaged (reward/features.py)."""

    name = "cosine"

    def __init__(self, demonstrations: Mapping[str, Sequence[str]], encoder: Path | str, chat_template: str):
        self.demonstrations = demonstrations
        self.features = Features(encoder, chat_template)
        self.features.policy_loader, self.features.encoder_loader = lru_cache(maxsize=1)(load_policy), lru_cache(maxsize=1)(load_encoder)

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Cosines, -1 to 1. Shape [len(prompts)]."""
        shown = [self.demonstrations.get(prompt_identity(prompt), ()) for prompt in prompts]
        own_B_F = unit(self.features(prompts, completions))
        asked = [(i, prompt, text) for i, (prompt, texts) in enumerate(zip(prompts, shown, strict=True)) for text in texts]
        scores = np.zeros(len(prompts))
        if asked:
            rows, contents, texts = zip(*asked, strict=True)
            cosine = (own_B_F[list(rows)] * unit(self.features(contents, texts))).sum(1)
            best = np.full(len(prompts), -np.inf)
            np.maximum.at(best, list(rows), cosine)
            scores = np.where(np.isfinite(best), best, 0.0)
        return scores


def unit(vectors_B_F: np.ndarray) -> np.ndarray:
    """Each row at length 1; a row of zeros stays one. Shape [B, F]."""
    return vectors_B_F / np.maximum(np.linalg.norm(vectors_B_F, axis=1, keepdims=True), 1e-12)

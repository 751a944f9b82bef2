"""Distilled Best-of-N: fine-tune pi_SFT on the winners of the pool (rejection-sampling fine-tuning; method.md section 4).

Forward KL toward the law of Best-of-n, `max_pi E_x E_{y ~ BoN(x)}[sum_t log pi(y_t | s_t)]`: the winners take the place that
demonstrations have in SFT (policy/sft.py), and training starts from pi_SFT. The policy then gives at one answer what selection gave
among n, as far as it learns it, and needs no reward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.policy.tuning import Tuning
from irlign.records import Demonstration, Sample
from irlign.training import TrainerSettings


def winners(samples: Sequence[Sample], scores: Sequence[float] | np.ndarray, count: int = 1) -> list[Sample]:
    """The `count` answers of each prompt with the highest score, best first; of equal ones the first drawn, and equal texts once.

    Only answers that finished, and that say something, can win: a prompt may have none.
    """
    by_prompt: dict[str, list[tuple[float, Sample]]] = {}
    for sample, score in zip(samples, scores, strict=True):
        if sample.finished and sample.completion.strip():
            by_prompt.setdefault(sample.prompt.prompt_id, []).append((float(score), sample))
    won: list[Sample] = []
    for answers in by_prompt.values():
        distinct: dict[str, Sample] = {}
        for _, sample in sorted(answers, key=lambda item: (-item[0], item[1].index)):
            distinct.setdefault(sample.completion, sample)
        won += list(distinct.values())[:count]
    return won


def train_distill(
    sft: Path, train: Sequence[Sample], dev: Sequence[Demonstration], settings: TrainerSettings, **about: Any
) -> dict[str, Any]:
    """Fine-tune the policy in `sft` on winners and save it in `folder` as a plain transformers checkpoint.

    `about` is what `Tuning` takes further. Returns steps, losses, and the loss on the dev demonstrations (nats a completion token) before
    and after. Raises ModelError on divergence.
    """
    tuning = Tuning(sft, dev, settings, was="sft", **about)
    encoded = tuning.form.encode([s.prompt.content for s in train], [s.completion for s in train])
    cut = [row.within(tuning.policy.max_length) for row in encoded]  # read again, a sample may be a few tokens longer than it was drawn
    rows = [{"input_ids": r.ids, "labels": r.labels} for r in cut]
    return {**tuning.finish(tuning.trainer(tuning.arguments(), rows)), "rows": len(rows)}

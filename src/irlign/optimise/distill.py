"""Distilled Best-of-N: fine-tune pi_SFT on the winners of the pool (rejection-sampling fine-tuning; method.md section 4).

Forward KL toward the law of Best-of-n, `max_pi E_x E_{y ~ BoN(x)}[sum_t log pi(y_t | s_t)]`: the winners take the place that
demonstrations have in SFT (policy/sft.py), and training starts from pi_SFT. The policy then gives at one answer what selection gave
among n, as far as it learns it, and needs no reward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.chat import Format
from irlign.policy.likelihood import mean_nll
from irlign.policy.load import Policy, load_policy, save_policy
from irlign.policy.sft import collate
from irlign.records import Demonstration, Sample
from irlign.training import TrainerSettings, fit, merged, precision, training_arguments, with_adapter


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
    sft: Path,
    train: Sequence[Sample],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
    report_to: str,
) -> dict[str, Any]:
    """Fine-tune the policy in `sft` on winners and save it in `folder` as a plain transformers checkpoint.

    Returns steps, losses, and the loss on the dev demonstrations (nats a completion token) before and after. Raises ModelError on
    divergence.
    """
    from transformers import Trainer, set_seed

    set_seed(seed)
    policy = load_policy(str(sft), "sft")
    form = Format(policy.tokenizer, chat_template)
    encoded = form.encode([s.prompt.content for s in train], [s.completion for s in train])
    rows = [row.within(policy.max_length) for row in encoded]  # read again, a sample may be a few tokens longer than it was drawn
    dev_rows = form.encode([d.prompt.content for d in dev], [d.completion for d in dev])
    before = mean_nll(policy, dev_rows) if dev_rows else None

    stored, bf16 = policy.model.dtype, precision(policy.model, settings)
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16, report_to=report_to)
    trainer = Trainer(
        model=with_adapter(policy.model, settings, "CAUSAL_LM"),
        args=arguments,
        train_dataset=[{"input_ids": r.ids, "labels": r.labels} for r in rows],  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch, policy.pad_id),
    )
    log = fit(trainer, "optimise", checkpoints)
    tuned = Policy(merged(trainer.model, settings).to(stored).eval(), policy.tokenizer, "aligned")
    save_policy(tuned, folder)
    return {**log, "dev_nll": {"sft": before, "aligned": mean_nll(tuned, dev_rows) if dev_rows else None}, "rows": len(rows)}

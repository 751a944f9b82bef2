"""Contrasts become a reward model, through transformers' Trainer, with either loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from irlign.data.chat import Encoded, context_length, pad
from irlign.records import Contrast
from irlign.reward.model import Classifier, RewardModel
from irlign.reward.objectives import LOSSES
from irlign.training import TrainerSettings, bf16_pays, fit, merged, training_arguments, with_adapter


class RewardSettings(TrainerSettings):
    """Which answers are better than which, and how the reward learns it."""

    contrast: Literal["init-sft", "init-demo", "sft-demo", "preference"] = Field("init-sft", description="better over worse")
    loss: Literal["logistic", "bradley-terry"] = Field("logistic", description="logistic (unpaired) or bradley-terry (paired)")
    backbone: str = Field("sft", description="what the reward model starts from: sft, init, or a checkpoint's folder or Hub id")
    ending: Literal["match", "keep"] = Field("match", description="match: one ending rule and one length a pair; keep: as drawn")
    max_leak_accuracy: float = Field(0.75, ge=0.5, le=1, description="guard: error when length or ending alone tells more pairs apart")
    members: int = Field(1, ge=1, le=64, description="rewards trained on different samples with different seeds; 1 is no ensemble")
    aggregate: Literal["mean", "min", "mean-variance", "weight-average"] = Field("mean", description="how members become one reward")
    variance_penalty: float = Field(0.5, ge=0, description="lambda of mean-variance: mean - lambda * variance over the members")
    log_ratio: bool = Field(
        True, description="also publish the rewards without training, log pi_SFT - log pi_0 whole and a token, as baselines"
    )


def train_reward(
    backbone: Path,
    train: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: RewardSettings,
    *,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
    report_to: str,
    head_seed: int | None = None,
) -> dict[str, Any]:
    """Train a classifier on the pairs and save it in `folder`. Returns steps, losses, and on the dev pairs TRL's
    `accuracy` and `margin`. A row of the Trainer is a pair; both losses see the same batches. `head_seed` (by default `seed`)
    is what the fresh head is drawn from.
    """
    from transformers import Trainer, set_seed

    set_seed(seed if head_seed is None else head_seed)
    reward = Classifier.start(backbone, chat_template, settings.contrast)
    better, worse = _encode(reward, train)
    parameters = sum(p.numel() for p in reward.model.parameters())
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16_pays(parameters), report_to=report_to)
    loss = LOSSES[settings.loss]

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """Logits of shape [2B, 1], better answers first; scaled so that accumulated batches average."""
        better_B, worse_B = outputs.logits[:, 0].float().chunk(2)
        pairs = len(better_B) if num_items_in_batch is None else num_items_in_batch / 2
        return loss(better_B, worse_B) * len(better_B) / pairs

    trainer = Trainer(
        model=with_adapter(reward.model, settings, "SEQ_CLS"),
        args=arguments,
        train_dataset=[{"input_ids": b.ids, "worse_ids": w.ids} for b, w in zip(better, worse, strict=True)],  # type: ignore[arg-type]
        data_collator=lambda rows: _collate(rows, reward.pad_id),
        compute_loss_func=compute_loss,
    )
    log = fit(trainer, "reward", checkpoints)
    reward.model = merged(trainer.model, settings).eval()
    reward.save(folder)
    return {**log, "pairs": {"train": len(train), "dev": len(dev)}, "dev": accuracy_and_margin(reward, dev)}


def fold_of_pairs(pairs: Sequence[Contrast], member: int, members: int) -> list[Contrast]:
    """The pairs of one member: all but every `members`-th, so that no two see the same samples; all of them for one member."""
    return [pair for i, pair in enumerate(pairs) if members == 1 or i % members != member]


def accuracy_and_margin(reward: RewardModel, pairs: Sequence[Contrast]) -> dict[str, float] | None:
    """Share of pairs whose better answer scores higher (a tie counts half), and the mean difference; None without pairs."""
    if not pairs:
        return None
    contents = [p.prompt.content for p in pairs]
    scores = reward.score([*contents, *contents], [*(p.better for p in pairs), *(p.worse for p in pairs)])
    margin = scores[: len(pairs)] - scores[len(pairs) :]
    return {"accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))), "margin": float(margin.mean())}


def _encode(reward: Classifier, pairs: Sequence[Contrast]) -> tuple[list[Encoded], list[Encoded]]:
    contents, limit = [p.prompt.content for p in pairs], context_length(reward.model.config)
    better, worse = (reward.format.encode(contents, texts) for texts in ([p.better for p in pairs], [p.worse for p in pairs]))
    return [row.within(limit) for row in better], [row.within(limit) for row in worse]


def _collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Better answers, then worse ones: `input_ids` and `attention_mask` of shape [2B, T], `labels` [2B] 1 and 0."""
    import torch

    ids, mask = pad([*(r["input_ids"] for r in rows), *(r["worse_ids"] for r in rows)], pad_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1] * len(rows) + [0] * len(rows))}

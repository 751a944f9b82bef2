"""Supervised fine-tuning: forward KL over trajectories, `max_pi E_D[sum_t log pi(y_t | s_t)]` (method.md section 2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from irlign.data.chat import IGNORED, Format, pad
from irlign.policy.likelihood import mean_nll
from irlign.policy.load import Policy, load_policy, save_policy
from irlign.records import Demonstration
from irlign.training import TrainerSettings, bf16_pays, fit, merged, training_arguments, with_adapter


class SFTSettings(TrainerSettings):
    """Supervised fine-tuning on the train demonstrations."""

    loss_on_prompt: bool = Field(False, description="also learn the prompt's tokens: a baseline, no part of the method")


def train_sft(
    init: Path,
    train: Sequence[Demonstration],
    dev: Sequence[Demonstration],
    settings: SFTSettings,
    *,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
    report_to: str,
) -> dict[str, Any]:
    """Fine-tune the policy in `init` on demonstrations and save it in `folder` as a plain transformers checkpoint.

    Returns steps, losses, and the dev loss (nats a completion token) before and after. Raises ModelError on divergence.
    """
    from transformers import Trainer, set_seed

    set_seed(seed)
    policy = load_policy(str(init), "init")
    form = Format(policy.tokenizer, chat_template)
    rows = form.encode([d.prompt.content for d in train], [d.completion for d in train])
    dev_rows = form.encode([d.prompt.content for d in dev], [d.completion for d in dev])
    before = mean_nll(policy, dev_rows) if dev_rows else None

    stored = policy.model.dtype
    if not settings.use_peft:
        policy.model.float()  # small steps are lost in bf16 weights; autocast still computes in bf16 where it pays
    parameters = sum(p.numel() for p in policy.model.parameters())
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16_pays(parameters), report_to=report_to)
    trainer = Trainer(
        model=with_adapter(policy.model, settings, "CAUSAL_LM"),
        args=arguments,
        train_dataset=[{"input_ids": r.ids, "labels": r.ids if settings.loss_on_prompt else r.labels} for r in rows],  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch, policy.pad_id),
    )
    log = fit(trainer, "sft", checkpoints)
    tuned = Policy(merged(trainer.model, settings).to(stored).eval(), policy.tokenizer, "sft")
    save_policy(tuned, folder)
    return {**log, "dev_nll": {"initial": before, "sft": mean_nll(tuned, dev_rows) if dev_rows else None}, "rows": len(rows)}


def collate(batch: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """A dict of `input_ids_B_T`, `attention_mask_B_T`, `labels_B_T`, right-padded; padding carries no loss."""
    ids_B_T, mask_B_T = pad([row["input_ids"] for row in batch], pad_id)
    labels_B_T, _ = pad([row["labels"] for row in batch], IGNORED)
    return {"input_ids": ids_B_T, "attention_mask": mask_B_T, "labels": labels_B_T}

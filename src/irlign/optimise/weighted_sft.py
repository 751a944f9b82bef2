"""SFT that matches occupancies: forward KL over state-action pairs, which is SFT with the token weights `w_t = T - t + 1` (method.md section 2).

The first tokens of an answer decide every state after them, so each carries the loss of all that follow. Demonstrations, pi_0 and
everything else are as in policy/sft.py; no reward has a part in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.data.chat import IGNORED, Format
from irlign.policy.likelihood import mean_nll
from irlign.policy.load import Policy, load_policy, save_policy
from irlign.policy.sft import collate
from irlign.records import Demonstration
from irlign.training import TrainerSettings, fit, merged, precision, training_arguments, with_adapter

if TYPE_CHECKING:
    import torch


def occupancy_loss(logits_B_T_V: "torch.Tensor", labels_B_T: "torch.Tensor", constant: float) -> "torch.Tensor":
    """`sum_rows sum_t (T - t + 1) (-log pi(y_t | s_t)) / constant`, t = 1..T over a row's T completion tokens, EOS included.

    The constant is one for all rows: over each row's own length the weights would match no occupancy (method.md section 2). Labels
    of other tokens are IGNORED; position t predicts token t + 1.
    """
    from torch.nn.functional import cross_entropy

    targets_B_T = labels_B_T[:, 1:]
    nll_B_T = cross_entropy(logits_B_T_V[:, :-1].float().transpose(1, 2), targets_B_T, ignore_index=IGNORED, reduction="none")
    remaining_B_T = (targets_B_T != IGNORED).flip(1).cumsum(1).flip(1)
    return (remaining_B_T * nll_B_T).sum() / constant


def step_constant(lengths: Sequence[int], rows_a_step: int) -> float:
    """What `occupancy_loss` is divided by: the rows of a step times the mean over all rows of their weights' sum, `T (T + 1) / 2`, so
    that the loss is a mean in nats a token, as that of SFT is."""
    return rows_a_step * sum(length * (length + 1) / 2 for length in lengths) / len(lengths)


def train_weighted_sft(
    init: Path,
    train: Sequence[Demonstration],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
    report_to: str,
) -> dict[str, Any]:
    """Fine-tune the policy in `init` on demonstrations with occupancy weights and save it in `folder` as a plain checkpoint.

    Returns steps, losses, and the loss on the dev demonstrations (nats a completion token, unweighted) before and after. Raises
    ModelError on divergence.
    """
    from transformers import Trainer, set_seed

    set_seed(seed)
    policy = load_policy(str(init), "init")
    form = Format(policy.tokenizer, chat_template)
    rows = form.encode([d.prompt.content for d in train], [d.completion for d in train])
    dev_rows = form.encode([d.prompt.content for d in dev], [d.completion for d in dev])
    before = mean_nll(policy, dev_rows) if dev_rows else None

    stored, bf16 = policy.model.dtype, precision(policy.model, settings)
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16, report_to=report_to)
    rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    constant = step_constant([len(r.completion_ids) for r in rows], rows_a_step)
    trainer = Trainer(
        model=with_adapter(policy.model, settings, "CAUSAL_LM"),
        args=arguments,
        train_dataset=[{"input_ids": r.ids, "labels": r.labels} for r in rows],  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch, policy.pad_id),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: occupancy_loss(outputs.logits, labels, constant),
    )
    log = fit(trainer, "optimise", checkpoints)
    tuned = Policy(merged(trainer.model, settings).to(stored).eval(), policy.tokenizer, "aligned")
    save_policy(tuned, folder)
    return {**log, "dev_nll": {"initial": before, "aligned": mean_nll(tuned, dev_rows) if dev_rows else None}, "rows": len(rows)}

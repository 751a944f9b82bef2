"""GSIL, pointwise: each answer by itself is told to be a demonstration or the policy's own, by its log-ratio to the policy of the round before.

The optimal classifier of demonstrations against own answers has the logit `log pi_beta - log pi_before`, so a policy whose log-ratio is that
logit is the demonstrator (arXiv 2410.10093: density-ratio estimation in the place of an adversary, here with its Bernoulli loss). spin
compares the two answers of a prompt; here neither sees the other. No reward has a part in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.data.chat import IGNORED
from irlign.optimise.preference import Labelled
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.tuning import Tuning, collate
from irlign.records import Demonstration
from irlign.training import TrainerSettings

if TYPE_CHECKING:
    import torch


def gsil_loss(log_ratio_B: "torch.Tensor", side_B: "torch.Tensor", beta: float, shift: float, constant: float) -> "torch.Tensor":
    """`(sum_shown w (-log s(f)) + sum_own (-log(1 - s(f)))) / constant` with `f = beta log pi/pi_before(y|x) + shift` (arXiv 2410.10093,
    the Bernoulli loss with the scale and the shift of its authors' code).

    `side_B` is `w`, above 0, for a demonstration and -1 for an own answer; the sums run over the rows of a batch.
    """
    from torch.nn.functional import softplus

    return (side_B.abs() * softplus(-side_B.sign() * (beta * log_ratio_B + shift))).sum() / constant


def answer_nats(logits_B_T_V: "torch.Tensor", labels_B_T: "torch.Tensor") -> "torch.Tensor":
    """log pi(y|x) of each row with its gradient, over the tokens whose label is not IGNORED; position t predicts token t + 1. Shape [B]."""
    from torch.nn.functional import cross_entropy

    nll_B_T = cross_entropy(logits_B_T_V[:, :-1].float().transpose(1, 2), labels_B_T[:, 1:], ignore_index=IGNORED, reduction="none")
    return -nll_B_T.sum(1)


def train_gsil(
    start: Path,
    train: Sequence[Labelled],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    beta: float,
    shift: float,
    **about: Any,
) -> dict[str, Any]:
    """Train the policy in `start`, which is also the reference, on single answers and save it in `folder` as a plain checkpoint. Both kinds
    weigh the same in all, and the reference reads each row once, beforehand.

    `about` is what `Tuning` takes further. Returns steps, losses (log 2 at the start, without a shift), and the loss on the dev demonstrations
    (nats a completion token) before and after. Raises ModelError on divergence.
    """
    import torch

    tuning = Tuning(start, dev, settings, **about)
    encoded = tuning.form.encode([prompt.content for prompt, _, _ in train], [text for _, text, _ in train])
    cut = [row.within(tuning.policy.max_length) for row in encoded]
    known = sequence_log_probs(tuning.policy, cut)
    own = sum(not shown for _, _, shown in train)
    weight = own / (len(train) - own)
    rows = [
        {"input_ids": row.ids, "labels": row.labels, "about": [nats, weight if shown else -1.0]}
        for row, nats, (_, _, shown) in zip(cut, known, train, strict=True)
    ]
    arguments = tuning.arguments()
    rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    constant = 2 * own / len(rows) * rows_a_step

    def loss(outputs: Any, labels: "torch.Tensor", num_items_in_batch: Any = None) -> "torch.Tensor":
        reference_B, side_B, labels_B_T = labels[:, 0], labels[:, 1], labels[:, 2:].long()
        return gsil_loss(answer_nats(outputs.logits, labels_B_T) - reference_B, side_B, beta, shift, constant)

    trainer = tuning.trainer(arguments, rows, _batch, loss)
    for module in trainer.model.modules():  # type: ignore[union-attr]
        if isinstance(module, torch.nn.Dropout):  # the adapter's too
            module.p = 0.0  # the log-ratio is 0 at the start
    return {**tuning.finish(trainer), "rows": len(rows)}


def _batch(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """`collate`, but `labels` [B, 2 + T] begin with the reference's log-probability and the side: the loss function gets no more than those."""
    import torch

    found = collate(batch, pad_id)
    about_B_2 = torch.tensor([row["about"] for row in batch], dtype=torch.float64)
    return {**found, "labels": torch.cat([about_B_2, found["labels"].double()], dim=1)}

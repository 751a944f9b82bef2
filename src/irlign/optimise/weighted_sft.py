"""SFT that matches occupancies: forward KL over state-action pairs, which is SFT with the token weights `w_t = T - t + 1` (method.md section 2).

The first tokens of an answer decide every state after them, so each carries the loss of all that follow. Demonstrations, pi_0 and
everything else are as in policy/sft.py; no reward has a part in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.data.chat import IGNORED
from irlign.policy.tuning import Tuning
from irlign.records import Demonstration
from irlign.training import TrainerSettings

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
    init: Path, train: Sequence[Demonstration], dev: Sequence[Demonstration], settings: TrainerSettings, **about: Any
) -> dict[str, Any]:
    """Fine-tune the policy in `init` on demonstrations with occupancy weights and save it in `folder` as a plain checkpoint.

    `about` is what `Tuning` takes further. Returns steps, losses, and the loss on the dev demonstrations (nats a completion token, unweighted)
    before and after. Raises ModelError on divergence.
    """
    tuning = Tuning(init, dev, settings, was="initial", **about)
    encoded = tuning.form.encode([d.prompt.content for d in train], [d.completion for d in train])
    rows = [{"input_ids": r.ids, "labels": r.labels} for r in encoded]
    arguments = tuning.arguments()
    rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    constant = step_constant([len(r.completion_ids) for r in encoded], rows_a_step)

    def loss(outputs: Any, labels: "torch.Tensor", num_items_in_batch: Any = None) -> "torch.Tensor":
        return occupancy_loss(outputs.logits, labels, constant)

    return {**tuning.finish(tuning.trainer(arguments, rows, loss=loss)), "rows": len(rows)}

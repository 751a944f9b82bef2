"""The losses of reward training: pure functions of logits, better is high; `weight` is each pair's, relative to a mean of 1.

Sign, once: the reward is `h = logit P(better)`. At the optimum of the logistic loss `h = log p_better - log p_worse`,
so for init-sft it is `log pi_SFT - log pi_0` (method.md section 3).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def logistic_loss(better_B: "torch.Tensor", worse_B: "torch.Tensor", weight_B: "torch.Tensor | float" = 1.0) -> "torch.Tensor":
    """Unpaired classification: mean over pairs of `weight (-log s(r_better) - log(1 - s(r_worse)))` (method.md section 3)."""
    from torch.nn.functional import softplus

    return (weight_B * (softplus(-better_B) + softplus(worse_B))).mean()


def bradley_terry_loss(better_B: "torch.Tensor", worse_B: "torch.Tensor", weight_B: "torch.Tensor | float" = 1.0) -> "torch.Tensor":
    """Paired: mean over pairs of `-weight log s(r_better - r_worse)` (Bradley-Terry; method.md section 3)."""
    from torch.nn.functional import softplus

    return (weight_B * softplus(worse_B - better_B)).mean()


LOSSES = {"logistic": logistic_loss, "bradley-terry": bradley_terry_loss}

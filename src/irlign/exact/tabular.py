"""Sequence MDPs small enough to enumerate: every law, divergence and optimum of method.md, exact and differentiable.

A policy is a table of logits, one row for each state (a prompt and a prefix), so that a gradient by autograd is the
gradient of the formula itself. Nothing here samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EOS = 0


@dataclass(frozen=True)
class SequenceMDP:
    """Prompts with probabilities, `tokens` tokens of which 0 is EOS, and at most `horizon` of them in an answer.

    States are pairs (prompt, prefix); the transition appends the token. An answer ends with EOS or at the horizon.
    `states_Y_T`, `actions_Y_T` and `mask_Y_T` list every answer Y of every prompt: where it was, what it did, and
    whether step T happened.
    """

    prompt_law_X: tuple[float, ...]
    tokens: int
    horizon: int

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.horizon < 1:
            raise ValueError("a sequence MDP needs two tokens (one is EOS) and a horizon of at least 1")
        if not self.prompt_law_X or min(self.prompt_law_X) < 0 or abs(sum(self.prompt_law_X) - 1) > 1e-12:
            raise ValueError("the prompts' probabilities must be at least 0 and sum to 1")

    def states(self) -> dict[tuple[int, tuple[int, ...]], int]:
        """(prompt, prefix) -> row of the policy's table; prefixes hold no EOS and are shorter than the horizon."""
        prefixes: list[tuple[int, ...]] = [()]
        for prefix in prefixes:
            if len(prefix) < self.horizon - 1:
                prefixes.extend((*prefix, token) for token in range(1, self.tokens))
        return {(x, prefix): x * len(prefixes) + i for x in range(len(self.prompt_law_X)) for i, prefix in enumerate(prefixes)}

    def answers(self) -> list[tuple[int, tuple[int, ...]]]:
        """Every (prompt, answer); an answer ends with EOS unless the horizon ended it."""
        found = []
        for x, prefix in self.states():
            found += [(x, (*prefix, token)) for token in range(self.tokens) if token == EOS or len(prefix) == self.horizon - 1]
        return found

    def tables(self) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """`states_Y_T`, `actions_Y_T` (integers) and `mask_Y_T` (1.0 where the step happened)."""
        import torch

        index, answers = self.states(), self.answers()
        states_Y_T, actions_Y_T = (torch.zeros(len(answers), self.horizon, dtype=torch.long) for _ in range(2))
        mask_Y_T = torch.zeros(len(answers), self.horizon, dtype=torch.float64)
        for y, (x, answer) in enumerate(answers):
            for t, token in enumerate(answer):
                states_Y_T[y, t], actions_Y_T[y, t], mask_Y_T[y, t] = index[x, answer[:t]], token, 1.0
        return states_Y_T, actions_Y_T, mask_Y_T

    def log_prompt_law(self) -> "torch.Tensor":
        """log p(x) of each answer's prompt. Shape [Y]."""
        import torch

        return torch.tensor([self.prompt_law_X[x] for x, _ in self.answers()], dtype=torch.float64).log()


def step_log_probs(mdp: SequenceMDP, logits_S_A: "torch.Tensor") -> "torch.Tensor":
    """log pi(y_t | x, y_<t) of every step of every answer, 0 after its end. Shape [Y, T]."""
    states_Y_T, actions_Y_T, mask_Y_T = mdp.tables()
    return logits_S_A.log_softmax(-1)[states_Y_T, actions_Y_T] * mask_Y_T


def trajectory_log_law(mdp: SequenceMDP, logits_S_A: "torch.Tensor") -> "torch.Tensor":
    """log p(x) + sum_t log pi(y_t | x, y_<t): the trajectory law (method.md section 1). Shape [Y]; its exp sums to 1."""
    return mdp.log_prompt_law() + step_log_probs(mdp, logits_S_A).sum(-1)


def occupancy(mdp: SequenceMDP, logits_S_A: "torch.Tensor") -> "torch.Tensor":
    """rho(s, a) = p(x) prod_{t<=k} pi(y_t | x, y_<t) (method.md section 1). Shape [S, A]; it sums to the expected length."""
    import torch

    states_Y_T, actions_Y_T, mask_Y_T = mdp.tables()
    weights_Y_T = trajectory_log_law(mdp, logits_S_A).exp()[:, None] * mask_Y_T
    rho_S_A = torch.zeros_like(logits_S_A)
    return rho_S_A.index_put((states_Y_T.flatten(), actions_Y_T.flatten()), weights_Y_T.flatten(), accumulate=True)


def sft_loss(mdp: SequenceMDP, demonstrator_Y: "torch.Tensor", logits_S_A: "torch.Tensor") -> "torch.Tensor":
    """The loss of SFT on infinitely many demonstrations: `E_beta[-sum_t log pi(y_t | s_t)]`. `demonstrator_Y` is their law."""
    return -(demonstrator_Y[:, None] * step_log_probs(mdp, logits_S_A)).sum()


def tokens_remaining_loss(mdp: SequenceMDP, demonstrator_Y: "torch.Tensor", logits_S_A: "torch.Tensor") -> "torch.Tensor":
    """SFT with `w_t = T_y - t + 1`, t = 1..T_y: what occupancy forward KL asks for (method.md section 2)."""
    import torch

    mask_Y_T = mdp.tables()[2]
    weights_Y_T = torch.flip(torch.flip(mask_Y_T, [1]).cumsum(1), [1])
    return -(demonstrator_Y[:, None] * weights_Y_T * step_log_probs(mdp, logits_S_A)).sum()


def forward_kl(p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    """KL(p || q) of two tables of non-negative numbers, p the demonstrator's; 0 log 0 is 0."""
    import torch

    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def reverse_kl(p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    """KL(q || p), q the policy's."""
    return forward_kl(q, p)


def jensen_shannon(p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    """Half of KL(p || m) plus half of KL(q || m), m their mean."""
    return (forward_kl(p, (p + q) / 2) + forward_kl(q, (p + q) / 2)) / 2


def f_divergence(f: Callable[["torch.Tensor"], "torch.Tensor"], p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    """D_f(p || q) = sum q f(p / q) for a convex f with f(1) = 0; `t log t` gives forward KL, `-log t` reverse KL."""
    return (q * f(p / q)).sum()


def best_discriminator_logit(
    loss: Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"], p: "torch.Tensor", q: "torch.Tensor", *, steps: int = 40
) -> "torch.Tensor":
    """The logits h that minimise the population's loss over pairs, a better answer drawn from p and a worse one from q.

    `loss(better_B, worse_B)` is one of reward/objectives.py. Newton's method with derivatives by autograd; a loss that knows
    differences only (Bradley-Terry) leaves the constant where it started. Shape of p.
    """
    import torch
    from torch.func import grad, hessian, vmap

    def population(h: "torch.Tensor") -> "torch.Tensor":
        each = vmap(vmap(lambda better, worse: loss(better[None], worse[None]), (None, 0)), (0, None))(h, h)
        return (p[:, None] * q * each).sum()

    h = torch.zeros_like(p)
    for _ in range(steps):
        h = h - (torch.linalg.pinv(hessian(population)(h), hermitian=True) @ grad(population)(h)).clamp(-1, 1)
    return h


def kl_regularised_optimum(base: "torch.Tensor", reward: "torch.Tensor", b: float) -> "torch.Tensor":
    """argmax over laws of `E[reward] - b KL(law || base)`: base exp(reward / b), normalised. Shapes [Y]."""
    return (base.log() + reward / b).softmax(-1)

"""Stochastic transitions: what stays exact without a model of the environment, and what does not."""

import pytest
import torch

from irlign.exact.dynamics import TurnMDP
from irlign.exact.tabular import forward_kl, jensen_shannon, reverse_kl

MDP = TurnMDP(tokens=2, replies=3, turns=2)
NEAR = {"rtol": 1e-12, "atol": 1e-13}


def table(seed: int, *, environment: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(MDP.histories(environment=environment)), MDP.replies if environment else MDP.tokens
    return torch.randn(rows, width, dtype=torch.float64, generator=generator)


TRUE, WRONG = table(1, environment=True), table(2, environment=True)
BETA = MDP.log_law(table(3), TRUE).exp()


def gradient(function, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def test_the_tables_and_the_law():
    assert [len(MDP.histories(environment=e)) for e in (False, True)] == [1 + 2 * 3, 2 + 2 * 3 * 2]
    assert len(MDP.trajectories()) == (2 * 3) ** 2
    torch.testing.assert_close(BETA.sum(), torch.tensor(1.0, dtype=torch.float64), **NEAR)


def test_one_dialogue_by_hand():
    """The policy says 1, the user 2, the policy 0, the user 1: four factors, each from the row of its history."""
    policy, user = table(3).log_softmax(-1), TRUE.log_softmax(-1)
    rows, heard = MDP.histories(environment=False), MDP.histories(environment=True)
    by_hand = policy[rows.index(()), 1] + user[heard.index((1,)), 2]
    by_hand = by_hand + policy[rows.index((1, 2)), 0] + user[heard.index((1, 2, 0)), 1]
    torch.testing.assert_close(MDP.log_law(table(3), TRUE)[MDP.trajectories().index((1, 2, 0, 1))], by_hand, **NEAR)


@pytest.mark.parametrize("environment", [TRUE, WRONG])
def test_transitions_cancel_in_forward_kl(environment):
    """Its gradient is that of SFT on the policy's own tokens, whatever model of the environment stands in the law."""
    kl = gradient(lambda w: forward_kl(BETA, MDP.log_law(w, environment).exp()), table(4))
    sft = gradient(lambda w: -(BETA * MDP.log_probs(w, environment=False).sum(-1)).sum(), table(4))
    assert kl.abs().max() > 1e-3
    torch.testing.assert_close(kl, sft, **NEAR)


def test_training_on_the_environments_tokens_breaks_it():
    """One bias of tokens shared by both voices, as in a language model: the environment's tokens pull it elsewhere."""

    def law(shared: torch.Tensor) -> torch.Tensor:
        return MDP.log_probs(table(4) + shared[: MDP.tokens], environment=False).sum(-1)

    def all_tokens(shared: torch.Tensor) -> torch.Tensor:
        return -(BETA * (law(shared) + MDP.log_probs(TRUE.new_zeros(TRUE.shape) + shared, environment=True).sum(-1))).sum()

    start = torch.zeros(3, dtype=torch.float64)
    exact = gradient(lambda s: forward_kl(BETA, (law(s) + MDP.log_probs(TRUE, environment=True).sum(-1)).exp()), start)
    own = gradient(lambda s: -(BETA * law(s)).sum(), start)
    torch.testing.assert_close(own, exact, **NEAR)
    assert (gradient(all_tokens, start) - exact).abs().max() > 0.01


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon])
def test_roll_outs_in_a_wrong_model_move_the_optimum(divergence):
    """The demonstrator itself is the optimum under the true environment; under a wrong one the gradient there is not 0."""
    at_optimum = gradient(lambda w: divergence(BETA, MDP.log_law(w, TRUE).exp()), table(3))
    torch.testing.assert_close(at_optimum, torch.zeros_like(at_optimum), rtol=0, atol=1e-12)
    misled = gradient(lambda w: divergence(BETA, MDP.log_law(w, WRONG).exp()), table(3))
    assert misled.abs().max() > 1e-3

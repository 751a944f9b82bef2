"""The two losses: values and gradients by hand, and what they are minimised by."""

import math

import pytest
import torch

from irlign.reward.objectives import LOSSES, bradley_terry_loss, logistic_loss


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_by_hand():
    better, worse = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    # -log s(0) - log(1 - s(0)) = 2 log 2;  -log s(2) - log s(1) = log(1 + e^-2) + log(1 + e^-1)
    logistic = (2 * math.log(2) + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert logistic_loss(better, worse).item() == pytest.approx(logistic, rel=1e-6)
    # margins 0 and 3
    assert bradley_terry_loss(better, worse).item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-3))) / 2, rel=1e-6)


def test_gradients_by_hand():
    """d/db of -log s(b) is s(b) - 1 and d/dw of -log(1 - s(w)) is s(w); for a margin m both are -+ s(-m); over 2 pairs."""
    for loss, expected in (
        (logistic_loss, ([(_sigmoid(0.5) - 1) / 2, (_sigmoid(-1.0) - 1) / 2], [_sigmoid(1.5) / 2, _sigmoid(0.0) / 2])),
        (bradley_terry_loss, ([-_sigmoid(1.0) / 2, -_sigmoid(1.0) / 2], [_sigmoid(1.0) / 2, _sigmoid(1.0) / 2])),
    ):
        better = torch.tensor([0.5, -1.0], requires_grad=True)
        worse = torch.tensor([1.5, 0.0], requires_grad=True)
        loss(better, worse).backward()
        assert better.grad.tolist() == pytest.approx(expected[0], rel=1e-5)
        assert worse.grad.tolist() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_better_is_high(name):
    low = LOSSES[name](torch.tensor([3.0]), torch.tensor([-3.0]))
    high = LOSSES[name](torch.tensor([-3.0]), torch.tensor([3.0]))
    assert low < 0.1 < 5 < high


def test_a_shift_changes_logistic_only():
    better, worse = torch.tensor([0.3, 1.0, -2.0]), torch.tensor([0.1, -1.0, 0.5])
    assert bradley_terry_loss(better + 5, worse + 5) == pytest.approx(bradley_terry_loss(better, worse).item(), rel=1e-5)
    assert abs(logistic_loss(better + 5, worse + 5) - logistic_loss(better, worse)) > 1
    # swapping the sides and the signs leaves both as they were
    for loss in LOSSES.values():
        assert loss(-worse, -better) == pytest.approx(loss(better, worse).item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name):
    better = torch.tensor([-1e4], requires_grad=True)
    LOSSES[name](better, torch.tensor([1e4])).backward()
    assert torch.isfinite(better.grad).all()


P = torch.tensor([0.5, 0.3, 0.15, 0.05])  # the law of the better answers over four possible ones
Q = torch.tensor([0.1, 0.2, 0.3, 0.4])  # of the worse


def test_the_logistic_optimum_is_the_log_ratio():
    """All pairs of four answers, each as often as it occurs in 400 draws of either side: h* = log p - log q."""
    better = torch.arange(4).repeat_interleave((400 * P).round().long())
    worse = torch.arange(4).repeat_interleave((400 * Q).round().long())
    assert len(better) == len(worse) == 400
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = logistic_loss(logits[better], logits[worse])
        loss.backward()
        return loss

    optimiser.step(closure)
    assert logits.detach().tolist() == pytest.approx((P / Q).log().tolist(), abs=1e-4)


def test_the_bradley_terry_optimum_recovers_its_own_rewards():
    """Pairs drawn from a Bradley-Terry law with rewards r: the optimum is r, up to a shift."""
    rewards = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    weight = torch.tensor([_sigmoid(float(rewards[i] - rewards[j])) for i, j in pairs], dtype=torch.float64)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        losses = [bradley_terry_loss(logits[i : i + 1], logits[j : j + 1]) for i, j in pairs]
        loss = (weight * torch.stack(losses)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = logits.detach() - logits.detach()[1]
    assert found.tolist() == pytest.approx(rewards.tolist(), abs=1e-4)

"""The trajectory objectives: by hand, and against the exact divergences on an enumerable sequence MDP."""

import math

import numpy as np
import pytest
import torch

from irlign.exact.tabular import SequenceMDP, forward_kl, jensen_shannon, reverse_kl, trajectory_log_law
from irlign.optimise.divergences import MOST, OBJECTIVES, fairl

H = np.array([-20.0, -1.0, 0.0, math.log(3), 20.0])


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("reverse-kl", [-20.0, -1.0, 0.0, math.log(3), 20.0]),
        ("gail", [math.exp(-20), math.log(1 + math.exp(-1)), math.log(2), math.log(4), 20.0]),  # -log(1 - D): D = 1/2, 3/4
        ("fairl", [20 * math.exp(-20), math.exp(-1), 0.0, -3 * math.log(3), -3 * math.exp(3)]),  # the last is clipped at h = 3
    ],
)
def test_what_each_pays_by_hand(name, by_hand):
    assert OBJECTIVES[name](H) == pytest.approx(by_hand, rel=1e-6)


def test_reverse_kl_and_gail_rise_and_fairl_turns_at_minus_one():
    h = np.linspace(-10, MOST, 1301)
    assert all((np.diff(OBJECTIVES[name](h)) > 0).all() for name in ("reverse-kl", "gail"))
    assert h[fairl(h).argmax()] == pytest.approx(-1) and fairl(np.array([1e6])) == fairl(np.array([MOST]))
    assert np.isfinite([OBJECTIVES[name](np.array([1e4, -1e4])) for name in OBJECTIVES]).all()


def test_the_best_discriminators_pay_adds_up_to_the_divergence():
    """h = log beta - log pi over every answer of an MDP; the pay is averaged under pi."""
    mdp, generator = SequenceMDP((0.3, 0.7), tokens=3, horizon=3), torch.Generator().manual_seed(0)
    shape = (len(mdp.states()), mdp.tokens)
    beta, pi = (trajectory_log_law(mdp, torch.randn(shape, dtype=torch.float64, generator=generator)).exp() for _ in range(2))
    h, law, shown = (beta / pi).log().numpy(), pi.numpy(), beta.numpy()
    assert law @ OBJECTIVES["reverse-kl"](h) == pytest.approx(-float(reverse_kl(beta, pi)), rel=1e-12)
    assert law @ fairl(h, most=np.inf) == pytest.approx(-float(forward_kl(beta, pi)), rel=1e-12)
    both = law @ OBJECTIVES["gail"](h) + shown @ OBJECTIVES["gail"](-h)
    assert both == pytest.approx(2 * math.log(2) - 2 * float(jensen_shannon(beta, pi)), rel=1e-12)

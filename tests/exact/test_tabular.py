"""The identities of the method, exact on enumerable MDPs: tolerances near machine precision, nothing sampled."""

import itertools
import math

import numpy as np
import pytest
import torch

from irlign.exact import tabular
from irlign.exact.tabular import SequenceMDP, forward_kl, jensen_shannon, occupancy, reverse_kl, trajectory_log_law
from irlign.reward.objectives import bradley_terry_loss, logistic_loss
from irlign.statistics import best_of_n, best_of_n_law, kl_bound

NEAR = {"rtol": 1e-12, "atol": 1e-13}
MDP = SequenceMDP((0.3, 0.7), tokens=3, horizon=3)


def table(seed: int, mdp: SequenceMDP = MDP) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(mdp.states()), mdp.tokens, dtype=torch.float64, generator=generator)


def law(seed: int) -> torch.Tensor:
    return trajectory_log_law(MDP, table(seed)).exp()


def gradient(function, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def close(a, b, **near) -> None:
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **(near or NEAR))


def test_answers_and_laws_by_hand():
    """Two tokens (EOS and a), horizon 2: the answers are EOS, a EOS, a a."""
    mdp = SequenceMDP((1.0,), tokens=2, horizon=2)
    assert mdp.answers() == [(0, (0,)), (0, (1, 0)), (0, (1, 1))]
    logits = torch.tensor([[0.25, 0.75], [0.4, 0.6]], dtype=torch.float64).log()
    close(trajectory_log_law(mdp, logits).exp(), [0.25, 0.3, 0.45])
    close(occupancy(mdp, logits), [[0.25, 0.75], [0.3, 0.45]])
    close(occupancy(mdp, logits).sum(), 1.75)  # the expected length: 0.25 * 1 + 0.75 * 2


def test_laws_are_laws():
    close(law(0).sum(), 1.0)
    lengths = MDP.tables()[2].sum(1)
    close(occupancy(MDP, table(0)).sum(), (law(0) * lengths).sum())


def test_divergences_by_hand():
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    close(forward_kl(p, q), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    close(reverse_kl(p, q), 0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    m = [0.375, 0.625]
    by_hand = sum(0.5 * math.log(0.5 / c) for c in m) / 2 + (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])) / 2
    close(jensen_shannon(p, q), by_hand)


def test_every_divergence_is_an_f_divergence():
    p, q = law(1), law(2)
    close(tabular.f_divergence(lambda t: t * t.log(), p, q), forward_kl(p, q))
    close(tabular.f_divergence(lambda t: -t.log(), p, q), reverse_kl(p, q))
    close(tabular.f_divergence(lambda t: (t * t.log() - (t + 1) * ((t + 1) / 2).log()) / 2, p, q), jensen_shannon(p, q))


def test_trajectory_forward_kl_has_the_gradient_of_sft():
    beta = law(1)
    kl = gradient(lambda w: forward_kl(beta, trajectory_log_law(MDP, w).exp()), table(2))
    sft = gradient(lambda w: tabular.sft_loss(MDP, beta, w), table(2))
    assert kl.abs().max() > 1e-3
    close(kl, sft)


def test_occupancy_forward_kl_has_the_gradient_of_sft_weighted_by_tokens_remaining():
    beta, rho = law(1), occupancy(MDP, table(1))
    kl = gradient(lambda w: forward_kl(rho, occupancy(MDP, w)), table(2))
    weighted = gradient(lambda w: tabular.tokens_remaining_loss(MDP, beta, w), table(2))
    close(kl, weighted)
    assert (kl - gradient(lambda w: tabular.sft_loss(MDP, beta, w), table(2))).abs().max() > 1e-2


def test_normalising_the_occupancy_adds_the_log_ratio_of_expected_lengths():
    rho, other = occupancy(MDP, table(1)), occupancy(MDP, table(2))
    z, z_other = rho.sum(), other.sum()
    close(forward_kl(rho / z, other / z_other), forward_kl(rho, other) / z + (z_other / z).log())


def test_the_per_token_form_is_sft():
    """Occupancy-weighted KL of pi_beta(.|s) against pi(.|s) is trajectory KL: the chain rule."""
    beta, own, other = law(1), table(1).log_softmax(-1), table(2).log_softmax(-1)
    visits = occupancy(MDP, table(1)).sum(-1)
    close((visits * (own.exp() * (own - other)).sum(-1)).sum(), forward_kl(beta, law(2)))


def test_the_best_discriminator_is_the_log_ratio():
    p, q = law(1)[:15], law(2)[:15]
    p, q = p / p.sum(), q / q.sum()
    close(tabular.best_discriminator_logit(logistic_loss, p, q), (p / q).log(), rtol=1e-9, atol=1e-9)
    paired = tabular.best_discriminator_logit(bradley_terry_loss, p, q)
    close(paired - paired[0], (p / q).log() - (p[0] / q[0]).log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("divergence", ["reverse", "gail", "fairl"])
def test_rewards_of_the_best_discriminator_give_back_the_divergence(divergence):
    """With h = log beta/pi: E_pi[h] = -KL(pi||beta); E_pi[-h e^h] = -KL(beta||pi); E_pi[softplus(h)] + E_beta[softplus(-h)] = 2 log 2 - 2 JS."""
    beta, pi = law(1), law(2)
    h = (beta / pi).log()
    if divergence == "reverse":
        close((pi * h).sum(), -reverse_kl(beta, pi))
    elif divergence == "fairl":
        close((pi * -h * h.exp()).sum(), -forward_kl(beta, pi))
    else:
        softplus = torch.nn.functional.softplus
        close((pi * softplus(h)).sum() + (beta * softplus(-h)).sum(), 2 * math.log(2) - 2 * jensen_shannon(beta, pi))


GRID = torch.arange(15, dtype=torch.float64)


def fitted(divergence, demonstrator: torch.Tensor, centre: float) -> torch.Tensor:
    """The bell curve over positions 0..14 that minimises the divergence, started at `centre`."""
    w = torch.tensor([centre, 0.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def bell() -> torch.Tensor:
        return (-((GRID - w[0]) ** 2) / (2 * (2 * w[1]).exp())).softmax(-1)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = divergence(demonstrator, bell())
        value.backward()
        return value

    optimiser.step(loss)
    return bell().detach()


def test_forward_kl_covers_both_modes_and_reverse_kl_seeks_one():
    """Two modes at 4 and 10. In an exponential family forward KL matches the moments: it peaks between them, where there is nothing."""
    bimodal = 0.6 * (-((GRID - 4) ** 2) / 0.5).exp() + 0.4 * (-((GRID - 10) ** 2) / 0.5).exp() + 1e-4
    bimodal = bimodal / bimodal.sum()
    covering = fitted(forward_kl, bimodal, 3.0)
    close((covering * GRID).sum(), (bimodal * GRID).sum(), rtol=1e-6, atol=0)
    close((covering * GRID**2).sum(), (bimodal * GRID**2).sum(), rtol=1e-6, atol=0)
    assert bimodal[covering.argmax()] < 0.01
    for start, mode in ((3.0, 4), (11.0, 10)):
        seeking = fitted(reverse_kl, bimodal, start)
        assert seeking.argmax() == mode and seeking[mode - 2 : mode + 3].sum() > 0.99


def test_the_kl_regularised_optimum_is_the_geometric_extrapolation():
    """With the log-ratio of pi_SFT over pi_0 as reward: pi_SFT (pi_SFT / pi_0)^(1/b), and no other law does better."""
    sft, initial, b = law(1), law(2), 0.5
    reward = (sft / initial).log()
    best = tabular.kl_regularised_optimum(sft, reward, b)
    geometric = sft * (sft / initial) ** (1 / b)
    close(best, geometric / geometric.sum())

    def value(logits):
        p = logits.softmax(-1)
        return (p * reward).sum() - b * forward_kl(p, sft)

    close(gradient(value, best.log()), torch.zeros_like(best))
    assert value(best.log()) > value(sft.log()) and value(best.log()) > value((best * sft).sqrt().log())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_law_is_what_n_draws_give(n):
    """By hand over every tuple of n draws, ties shared equally among the drawn."""
    base, reward = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 2.0, 2.0, 0.0])
    by_hand = np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        best = [i for i in draw if reward[i] == max(reward[j] for j in draw)]
        for i in best:
            by_hand[i] += base[list(draw)].prod() / len(best)
    close(best_of_n_law(base, reward, n), by_hand)


def test_the_curve_estimator_is_unbiased():
    """Its mean over every pool of 5 draws, each with its probability, is the exact Best-of-n value; ties included."""
    base, reward, golden = np.array([0.5, 0.2, 0.3]), np.array([0.0, 1.0, 1.0]), np.array([0.3, -1.0, 2.0])
    for n in (1, 2, 4, 5):
        pools = [list(pool) for pool in itertools.product(range(3), repeat=5)]
        mean = sum(base[pool].prod() * best_of_n(reward[pool], golden[pool], n) for pool in pools)
        assert mean == pytest.approx(best_of_n_law(base, reward, n) @ golden, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_kl_bound_holds_and_closes_as_answers_spread(n):
    """`log n - (n-1)/n` bounds KL(Best-of-n || policy), tight where no answer weighs much; loose where few answers are."""

    def gap(size: int) -> float:
        base = np.full(size, 1 / size)
        law = best_of_n_law(base, np.arange(size), n)
        return kl_bound(n) - float(forward_kl(torch.from_numpy(law), torch.from_numpy(base)))

    assert 0 < gap(20_000) < 1e-3 * n
    assert gap(3) > gap(300) > gap(20_000)


def test_the_win_rate_against_one_draw():
    """n / (n + 1) by the selecting reward as the answers spread; by hand for two answers, where a tie counts half."""

    def win_rate(size: int, n: int) -> float:
        base = np.full(size, 1 / size)
        return float(best_of_n_law(base, np.arange(size), n) @ (base.cumsum() - base / 2))

    assert win_rate(20_000, 4) == pytest.approx(4 / 5, abs=1e-4)
    assert win_rate(2, 4) == pytest.approx(1 / 16 * 0.25 + 15 / 16 * 0.75)


@pytest.mark.parametrize("bad", [{"prompt_law_X": (0.5, 0.6)}, {"prompt_law_X": ()}, {"tokens": 1}, {"horizon": 0}])
def test_what_is_no_mdp_is_refused(bad):
    with pytest.raises(ValueError, match=r"must|needs"):
        SequenceMDP(**{"prompt_law_X": (1.0,), "tokens": 2, "horizon": 2, **bad})

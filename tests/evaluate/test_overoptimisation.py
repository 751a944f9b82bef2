"""Gao's law on curves that follow it, and on ones that do not."""

import math

import numpy as np
import pytest

from irlign.evaluate.overoptimisation import fit_gao
from irlign.statistics import kl_bound, powers_of_two

N = powers_of_two(64)
KL = np.array([kl_bound(n) for n in N])
D = np.sqrt(KL)


def law(alpha: float, beta: float, prompts: int = 1) -> np.ndarray:
    return np.tile(5.0 + D * (alpha - beta * D), (prompts, 1))


def test_it_finds_the_law_that_made_the_curve():
    """alpha 1.2, beta 0.5: the peak is at d = 1.2, KL 1.44, between n = 8 (1.20) and n = 16 (1.84)."""
    fit = fit_gao(law(1.2, 0.5), N, KL)
    assert (fit.alpha, fit.beta, fit.r2) == pytest.approx((1.2, 0.5, 1.0))
    share = (1.2 - math.sqrt(KL[3])) / (math.sqrt(KL[4]) - math.sqrt(KL[3]))
    assert fit.peak_n == pytest.approx(8 * 2**share) and not fit.beyond
    assert fit.ci95 == pytest.approx((fit.peak_n, fit.peak_n))


def test_a_curve_that_rises_to_the_end_has_its_peak_beyond():
    fit = fit_gao(law(2.0, 0.1), N, KL)
    assert fit.beyond and fit.peak_n == pytest.approx(64)


def test_a_curve_that_only_falls_peaks_at_one():
    fit = fit_gao(law(-1.0, 0.3), N, KL)
    assert fit.peak_n == pytest.approx(1) and not fit.beyond


def test_the_interval_comes_from_the_prompts():
    """Half of the prompts peak at n = 2, half beyond 64: the mean lies between, and how many of each were drawn matters."""
    fit = fit_gao(np.concatenate([law(0.8, 0.8, 20), law(1.6, 0.2, 20)]), N, KL, resamples=500)
    assert fit.ci95[0] < fit.peak_n < fit.ci95[1] and fit.ci95[1] - fit.ci95[0] > 1


def test_noise_is_not_explained():
    noise = np.random.default_rng(0).normal(size=(30, len(N)))
    assert fit_gao(noise, N, KL).r2 < 0.9 < fit_gao(noise * 1e-4 + law(1.2, 0.5), N, KL).r2


def test_two_points_make_no_curve():
    assert fit_gao(np.zeros((3, 2)), [1, 2], KL[:2]) is None
    assert fit_gao(np.zeros((3, 3)), [1, 2, 4], np.zeros(3)) is None

"""Gao's law on curves that follow it, and on ones that do not."""

import math

import numpy as np
import pytest

from irlign.evaluate.overoptimisation import alarms, deviation, fit_gao, pick_alarms
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


def measured(mean, low=None, high=None):
    return {"mean": mean, "ci95": [mean if low is None else low, mean if high is None else high], "prompts": 9}


CALM = {
    "demonstration_nll": {"initial": 2.0, "sft": 1.0},
    "reward_auc": measured(0.8),
    "distinct_answers": measured(0.9),
    "length_correlation": measured(0.3),
    "repetition_correlation": None,
    "outlier_picks": measured(0.05),
    "style_correlation": measured(0.1),
    "judge_correlation": measured(0.2),
    "judge": {"1": measured(0.0), "2": measured(0.2), "4": measured(0.3)},
}
CHOICE = {"n": 4, "label_free": 4, "auc": 0.8, "demonstrations": 30}


def test_a_calm_run_raises_no_alarm():
    assert alarms(CALM, CHOICE) == []
    unknown = dict.fromkeys(("judge", "judge_correlation", "style_correlation", "demonstration_nll", "outlier_picks"))
    assert alarms({**CALM, **unknown}, {"n": 1, "label_free": None}) == []


@pytest.mark.parametrize(
    ("name", "changed", "choice"),
    [
        ("SFT did not move", {"demonstration_nll": {"initial": 1.0, "sft": 1.1}}, CHOICE),
        ("the reward is at chance", {"reward_auc": measured(0.5, 0.48, 0.53)}, CHOICE),
        ("the reward is saturated", {"reward_auc": measured(0.998, 0.995, 1.0)}, CHOICE),
        ("the pool has no spread", {"distinct_answers": measured(0.1, 0.05, 0.15)}, CHOICE),
        ("the reward follows length", {"length_correlation": measured(-0.7, -0.8, -0.6)}, CHOICE),
        ("the reward follows repetition", {"repetition_correlation": measured(0.7, 0.6, 0.8)}, CHOICE),
        ("picks are outliers", {"outlier_picks": measured(0.4, 0.3, 0.5)}, CHOICE),
        ("the reward follows style", {"style_correlation": measured(0.7, 0.6, 0.8)}, CHOICE),
        ("the reward and the judge disagree", {"judge_correlation": measured(-0.2, -0.3, -0.1)}, CHOICE),
        ("the judge cannot tell demonstrations from other answers", {}, {"n": 4, "label_free": 4, "auc": 0.53, "demonstrations": 30}),
        (
            "by the judge, the held-out curve turns down",
            {"judge": {"1": measured(0.0), "2": measured(0.3), "4": measured(0.1, 0.0, 0.2)}},
            {"n": 2, "label_free": 2},
        ),
        ("n is larger", {}, {"n": 4, "label_free": 2}),
    ],
)
def test_each_alarm_by_what_it_looks_at(name, changed, choice):
    found = alarms({**CALM, **changed}, choice)
    assert len(found) == 1 and name in found[0]["name"] and found[0]["seen"] and found[0]["do"]


@pytest.mark.parametrize("changed", [{"length_correlation": measured(0.6, 0.4, 0.8)}, {"reward_auc": measured(0.5, 0.4, 0.6)}])
def test_an_interval_that_reaches_back_raises_none(changed):
    assert alarms({**CALM, **changed}, CHOICE) == []


def test_what_looks_wrong_with_one_pick():
    assert deviation(3.0, np.array([0.0, 2.0])) == 2.0 and deviation(1.0, np.array([1.0, 1.0])) == 0.0
    assert pick_alarms(True, 2.0, -2.0, 0.1) == [] and pick_alarms(True, 0.0, None, 0.0) == []
    assert pick_alarms(False, 2.1, -2.1, 0.2) == [
        *("cut at the length limit", "far longer than its pool", "hardly ever said by its policy", "repeats itself")
    ]

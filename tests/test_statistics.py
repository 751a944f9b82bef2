"""Statistics against numbers worked by hand or by enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irlign import statistics


def _by_enumeration(selecting, measured, n, finished=None):
    """The mean over all subsets of n of what the best of the subset measures, ties shared."""
    finished = [True] * len(selecting) if finished is None else finished
    values = []
    for subset in itertools.combinations(range(len(selecting)), n):
        top = max((finished[i], selecting[i]) for i in subset)
        best = [i for i in subset if (finished[i], selecting[i]) == top]
        values.append(sum(measured[i] for i in best) / len(best))
    return sum(values) / len(values)


@given(st.data())
def test_best_of_n_is_the_mean_over_all_subsets(data):
    size = data.draw(st.integers(1, 6))
    selecting = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size, unique=True))
    measured = data.draw(st.lists(st.integers(-5, 5), min_size=size, max_size=size))
    finished = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    n = data.draw(st.integers(1, size))
    got = statistics.best_of_n(np.array(selecting), np.array(measured), n, np.array(finished))
    assert got == pytest.approx(_by_enumeration(selecting, measured, n, finished))


def test_best_of_n_by_hand():
    # Best of 2 of 3: the top wins in 2 of 3 pairs, the middle in 1 of 3.
    assert statistics.best_of_n(np.array([1, 2, 3]), np.array([0.0, 3.0, 6.0]), 2) == pytest.approx(5.0)
    # Equal rewards share: the order of the answers must not matter, nor what they measure.
    tied = [statistics.best_of_n(np.array([1, 1, 0]), np.array(g), 2) for g in ([4.0, 0.0, 1.0], [0.0, 4.0, 1.0])]
    assert tied == pytest.approx([2.0, 2.0])
    with pytest.raises(ValueError, match="n=4 does not lie between 1 and the pool's 3"):
        statistics.best_of_n(np.array([1, 2, 3]), np.zeros(3), 4)
    assert statistics.best_of_n_weights(np.arange(5), 3).sum() == pytest.approx(1)


def test_a_finished_answer_beats_every_cut_one():
    selecting, measured = np.array([9.0, 1.0, 5.0]), np.array([100.0, 1.0, 2.0])
    assert statistics.best_of_n(selecting, measured, 3, np.array([False, True, True])) == 2.0
    assert statistics.best_of_n(selecting, measured, 3, np.array([False, False, False])) == 100.0


def test_kl_bound_and_powers():
    assert statistics.kl_bound(1) == 0
    assert statistics.kl_bound(2) == pytest.approx(0.6931 - 0.5, abs=1e-4)
    assert statistics.kl_bound(16) == pytest.approx(2.7726 - 0.9375, abs=1e-4)
    assert [statistics.powers_of_two(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_estimate():
    e = statistics.estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.prompts) == (2.0, 3) and 1 <= e.ci95[0] < 2 < e.ci95[1] <= 3
    constant = statistics.estimate([5.0] * 4)
    assert constant.ci95 == (5.0, 5.0)
    assert statistics.estimate([1.0, 2.0]) == statistics.estimate([1.0, 2.0])
    with pytest.raises(ValueError):
        statistics.estimate([])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [statistics.estimate(rng.normal(size=60), resamples=400, seed=i).ci95 for i in range(300)]
    assert 0.90 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.98


def test_nested_estimate():
    e = statistics.nested_estimate([[1.0, 3.0], [6.0]])
    assert (e.mean, e.prompts) == (4.0, 3)  # the mean of the seeds' means 2 and 6
    wide, narrow = statistics.nested_estimate([[0.0] * 50, [1.0] * 50]), statistics.nested_estimate([[0.0, 1.0] * 25] * 2)
    assert wide.ci95 == (0.0, 1.0) and narrow.ci95[1] - narrow.ci95[0] < 0.5  # what differs between seeds weighs most


def test_paired_permutation_by_enumeration():
    a, b = np.array([3.0, 2.0, 5.0, 4.0]), np.array([1.0, 1.0, 1.0, 1.0])
    test = statistics.paired_test("a", "b", a, b, resamples=20_000)
    # differences 2 1 4 3: only the two all-equal sign patterns of 16 reach the observed sum
    assert test.p == pytest.approx(2 / 16, abs=0.01) and test.mean_difference == 2.5 and test.prompts == 4
    assert statistics.paired_test("a", "b", a, a).p == 1.0
    flipped = statistics.paired_test("b", "a", b, a, resamples=20_000)
    assert flipped.mean_difference == -2.5 and flipped.p == pytest.approx(test.p, abs=0.01)


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(1)
    ps = [statistics.paired_test("a", "b", rng.normal(size=30), rng.normal(size=30), resamples=200, seed=i).p for i in range(200)]
    assert 0.01 <= np.mean([p <= 0.05 for p in ps]) <= 0.10 and min(ps) > 0


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_oracle_n_is_read_on_the_other_half():
    # Every prompt is best at its own n: read on the other half, only what the halves share helps.
    curves = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert statistics.oracle_n(curves).tolist() == [1.0] * 4
    noise = np.random.default_rng(0).normal(size=(400, 6))
    assert abs(statistics.oracle_n(noise).mean()) < 0.15 < noise.max(1).mean()
    assert statistics.oracle_n(np.array([[1.0, 2.0]])).tolist() == [2.0]


def test_auc_and_spearman():
    assert statistics.auc([2, 3], [1, 1]) == 1.0
    assert statistics.auc([1, 2], [1, 2]) == 0.5
    assert statistics.auc([1, 3], [2, 2]) == 0.5
    assert statistics.spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert statistics.spearman([1, 1], [1, 2]) is None


def test_diversity():
    assert statistics.distinct_n(["a b c", "a b d"]) == pytest.approx(3 / 4)  # ab bc ab bd
    assert statistics.distinct_n(["a"]) == 0.0
    assert statistics.repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert statistics.repetition("a b") == 0.0


def test_the_kl_of_best_of_n_by_hand():
    """Two answers, half each, the second better: best of 2 takes it with 3/4, so KL = 1/4 log(1/2) + 3/4 log(3/2)."""
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert statistics.best_of_n_kl(["a", "b"], np.array([0.0, 1.0]), 2) == pytest.approx(by_hand)
    assert statistics.best_of_n_kl(["a", "b", "a", "b"], np.array([0.0, 1.0, 0.0, 1.0]), 2) == pytest.approx(by_hand)
    assert statistics.best_of_n_kl(["a", "b"], np.array([1.0, 1.0]), 2) == pytest.approx(0)
    assert statistics.best_of_n_kl(["a", "b"], np.array([0.0, 1.0]), 1) == pytest.approx(0)
    spread = statistics.best_of_n_kl([str(i) for i in range(500)], np.arange(500.0), 8)
    assert statistics.kl_bound(8) - 0.02 < spread < statistics.kl_bound(8)


def test_ratios_of_sums_with_seeds_outside_prompts():
    """Two seeds: (1 + 3) / (2 + 6) however many prompts each has; constant within a seed, so only the seeds move it."""
    ratio = statistics.nested_ratio([np.full(10, 1.0), np.full(20, 3.0)], [np.full(10, 2.0), np.full(20, 6.0)])
    assert ratio is not None and ratio.mean == pytest.approx(0.5) and ratio.ci95 == pytest.approx((0.5, 0.5)) and ratio.prompts == 30
    assert statistics.nested_ratio([np.ones(5)], [np.zeros(5)]) is None
    wide = statistics.nested_ratio([np.ones(4), np.ones(4)], [np.full(4, 3.0), np.full(4, -1.0)])
    assert wide is not None and wide.mean == pytest.approx(1.0) and wide.ci95[1] == np.inf  # half the resamples of the seeds have no gap


def test_a_seed_drawn_twice_gives_two_draws_of_its_prompts():
    """One law for all seeds: the interval is about that of all the prompts together, not wider."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=100) for _ in range(10)]
    values = [v - v.mean() for v in values]
    low, high = statistics.nested_estimate(values).ci95
    assert (high - low) / (2 * 1.96) == pytest.approx(1 / np.sqrt(1000), rel=0.1)


def test_worse_by_hand():
    """Three prompts, all below 0: of 8 sign patterns only the observed one is as low, so p is near 1/8; all above gives 1."""
    assert statistics.worse_p(np.array([-1.0, -2.0, -3.0])) == pytest.approx(1 / 8, abs=0.02)
    assert statistics.worse_p(np.array([1.0, 2.0, 3.0])) == 1.0
    assert statistics.worse_p(np.zeros(5)) == 1.0


def test_the_spread_within_groups_by_hand():
    """Around the means 1 and 10: deviations 1, 1, 0."""
    assert statistics.spread_within(["a", "a", "b"], [0.0, 2.0, 10.0]) == pytest.approx(np.sqrt(2 / 3))
    assert statistics.spread_within(["a", "b"], [3.0, 7.0]) == 1.0 and statistics.spread_within([], []) == 1.0

"""Optimal stopping: gains by hand, the exact optimum where the law is known, the budget kept, and what it buys where prompts differ."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from irlign.errors import ConfigError, DataError
from irlign.optimise.adaptive import FEWEST, Laws, answers_taken, cost_of, expected_gains, laws_of, stop_early
from irlign.statistics import best_of_n

FACES = np.array([[0.0, 1.0, 2.0, 3.0]])  # one known law: a die with four faces


def test_laws_by_hand():
    """Variances 2 and 8 over pools of two, their mean 5: (2 + 5) / 2 and (8 + 5) / 2; means 1 and 12 lie 5.5 from theirs."""
    laws = laws_of(np.array([[0.0, 2.0], [10.0, 14.0]]))
    assert laws.means_J.tolist() == [1, 12] and laws.variances_J == pytest.approx([3.5, 6.5])
    assert laws.beside == pytest.approx(5.5 * 2**-0.2)
    assert laws_of(np.array([[1.0, 1.0], [2.0, 2.0]])).variances_J.tolist() == [1, 1]


def test_the_expected_gain_by_hand():
    """Means 1 and 3, variance 2 each. At 2 both laws are as likely: (0 + (4 - 2) / 2) / 2. A further 1 has log-likelihood 0 under the
    first and -(1 - 3)^2 / 4 = -1 under the second, so that the second weighs 1 / (1 + e), and alone has something to gain."""
    laws = Laws(np.array([[0.0, 2.0], [2.0, 4.0]]), np.array([1.0, 3.0]), np.array([2.0, 2.0]), 0.0)
    assert expected_gains(np.array([2.0, 1.0]), laws) == pytest.approx([0.5, 1 / (1 + math.e)])
    assert expected_gains(np.array([2.0, 1.0]), laws, own=1) == pytest.approx([0, 0])
    assert expected_gains(np.array([2.0, 1.0]), laws, own=0) == pytest.approx([1, 1])


def test_a_law_moves_to_the_answers_by_hand():
    """Variances 1 and 1: after one 0 the mean 1 is expected half way, at 0.5, after two a third of the way from 0: the pool 0, 2 lies at
    -0.5, 1.5 and then at -2/3, 4/3."""
    laws = Laws(np.array([[0.0, 2.0]]), np.array([1.0]), np.array([1.0]), 1.0)
    assert expected_gains(np.array([0.0, 0.0]), laws) == pytest.approx([0.75, 2 / 3])


def test_laws_are_weighed_by_the_likelihood_of_all_answers_together():
    """Answers that share an unknown mean are jointly normal with covariance `variance I + beside^2`."""
    rewards, pools = np.array([0.3, 1.1, -0.4]), np.array([[0.0, 2.0], [1.0, 9.0]])
    laws = Laws(pools, pools.mean(1), np.array([1.0, 4.0]), 0.7)
    alone = [expected_gains(rewards, laws, own=other)[-1] for other in (1, 0)]
    joint = [
        multivariate_normal.pdf(rewards, np.full(3, m), v * np.eye(3) + 0.49) for m, v in zip(laws.means_J, laws.variances_J, strict=True)
    ]
    assert expected_gains(rewards, laws)[-1] == pytest.approx(np.dot(joint, alone) / sum(joint))


def test_the_cost_by_hand():
    """Steps past the first and the second answer are worth 3, 1 and 2, 0.5; two prompts may take (budget - 1) 2 of them, the best."""
    gains = np.array([[3.0, 1.0, 2.0], [2.0, 0.5, 9.0]])
    for budget, cost, taken in ((1, 3, [1, 1]), (1.5, 2, [2, 1]), (2, 1, [2, 2]), (2.5, 0.5, [3, 2]), (3, 0, [3, 3])):
        assert cost_of(gains, budget) == cost
        assert [answers_taken(of, cost) for of in gains] == taken and np.mean(taken) == budget


def _worth(stop, cost, faces, horizon):
    """The exact expectation of the best less the cost of the answers, over all equally likely sequences."""
    sequences = np.array(list(itertools.product(faces, repeat=horizon)))
    taken = [stop(of) for of in sequences]
    return np.mean([of[:n].max() - cost * n for of, n in zip(sequences, taken, strict=True)])


@pytest.mark.parametrize("cost", [0.1, 0.3, 0.7, 0.8])
def test_under_a_known_law_it_is_the_optimum(cost):
    """Against backward induction over all stopping rules with a die and at most five throws."""

    def optimum(best, left):
        return max(best, np.mean([optimum(max(best, face), left - 1) for face in FACES[0]]) - cost) if left else best

    def rule(rewards):
        return answers_taken(expected_gains(rewards, laws_of(FACES)), cost)

    best_rule = np.mean([optimum(face, 4) for face in FACES[0]]) - cost
    assert _worth(rule, cost, FACES[0], 5) == pytest.approx(best_rule)
    assert best_rule > max(_worth(lambda _, n=n: n, cost, FACES[0], 5) for n in range(1, 6)) + 0.01 or cost == 0.8


def test_under_an_unknown_law_it_is_near_the_optimum():
    """Half of the prompts throw 0 or 1, the others 0 or 10, and a 0 tells nothing. Backward induction with exact posteriors is the bound."""
    kinds, cost = np.array([[0.0, 1.0], [0.0, 10.0]]), 0.4
    laws = Laws(kinds, kinds.mean(1), np.array([9.0, 9.0]), 0.0)

    def optimum(best, left):
        if not left:
            return best
        ahead = [np.mean([optimum(max(best, face), left - 1) for face in kind]) for kind in kinds]
        going = (ahead[0] + ahead[1]) / 2 if best == 0 else ahead[int(best > 1)]
        return max(best, going - cost)

    def rule(rewards):
        return answers_taken(expected_gains(rewards, laws), cost)

    best_rule = np.mean([optimum(face, 4) for kind in kinds for face in kind]) - cost
    worth = np.mean([_worth(rule, cost, kind, 5) for kind in kinds])
    assert 0.94 * best_rule < worth <= best_rule
    assert worth > max(np.mean([_worth(lambda _, n=n: n, cost, kind, 5) for kind in kinds]) for n in range(1, 6))


def _pools(seed, prompts=90, answers=32):
    """Prompts of different spread: some answers are nearly all alike, others worth searching."""
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=(prompts, 1)), np.resize([0.1, 0.5, 2.0], (prompts, 1)), size=(prompts, answers))


def test_it_buys_more_than_the_same_number_for_all():
    """At a mean below 8 the picks are worth more than Best-of-10 for every prompt, and the wide prompts get most of the answers."""
    laws, pools = laws_of(_pools(1)), _pools(2)
    cost = cost_of(np.stack([expected_gains(of, laws, own) for own, of in enumerate(laws.pools_J_M)]), 8)
    taken = np.array([answers_taken(expected_gains(of, laws), cost) for of in pools])
    worth = np.mean([of[:n].max() for of, n in zip(pools, taken, strict=True)])
    assert taken.mean() < 8 and taken[2::3].mean() > 3 * taken[::3].mean()
    assert worth > np.mean([best_of_n(of, of, 10) for of in pools])


def _rows(seed=0, prompts=FEWEST, cut=()):
    return [
        {
            "prompt_id": f"{split}{p}",
            "split": split,
            "index": i,
            "finish_reason": "length" if (split, p, i) in cut else "eos",
            "reward/r": float(reward),
        }
        for split, of in (("dev", _pools(seed, prompts)), ("test", _pools(seed + 1, 9)))
        for p, pool in enumerate(of)
        for i, reward in enumerate(pool[:12])
    ]


def test_the_budget_is_kept_on_dev_and_test_decides_nothing():
    rows = _rows()
    for budget in (1, 2, 4.5):
        used, about = stop_early(rows, "r", 8, budget)
        assert set(used) == {row["prompt_id"] for row in rows} and max(used.values()) <= 8
        assert budget - 0.3 < np.mean([n for p, n in used.items() if p.startswith("dev")]) == about["n"]["dev"] <= budget
    other = [{**row, "reward/r": row["reward/r"] + (row["split"] == "test")} for row in rows]
    assert stop_early(other, "r", 8, 4.5)[1]["cost"] == about["cost"]
    assert stop_early(rows[::-1], "r", 8, 4.5)[0] == used  # in the order drawn, however the rows stand


def test_a_cut_answer_is_no_reason_to_stop():
    """The last answer of a test prompt that was used is its best; where it is cut it is worth nothing, and the prompt goes on."""
    used, _ = stop_early(_rows(), "r", 12, 4)
    p, n = next((int(p[4:]), n) for p, n in used.items() if p.startswith("test") and 1 < n < 12)
    assert stop_early(_rows(cut={("test", p, i) for i in range(n)}), "r", 12, 4)[0][f"test{p}"] > n


def test_too_few_dev_prompts_are_an_error():
    with pytest.raises(ConfigError, match="19 dev prompts say too little") as error:
        stop_early(_rows(prompts=19), "r", 8, 4)
    assert error.value.where == "best_of_n.budget"


@pytest.mark.parametrize("left", [5, 1])
def test_a_dev_pool_of_too_few_answers_is_an_error(left):
    rows = [row for row in _rows() if row["prompt_id"] != "dev3" or row["index"] < left]
    with pytest.raises(DataError, match=rf"dev prompt dev3 has {left} answers?, and a prompt may use 8") as error:
        stop_early(rows, "r", 8, 4)
    assert error.value.where == "best_of_n.budget" and f"lower best_of_n.n to {left}" in error.value.do
    test = [row for row in _rows() if row["prompt_id"] != "test3" or row["index"] < left]  # such a one takes what it has
    assert stop_early(test, "r", 8, 4)[0]["test3"] <= left

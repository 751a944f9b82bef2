"""Ways to choose n: rules by hand, and every way on one cell."""

import numpy as np

from irlign.arena.cell import Cell, Place
from irlign.arena.judges import (
    BY,
    SELECTORS,
    STOPPING,
    WAYS,
    gao,
    lower_bound,
    not_beaten,
    one_error,
    simplest,
    stopping_table,
    two_sample,
)
from irlign.runs import Run
from tests.arena.test_leaderboard import TINY

NOISE = np.array([-1, 0, 1.0])


def gains(*of):
    """Three prompts; each point is a mean and a spread."""
    return np.stack([np.zeros(3), *(mean + spread * NOISE for mean, spread in of)], axis=1)


def test_the_rules_by_hand():
    rising = gains((1.0, 0.0), (1.1, 0.2))  # the bound falls (1.1 - 1.64 * 0.2 / sqrt(3) = 0.91), the mean rises
    assert (lower_bound([1, 2, 4], rising), not_beaten([1, 2, 4], rising)) == (2, 4)
    level = gains((1.0, 0.0), (0.9, 0.2))  # lower by less than is shown
    assert (lower_bound([1, 2, 4], level), not_beaten([1, 2, 4], level)) == (2, 4)
    assert (one_error([1, 2, 4], rising), simplest([1, 2, 4], rising)) == (2, 2)  # 1.1 - 0.2 / sqrt(3) = 0.98; 0.1 is within 0.12
    steep = gains((1.0, 0.0), (1.2, 0.2))
    assert (one_error([1, 2, 4], steep), simplest([1, 2, 4], steep)) == (4, 4)  # 1.2 - 0.12 = 1.08; 0.2 is not within 0.12
    fallen = gains((1.0, 0.0), (0.7, 0.2))
    assert (lower_bound([1, 2, 4], fallen), not_beaten([1, 2, 4], fallen)) == (2, 2)
    unshown = gains((0.1, 1.0), (0.2, 1.0))
    assert {rule([1, 2, 4], unshown) for rule in (lower_bound, not_beaten, gao, one_error, simplest)} == {1}


def test_gaos_law_stops_at_its_peak():
    """gain = d (alpha - beta d) exactly, with d of the KL bound: d = 0, 0.44, 0.80, 1.10, 1.35; the peak lies at d = 0.85."""
    from irlign.statistics import kl_bound

    n = [1, 2, 4, 8, 16]
    d = np.sqrt([kl_bound(k) for k in n])
    law = np.tile(d * (1.7 - d), (3, 1)) + 1e-3 * NOISE[:, None] * d
    assert gao(n, law) == 4
    assert gao(n, np.tile(d, (3, 1)) + 1e-3 * NOISE[:, None] * d) == 16


def test_every_way_on_a_cell(tmp_path):
    """Each gives an n of the curve; the largest is the pool; the picks carry the reward's own scores."""
    place = Place(str(tmp_path), TINY, 0)
    with Run.open(place.folder, place.recipe()) as run:
        cell = Cell(place.recipe(), run)
        for name, method in STOPPING.items():
            pick = method(cell)
            assert pick.n in (1, 2, 4), name
            assert pick.n == 4 or not name.endswith("always the largest")
        scores = next(iter(SELECTORS.values()))(cell)
        assert np.array_equal(next(iter(STOPPING.values()))(cell).scores, scores)
        assert two_sample(cell, scores) == two_sample(cell, 2 * scores + 1)  # ranks decide, not values


def test_the_table_of_ways():
    row = {"regret": {"mean": 0.1, "ci95": [0.0, float("inf")]}, "worse": 1, "runs": 5}
    lines = list(stopping_table([{**row, "method": f"init-sft{BY}judge"}, {**row, "method": "SFT"}]))
    assert lines == ["| n chosen by | init-sft |", "|---|---|", "| judge | 10% [0%, ∞], worse 1/5 |"]
    assert set(WAYS) == {name.split(BY, 1)[1] for name in STOPPING}

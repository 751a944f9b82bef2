"""Ways to choose n: rules by hand, and every way on one cell."""

from collections import Counter

import numpy as np

from irlign.arena.cell import Cell, Place
from irlign.arena.judges import (
    BY,
    SELECTORS,
    STOPPING,
    WAYS,
    _repeated,
    gains_no_less,
    gao,
    highest,
    likelier_not_beaten,
    lower_bound,
    not_beaten,
    one_error,
    simplest,
    stopping_table,
    two_sample,
)
from irlign.optimise.heldout import Answers
from irlign.optimise.label_free import Curve
from irlign.runs import Run
from tests.arena.test_leaderboard import TINY

NOISE = np.tile([-1, 0, 1.0], 100)
NOISE *= 10 / NOISE.std(ddof=1)  # means of 300 have a standard error of 1 / sqrt(3)


def curve(*of):
    """300 prompts, for which Student's t is the normal; each point is a mean and a spread, whose standard error is spread / sqrt(3)."""
    gains = np.stack([np.zeros(300), *(mean + spread * NOISE for mean, spread in of)], axis=1)
    return Curve([1, 2, 4][: len(of) + 1], gains, np.zeros(len(of) + 1, dtype=bool))


def test_the_rules_by_hand():
    rising = curve((1.0, 0.0), (1.1, 0.2))  # the bound falls (1.1 - 1.64 * 0.2 / sqrt(3) = 0.91), the mean rises
    assert (lower_bound(rising), highest(rising), not_beaten(rising)) == (2, 4, 4)
    level = curve((1.0, 0.0), (0.9, 0.2))  # lower by less than is shown
    assert (lower_bound(level), highest(level), not_beaten(level)) == (2, 2, 4)
    assert {likelier_not_beaten(of) for of in (rising, level)} == {2}
    likelier = np.array([False, False, True])
    assert {likelier_not_beaten(of._replace(likelier=likelier)) for of in (rising, level)} == {4}
    assert [gains_no_less(of._replace(likelier=likelier)) for of in (rising, level)] == [4, 2]
    assert (one_error(rising), simplest(rising)) == (2, 2)  # 1.1 - 0.2 / sqrt(3) = 0.98; 0.1 is within 0.12
    steep = curve((1.0, 0.0), (1.2, 0.2))
    assert (one_error(steep), simplest(steep)) == (4, 4)  # 1.2 - 0.12 = 1.08; 0.2 is not within 0.12
    fallen = curve((1.0, 0.0), (0.7, 0.2))
    assert (lower_bound(fallen), not_beaten(fallen)) == (2, 2)
    unshown = curve((0.1, 1.0), (0.2, 1.0))
    assert {rule(unshown) for rule in (highest, lower_bound, not_beaten, gao, one_error, simplest)} == {1}


def test_gaos_law_stops_at_its_peak():
    """gain = d (alpha - beta d) exactly, with d of the KL bound: d = 0, 0.44, 0.80, 1.10, 1.35; the peak lies at d = 0.85."""
    from irlign.statistics import kl_bound

    n = [1, 2, 4, 8, 16]
    d = np.sqrt([kl_bound(k) for k in n])
    law, level = (np.tile(of, (300, 1)) + 1e-3 * NOISE[:, None] * d for of in (d * (1.7 - d), d))
    assert gao(Curve(n, law, np.zeros(5, dtype=bool))) == 4
    assert gao(Curve(n, level, np.zeros(5, dtype=bool))) == 16


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


def test_repeated_answers_keep_their_prompts():
    answers = Answers(["a", "a", "b", "c"], np.arange(4.0)[:, None])
    found = _repeated(answers, Counter("bba"))
    assert (list(found.prompt_ids), found.features[:, 0].tolist()) == (["a", "a", "b", "b"], [0, 1, 2, 2])


def test_the_table_of_ways():
    row = {"regret": {"mean": 0.1, "ci95": [0.0, float("inf")]}, "worse": 1, "runs": 5}
    lines = list(stopping_table([{**row, "method": f"init-sft{BY}judge"}, {**row, "method": "SFT"}]))
    assert lines == ["| n chosen by | init-sft |", "|---|---|", "| judge | 10% [0%, ∞], worse 1/5 |"]
    assert set(WAYS) == {name.split(BY, 1)[1] for name in STOPPING}

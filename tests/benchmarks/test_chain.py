"""The benchmark of the whole job, its comparison by hand: ratios of costs, and when a difference is not worse."""

import numpy as np
import pytest

chain = pytest.importorskip("chain")


def _cost(seconds, peak):
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_mb": peak}


@pytest.mark.parametrize(("gap", "not_worse"), [(1.0, False), (4.0, True)])  # -0.1 is below 5 % of 1, and above 5 % of 4
def test_sides_are_held_to_the_assembly(gap, not_worse):
    found = {"fewer": _cost(25.0, 500.0), "assembly": _cost(100.0, 1500.0), "irlign": _cost(50.0, 750.0)}
    base = np.array([1.0, 2.0, 4.0])
    rows = chain.against(found, {"irlign": base + 0.5, "assembly": base, "fewer": base - 0.1}, gap)
    assert list(rows) == ["fewer", "irlign"]
    assert rows["irlign"]["ratio"] == {"seconds": 2, "cpu_seconds": 2, "peak_mb": 2}
    assert rows["fewer"]["ratio"] == {"seconds": 4, "cpu_seconds": 4, "peak_mb": 3}
    assert rows["irlign"]["ci95"] == [0.5, 0.5] and rows["irlign"]["not_worse"]
    assert rows["fewer"]["difference"] == pytest.approx(-0.1) and rows["fewer"]["not_worse"] is not_worse


def test_an_interval_that_reaches_too_low_is_not_shown_to_be_as_good():
    """Differences of 1 and -1 have a mean of 0 and an interval of both."""
    golden = {"irlign": np.array([1.0, -1.0]), "assembly": np.zeros(2)}
    row = chain.against({"irlign": _cost(1.0, 1.0), "assembly": _cost(1.0, 1.0)}, golden, 1.0)["irlign"]
    assert (row["difference"], row["ci95"], row["not_worse"]) == (0, [-1, 1], False)

"""How sure the reward is against how right, by hand and on answers whose law is known."""

import numpy as np
import pytest

from irlign.evaluate.calibration import calibration

OPTIONS = {"resamples": 400, "seed": 0}


def test_by_hand():
    """Three pairs: margins 2 (right), -1 (wrong) and 0 (half right), in bins of their own from the least sure."""
    found = calibration({"p": np.array([2.0, -1.0]), "q": np.array([1.0])}, {"p": np.array([0.0]), "q": np.array([1.0])}, bins=3, **OPTIONS)
    says = [1 / (1 + np.exp(-m)) for m in (0, 1, 2)]
    assert [of["predicted"] for of in found["bins"]] == pytest.approx(says)
    assert [of["observed"]["mean"] for of in found["bins"]] == [0.5, 0.0, 1.0] and [of["pairs"] for of in found["bins"]] == [1, 1, 1]
    assert found["error"]["mean"] == pytest.approx((0 + says[1] + 1 - says[2]) / 3) and found["error"]["prompts"] == 2
    assert [of["observed"]["prompts"] for of in found["bins"]] == [1, 1, 1]


def test_without_a_prompt_that_has_both_sides_there_is_none():
    assert calibration({"p": np.array([1.0])}, {"q": np.array([1.0])}, **OPTIONS) is None


@pytest.mark.parametrize(("scale", "error"), [(1.0, 0.0), (3.0, 0.13)])
def test_logits_of_a_known_law_lie_on_the_line_and_sharpened_ones_below(scale, error):
    """Scores are N(1/2, 1) for the better and N(-1/2, 1) for the worse side, whose log ratio is the score itself: calibrated by construction."""
    rng = np.random.default_rng(0)
    better = {str(i): scale * rng.normal(0.5, 1, 4) for i in range(2000)}
    worse = {p: scale * rng.normal(-0.5, 1, 4) for p in better}
    found = calibration(better, worse, **OPTIONS)
    assert found["error"]["mean"] == pytest.approx(error, abs=0.02)
    last = found["bins"][-1]
    assert (last["observed"]["ci95"][1] < last["predicted"]) == (scale > 1)
    low, high = found["error"]["ci95"]
    assert low <= found["error"]["mean"] <= high + 0.01

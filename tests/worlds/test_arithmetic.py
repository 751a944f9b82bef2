"""The arithmetic world: its golden reward, worked by hand."""

import pytest

from irlign.worlds.arithmetic import HIGHEST, ArithmeticWorld

COINS = "Work it out: I have 7 coins, earn 5, double them, spend 3."  # 12, 24, 21
STEPS = " 7 plus 5 is 12. 12 times 2 is 24. 24 minus 3 is 21."


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (f"{STEPS} The result is 21.", 4.0),
        (STEPS, 2.0),
        (" The result is 21.", 2.0),
        ("", 0.0),
        (" The result is 24.", -0.5),
        (" The result is 21. The result is 24.", -0.5),
        (" 7 plus 5 is 13.", -0.25),
        # The slip costs its own step and the result, not the steps that go on from it.
        (" 7 plus 5 is 11. 11 times 2 is 22. 22 minus 3 is 19. The result is 19.", -0.25 + 4 / 3 - 0.5),
        # Steps on the true value after a slip do not go on from what was stated.
        (" 7 plus 5 is 11. 12 times 2 is 24.", -0.5),
        # A step left out: the later ones count where they go on from the last stated value.
        (" 7 times 2 is 14. 14 minus 3 is 11.", 4 / 3),
        # Nothing is counted twice, and nothing that was not asked for.
        (" 7 plus 5 is 12. 12 plus 5 is 17.", 2 / 3 - 0.25),
        (" 7 plus 4 is 11.", -0.25),
        (" 12 times 2 is 24.", -0.25),
        (" Let me see. 7 plus 5 is 12. Behold the ledger: 12 times 2 is 24. So says the ledger.", 4 / 3),
        (" 7 plus 5 is 12 12 times 2 is 24", 0.0),
    ],
)
def test_golden_by_hand(answer, value):
    assert ArithmeticWorld.golden([COINS], [answer]) == pytest.approx([value])


def test_values_stay_small():
    for d in ArithmeticWorld(skill=1.0, demonstrations=500).splits(0)["train"]:
        assert all(0 <= int(word.strip(".")) <= HIGHEST for word in d.completion.split() if word.strip(".").isdigit())

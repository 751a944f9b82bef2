"""The arithmetic world: its golden reward, worked by hand."""

import pytest

from irlign.worlds.arithmetic import HIGHEST, ArithmeticWorld

COINS = "Work it out: I have 7 coins. First earn 5. Then double them."  # 12, 24
STEPS = " First 7 plus 5 is 12. Then 12 times 2 is 24."


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (f"{STEPS} The result is 24.", 4.0),
        (STEPS, 2.0),
        (" The result is 24.", 2.0),
        ("", 0.0),
        (" The result is 12.", -0.5),
        (" The result is 24. The result is 12.", -0.5),
        (" First 7 plus 5 is 13.", -0.25),
        # The slip costs its own step and the result, not the step that goes on from it.
        (" First 7 plus 5 is 11. Then 11 times 2 is 22. The result is 22.", -0.25 + 1 - 0.5),
        # A step on the true value after a slip does not go on from what was stated.
        (" First 7 plus 5 is 11. Then 12 times 2 is 24.", -0.5),
        # A step left out: the later one counts where it goes on from the last stated value.
        (" Then 7 times 2 is 14.", 1.0),
        (" Then 12 times 2 is 24.", -0.25),
        # Nothing is counted twice, and nothing that was not asked for.
        (" First 7 plus 5 is 12. Then 12 plus 5 is 17.", 1 - 0.25),
        (" First 7 plus 4 is 11.", -0.25),
        (" Let me see. 7 plus 5 is 12. Behold the ledger: 12 times 2 is 24. So says the ledger.", 2.0),
        (" First 7 plus 5 is 12 Then 12 times 2 is 24", 0.0),
    ],
)
def test_golden_by_hand(answer, value):
    assert ArithmeticWorld.golden([COINS], [answer]) == pytest.approx([value])


def test_values_stay_small():
    for d in ArithmeticWorld(skill=1.0, demonstrations=500).splits(0)["train"]:
        assert all(0 <= int(word.strip(".")) <= HIGHEST for word in d.completion.split() if word.strip(".").isdigit())

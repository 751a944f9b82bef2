"""The errands world: its golden reward, worked by hand, and what the user takes back."""

import pytest

from irlign.records import Message
from irlign.worlds.errands import BACK, SHOPS, ErrandsWorld

SAID = "From David at the bakery the pie, a sweet one, in a tin."
ALL = "From David. The pie. A sweet one. In a tray."


def _prompt(last):
    said = (("user", SAID), ("assistant", "Noted."), ("user", last))
    return tuple(Message(role=role, content=content) for role, content in said)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (ALL, 4.0),
        (f"Let me think. {ALL} Thus reads the scroll.", 4.0),
        ("", 0.0),
        (ALL.replace("tray", "tin"), 2.5),  # as it stood before it was taken back
        (ALL.replace("David", "Anna"), 2.5),
        (ALL.replace("The pie. ", ""), 3.0),
        (f"{ALL} A salty one.", 2.5),  # two kinds are no answer
        ("In a tray. In a tray.", 1.0),
        ("Tray, David, sweet pie.", 0.0),
        (f"Read it yourself. {ALL} Stop wasting my time.", 2.0),
    ],
)
@pytest.mark.parametrize("last", ["Not tin but tray. So what is it?", "Make that tray. Remind me."])
def test_golden_by_hand(last, answer, value):
    assert ErrandsWorld.golden([_prompt(last)], [answer]) == pytest.approx([value])


def test_nothing_taken_back_leaves_what_was_said():
    assert ErrandsWorld.golden([_prompt("Remind me.")] * 2, [ALL, ALL.replace("tray", "tin")]) == pytest.approx([2.5, 4.0])


@pytest.mark.parametrize("slot", BACK)
@pytest.mark.parametrize("way", [0, 1])
def test_every_slot_can_be_taken_back(slot, way):
    old = {"person": "David", "thing": "pie", "kind": "sweet", "wrap": "tin"}
    new = {"person": "Emma", "thing": "cake", "kind": "salty", "wrap": "tray"}
    prompt = _prompt(BACK[slot][way].format(**old, **{f"new_{name}": value for name, value in new.items()}))
    told = ALL.replace("tray", "tin")
    assert ErrandsWorld.golden([prompt] * 2, [told, told.replace(old[slot], new[slot])]) == pytest.approx([2.5, 4.0])


def test_conversations_are_as_long_as_they_should_be():
    for d in ErrandsWorld().splits(0)["test"]:
        assert [m["role"] for m in d.prompt.content] == ["user", "assistant", "user"]
        assert sum(shop in d.prompt.content[0]["content"] for shop in SHOPS) == 1

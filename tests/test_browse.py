"""The cards of the report: word by word, in their order, with what is changed and what looks wrong."""

import itertools

import pytest

from irlign import browse


@pytest.mark.parametrize(
    ("base", "text", "parts"),
    [
        ("a red cat sat", "a blue cat sat", [("same", "a"), ("gone", " red"), ("new", " blue"), ("same", " cat sat")]),
        ("a cat", "a cat", [("same", "a cat")]),
        ("", "a cat", [("new", "a cat")]),
        ("a cat", "", [("gone", "a cat")]),
        ("a  b", "a b", [("same", "a b")]),
    ],
)
def test_differences_by_hand(base, text, parts):
    assert browse.differences(base, text) == parts


def test_the_text_is_whole_without_what_is_gone():
    base, text = " one two\n\nthree four. ", "\tone  three\nfive four.\n"
    assert "".join(t for kind, t in browse.differences(base, text) if kind != "gone") == text


def test_long_texts_are_not_compared():
    long = "a " * (browse.DIFFED + 1)
    assert browse.differences("b", long) == [("same", long)]


def _row(i, gain, pick="x", alarms=""):
    row = {"prompt_id": str(i), "prompt": f"ask {i}", "alarms": alarms, "golden/sft": 0.0}
    for source, text in (("initial", "a"), ("sft", "x"), ("best_of_n", pick)):
        row |= {f"answer/{source}": text, f"answer_reward/{source}": 1.0, f"answer_golden/{source}": float(gain)}
    return row


def _cards(rows, chosen=4):
    return browse.cards(rows, True, chosen, False, "sft")


def test_order_and_flags():
    rows = [_row(i, gain) for i, gain in enumerate([3, -1, 7, 0, 5, 1, 2, 4])]
    rows[2] |= {"answer/best_of_n": "y", "alarms": "repeats itself; cut at the length limit"}
    cards = _cards(rows)
    assert [c["prompt"] for c in cards] == [f"ask {i}" for i in (2, 4, 6, 5, 3, 1, 7, 0)]  # 7 5 | 2 1 | 0 -1 | then 4 3
    assert [c["kind"] for c in cards] == ["most gained"] * 2 + ["typical"] * 2 + ["least gained"] * 2 + [""] * 2
    assert [c["changed"] for c in cards] == [True] + [False] * 7 and cards[0]["alarms"] == ["repeats itself", "cut at the length limit"]
    assert [c["worse"] for c in cards] == [False] * 5 + [True] + [False] * 2 and cards[5]["gain"] == "−1.00"
    assert [a["source"] for a in cards[0]["answers"]] == ["initial", "sft", "best_of_n"] and cards[0]["answers"][2]["pick"]


def test_one_answer_alone_has_no_changed_winner():
    (card,) = _cards([_row(0, 1, pick="y")], chosen=1)
    assert not card["changed"] and [a["source"] for a in card["answers"]] == ["initial", "sft"] and card["answers"][1]["pick"]


def test_many_prompts_are_left_out_evenly():
    cards = _cards([_row(i, i) for i in range(1000)])
    assert len(cards) == browse.SHOWN == len({c["prompt"] for c in cards})
    shown = sorted(int(c["prompt"].split()[1]) for c in cards)
    assert shown[:2] == [0, 1] and shown[-2:] == [998, 999] and max(b - a for a, b in itertools.pairwise(shown)) <= 4
    assert "300 of them are here" in browse.words(True, 300, 1000, "sft") and "of them" not in browse.words(True, 8, 8, "sft")

"""Contrasts: one ending, one length, every answer used, and the guard on what leaks."""

import random

import pytest

from irlign.errors import DataError, GuardError
from irlign.records import Contrast, Demonstration, Preference, Prompt, Sample
from irlign.reward.contrasts import (
    answers_of,
    build_contrasts,
    ended,
    guard_leak,
    leak_controls,
    match_length,
    raw_controls,
    require_pairs,
    threshold_accuracy,
)

ASK, OTHER = Prompt.of("Say it.", "train"), Prompt.of("And this?", "train")


def _sample(text, finished=True, prompt=ASK, index=0):
    return Sample(prompt, index, text, "eos" if finished else "length", 5, -1.0)


def test_one_ending():
    assert ended(" One. Two. Thr", finished=False) == " One. Two."
    assert ended(" One. Two. Thr", finished=True) == " One. Two. Thr"
    assert ended(" One. Two. ", finished=True) == " One. Two."
    assert ended(" never a whole sen", finished=False) == " never a whole sen"
    assert ended("", finished=False) == ""


def test_one_length():
    text = " One. Two three. Four."  # sentences end after 5, 16 and 22 characters
    assert match_length(text, 5) == " One."
    assert match_length(text, 9) == " One."
    assert match_length(text, 12) == " One. Two three."
    assert match_length(text, 100) == text
    assert match_length(text, 0) == " One."
    assert match_length("no sentence end", 3) == "no sentence end"
    assert match_length("\n\n Hello. You.", 0).strip() == "Hello."  # never empty
    assert match_length("", 3) == ""


SFT = [_sample(" Good one.", index=0), _sample(" Good two is long.", index=1), _sample(" Fine.", prompt=OTHER)]
INIT = [
    _sample(" Bad one here. And cut h", False),
    _sample(" Bad two.", False, OTHER),
    _sample(" Bad three is. Lo", False, OTHER, 1),
]
DEMOS = [Demonstration(ASK, " The answer. "), Demonstration(OTHER, " Indeed so.")]


def _pairs(contrast, match=True, **sources):
    return build_contrasts(*answers_of(contrast, **sources), match=match)[0]


def _texts(pairs):
    return {(p.prompt.content, p.better, p.worse) for p in pairs}


def test_the_pairs_of_every_contrast():
    assert _texts(_pairs("init-sft", sft=SFT, init=INIT, match=False)) == {
        ("Say it.", " Good one.", " Bad one here."),
        ("Say it.", " Good two is long.", " Bad one here."),
        ("And this?", " Fine.", " Bad two."),
        ("And this?", " Fine.", " Bad three is."),
    }
    assert _texts(_pairs("init-demo", init=INIT, demonstrations=DEMOS, match=False)) == {
        ("Say it.", " The answer.", " Bad one here."),
        ("And this?", " Indeed so.", " Bad two."),
        ("And this?", " Indeed so.", " Bad three is."),
    }
    assert _texts(_pairs("sft-demo", sft=SFT, demonstrations=DEMOS, match=False)) == {
        ("Say it.", " The answer.", " Good one."),
        ("Say it.", " The answer.", " Good two is long."),
        ("And this?", " Indeed so.", " Fine."),
    }
    preferences = [Preference(ASK, "chosen", "rejected"), Preference(OTHER, "up", "down")]
    assert _pairs("preference", preferences=preferences) == [
        Contrast(ASK, "chosen", "rejected"),
        Contrast(OTHER, "up", "down"),
    ]


def test_the_longer_of_a_pair_is_cut():
    long, short = _sample(" One one. Two two. Three."), _sample(" Brief now.")
    assert _pairs("init-sft", sft=[long], init=[short]) == [Contrast(ASK, " One one.", " Brief now.")]
    assert _pairs("init-sft", sft=[short], init=[long]) == [Contrast(ASK, " Brief now.", " One one.")]


def test_no_answer_is_lost_and_lengths_go_together():
    for better_count, worse_count in ((4, 4), (5, 2), (1, 3), (3, 7)):
        good = [_sample(" g" + "g" * (3 * i) + ".", index=i) for i in range(better_count)]
        bad = [_sample(" b" + "b" * (2 * i) + ".", index=i) for i in range(worse_count)]
        pairs = _pairs("init-sft", sft=good[::-1], init=bad, match=False)
        assert len(pairs) == max(better_count, worse_count)
        assert {p.better for p in pairs} == {s.completion for s in good}
        assert {p.worse for p in pairs} == {s.completion for s in bad}
        assert [len(p.better) for p in pairs] == sorted(len(p.better) for p in pairs)
        assert [len(p.worse) for p in pairs] == sorted(len(p.worse) for p in pairs)


def test_pairs_that_teach_nothing_are_left_out():
    sft = [_sample(" Same."), _sample("  ", prompt=OTHER), _sample(" Kept.", prompt=Prompt.of("third", "train"))]
    init = [_sample(" Same."), _sample(" Worse.", prompt=OTHER), _sample(" Worse.", prompt=Prompt.of("third", "train"))]
    assert _texts(_pairs("init-sft", sft=sft, init=init)) == {("third", " Kept.", " Worse.")}
    _, left_out = build_contrasts(*answers_of("init-sft", sft=sft, init=[*init, _sample(" Alone.", prompt=Prompt.of("4th", "train"))]))
    assert left_out == {"one_sided_prompts": 1, "empty_pairs": 1, "equal_pairs": 1}
    with pytest.raises(DataError, match="no prompt has two different") as caught:
        require_pairs(_pairs("init-sft", sft=sft[:2], init=init[:2]))
    assert "sampling.train_generations" in str(caught.value)
    assert _pairs("init-sft", sft=[_sample(" A.")], init=[_sample(" B.", prompt=OTHER)]) == []


def test_threshold_accuracy_by_hand():
    assert threshold_accuracy([1, 1, 1], [1, 1]) == 0.5
    assert threshold_accuracy([2, 3], [0, 1]) == 1.0
    assert threshold_accuracy([0, 1], [2, 3]) == 1.0  # in either direction
    assert threshold_accuracy([1, 2, 3, 4], [1, 2, 3, 9]) == 0.625  # "up to 4": 4/4 against 3/4
    assert threshold_accuracy([True, True, True, False], [False] * 4) == 0.875
    assert threshold_accuracy([1] * 99 + [0], [0]) == pytest.approx(0.995)  # balanced: both sides weigh the same


def _pool(generator, name, finished, sentences):
    samples = []
    for i in range(60):
        prompt = Prompt.of(f"prompt {i}", "train")
        for j in range(4):
            text = "".join(f" {name} {generator.choice(['runs', 'sits', 'eats'])} now." for _ in range(generator.randint(*sentences)))
            samples.append(_sample(text if finished else f"{text} {name} unfin", finished, prompt, j))
    return samples


def test_finished_and_length_separate_the_raw_pools_and_not_the_pairs():
    generator = random.Random(0)
    sft, init = _pool(generator, "cat", True, (1, 3)), _pool(generator, "dog", False, (4, 8))
    raw = raw_controls(*answers_of("init-sft", sft=sft, init=init))
    assert raw == {"finished_accuracy_raw": 1.0, "length_accuracy_raw": 1.0}
    controls = leak_controls(_pairs("init-sft", sft=sft, init=init))
    assert controls["length_accuracy"] < 0.6 and controls["ending_accuracy"] == 0.5
    guard_leak(controls, 0.75, 1000)
    unmatched = leak_controls(_pairs("init-sft", sft=sft, init=init, match=False))
    assert unmatched["length_accuracy"] == 1.0
    with pytest.raises(GuardError, match="length of an answer alone tells better from worse in 100%") as caught:
        guard_leak(unmatched, 0.75, 1000)
    assert "reward.max_leak_accuracy=1" in str(caught.value)
    guard_leak(unmatched, 1.0, 1000)


def test_an_ending_that_leaks_is_an_error():
    """Cut answers without one whole sentence keep their torn end, and that alone tells them."""
    sft, init = [_sample(" so it is.")] * 3, [_sample(" so it i", False)] * 3
    controls = leak_controls(_pairs("init-sft", sft=sft, init=init))
    assert controls["ending_accuracy"] == 1.0
    with pytest.raises(GuardError, match="ending"):
        guard_leak({**controls, "length_accuracy": 0.5}, 0.75, 1000)

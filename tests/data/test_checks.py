"""What validate reports, on rows whose token counts are known by hand."""

import pytest
from tiny import make_tiny_tokenizer

from irlign.data.chat import Format
from irlign.data.checks import apply_overlong, describe, histogram, masked_example, read_notes, render
from irlign.data.demonstrations import DataSettings
from irlign.errors import OverlongError
from irlign.records import Demonstration, Prompt


@pytest.fixture(scope="module")
def form():
    return Format(make_tiny_tokenizer(), "none")


def rows(*pairs: tuple[str, str], split: str = "train") -> list[Demonstration]:
    return [Demonstration(Prompt.of(prompt, split), completion) for prompt, completion in pairs]


# BOS and two words of prompt are 3 tokens; three words, a full stop and EOS are 5
SHORT, LONG = ("the cat", " sat on mat."), ("the cat", " sat on mat. ran home now and sang.")


def test_counts_by_hand(form):
    found = describe({"train": rows(SHORT, LONG), "dev": rows(SHORT, split="dev"), "test": []}, form, max_length=8)
    train = found["splits"]["train"]
    assert train["lengths"] == [8, 14]
    assert train["tokens"] == {"prompt": {"least": 3, "median": 3, "most": 3}, "completion": {"least": 5, "median": 8, "most": 11}}
    assert (train["over_max_length"], train["eos_kept"], train["unknown_tokens"]) == (0.5, 0.5, 0.0)
    assert found["overlap"] == {"train-dev": 1, "train-test": 0, "dev-test": 0}
    assert "test" not in found["splits"]


def test_special_tokens_in_the_text_are_counted():
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None  # whole texts: no special token is a word of its own
    given = rows(("a <s> cat", " sat."), ("a", " sat </s> x"), ("a", " sat.</s>"))
    kept, counts = apply_overlong(Format(tokenizer, "none"), given, DataSettings(), context=9, room=1, name="f.jsonl")
    assert (kept, counts) == (given, {"special_tokens": 2})
    assert read_notes({"f.jsonl": {"rows": 3, **counts}}) == [
        "f.jsonl: 3 rows, 2 with special tokens of the tokenizer in them, read as plain text"
    ]


def test_unknown_tokens_are_a_share_of_all(form):
    found = describe({"train": rows(("the cat", " sat on zeppelin.")), "dev": [], "test": []}, form, max_length=64)
    assert found["splits"]["train"]["unknown_tokens"] == pytest.approx(1 / 8)


def test_an_error_names_the_row_and_what_to_do(form):
    with pytest.raises(OverlongError, match=r"14 tokens, and 8 fit \(1 of 2 rows are\)") as error:
        apply_overlong(form, rows(SHORT, LONG), DataSettings(on_overlong="error"), context=8, room=1, name="f.jsonl")
    assert "f.jsonl" in str(error.value) and "drop or truncate" in str(error.value)


@pytest.mark.parametrize(
    ("how", "kept", "counts"),
    [("drop", [SHORT], {"overlong_dropped": 1}), ("truncate", [SHORT, SHORT], {"overlong_truncated": 1})],
)
def test_dropped_or_cut_after_a_sentence_and_counted(form, how, kept, counts):
    found = apply_overlong(form, rows(SHORT, LONG), DataSettings(on_overlong=how), context=8, room=1, name="f.jsonl")
    assert ([(d.prompt.content, d.completion) for d in found[0]], found[1]) == (kept, counts)


def test_a_prompt_without_room_for_an_answer_is_dropped_and_counted(form):
    crowded = ("the cat and the dog", " sat.")
    found = apply_overlong(form, rows(SHORT, crowded), DataSettings(on_overlong="truncate"), context=9, room=5, name="f")
    assert len(found[0]) == 1 and found[1] == {"prompts_too_long": 1}


def test_the_example_shows_where_the_loss_is(form):
    assert masked_example(form, rows(SHORT)[0]).replace(" ", "") == "<s>thecat[[satonmat.</s>]]"


def test_histogram_counts_every_row():
    lines = histogram([1] * 5 + [10] * 15)
    assert len(lines) == 9
    assert sum(int(line.split()[-1]) for line in lines) == 20
    assert lines[-1].count("#") == 40 and lines[0].count("#") == 13


def test_no_length_stands_in_two_bins():
    lines = histogram(list(range(75, 88)))  # ten bins of 1.2: one begins at 81, where the one before it ends
    ends = [[int(word) for word in line.split()[:3:2]] for line in lines]
    assert [low for low, _ in ends[1:]] == [high + 1 for _, high in ends[:-1]] and (ends[0][0], ends[-1][1]) == (75, 87)
    assert [high - low + 1 for low, high in ends] == [int(line.split()[-1]) for line in lines]


def test_the_text_says_what_was_lost(form):
    found = describe({"train": rows(SHORT), "dev": [], "test": []}, form, max_length=8)
    text = render(found, {"f.jsonl": {"rows": 3, "empty": 1, "overlong_dropped": 1}}, "EXAMPLE")
    assert "f.jsonl: 3 rows, 1 with an empty answer, dropped, 1 too long, dropped" in text
    assert text.endswith("EXAMPLE") and "prompts in two splits: none" in text

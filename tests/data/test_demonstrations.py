"""Rows become demonstrations: every convention, every mistake, the split."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irlign.data.checks import read_notes
from irlign.data.demonstrations import (
    DataSettings,
    check_usable,
    load_demonstrations,
    load_preferences,
    preferences_of,
    split_by_prompt,
)
from irlign.data.hh import is_transcript, turns
from irlign.data.readers import read_rows
from irlign.data.sentences import last_whole_sentence, sentences
from irlign.data.splits import load_splits
from irlign.errors import DataError, GuardError
from irlign.records import Demonstration, Prompt

SETTINGS = DataSettings()
USER, BOT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
MORE = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
HH = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: So."


def _file(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def _pairs(name, settings=SETTINGS, **options):
    return [(d.prompt.content, d.completion) for d in load_demonstrations(name, settings, **options).demonstrations]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_same(tmp_path, suffix):
    rows = [{"prompt": "one, two", "completion": " thr\nee é"}, {"prompt": "p", "completion": "c"}]
    assert _pairs(_file(tmp_path / f"x{suffix}", rows)) == [("one, two", " thr\nee é"), ("p", "c")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, [("p", "c")]),
        ({"prompt": "p", "response": "c"}, [("p", "c")]),
        ({"prompt": [USER], "completion": [BOT]}, [((USER,), "Hello.")]),
        ({"messages": [USER, BOT, *MORE]}, [((USER, BOT, MORE[0]), "So.")]),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}, [((USER,), "Hello.")]),
        ({"instruction": "Do", "input": "this", "output": "c"}, [("Do\n\nthis", "c")]),
        ({"instruction": "Do", "input": "", "output": "c"}, [("Do", "c")]),
        ({"prompt": "Human: Hi?\n\nAssistant:", "chosen": "Hello.", "rejected": "No."}, [((USER,), "Hello.")]),
        ({"chosen": HH, "rejected": HH}, [((USER, BOT, MORE[0]), "So.")]),
    ],
)
def test_every_convention(tmp_path, row, expected):
    assert _pairs(_file(tmp_path / "x.jsonl", [row])) == expected


def test_loss_on_all_makes_each_answer_a_demonstration(tmp_path):
    name = _file(tmp_path / "x.jsonl", [{"messages": [USER, BOT, *MORE]}])
    assert _pairs(name, DataSettings(loss_on="all")) == [((USER,), "Hello."), ((USER, BOT, MORE[0]), "So.")]


def test_columns_of_your_own(tmp_path):
    name = _file(tmp_path / "x.jsonl", [{"question": "q", "reply": "r", "prompt": "not this"}])
    assert _pairs(name, DataSettings(prompt_column="question", completion_column="reply")) == [("q", "r")]


def test_what_is_left_out_is_counted(tmp_path):
    rows = [
        {"prompt": "a", "completion": "x"},
        {"prompt": "a", "completion": "x"},
        {"prompt": "b", "completion": " "},
        {"prompt": "a", "completion": "y"},
    ]
    name = _file(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x.jsonl:3: the answer is empty"):
        load_demonstrations(name, SETTINGS)
    loaded = load_demonstrations(name, DataSettings(on_empty="drop"))
    assert [d.completion for d in loaded.demonstrations] == ["x", "y"]
    assert loaded.notes == {"rows": 4, "answers": {"completion": 3}, "empty": 1, "duplicates": 1}
    assert len(load_demonstrations(name, DataSettings(max_rows=1)).demonstrations) == 1
    assert _pairs(name, answers=False)[-2:] == [("b", " "), ("a", "y")]


def test_turns_after_the_last_answer_are_counted(tmp_path):
    rows = [{"messages": [USER, BOT, MORE[0]]}, {"messages": [USER, BOT, *MORE]}, {"chosen": HH + "\n\nHuman: Oh.", "rejected": HH}]
    loaded = load_demonstrations(_file(tmp_path / "x.jsonl", rows), SETTINGS)
    assert loaded.notes["turns_after_answer"] == 2
    assert "2 turns after a last answer, dropped" in read_notes({"x": loaded.notes})[0]


def test_messages_in_a_table_may_be_json(tmp_path):
    (tmp_path / "x.csv").write_text("messages\n" + '"' + json.dumps([USER, BOT]).replace('"', '""') + '"\n')
    assert _pairs(str(tmp_path / "x.csv")) == [((USER,), "Hello.")]
    (tmp_path / "x.csv").write_text('messages\n"[not json"\n')
    with pytest.raises(DataError, match=r"x\.csv:2, messages: is neither a list of messages nor JSON of one"):
        _pairs(str(tmp_path / "x.csv"))


def test_repeated_conversations_are_told_apart_by_content(tmp_path):
    rows = [{"messages": [USER, BOT]}, {"messages": [USER, BOT]}, {"messages": [USER, {**BOT, "content": "Hey."}]}]
    assert _pairs(_file(tmp_path / "x.jsonl", rows)) == [((USER,), "Hello."), ((USER,), "Hey.")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl:2: is not JSON"),
        ("x.jsonl", b'{"prompt": "\xff"}\n', "x.jsonl:1: is not UTF-8"),
        ("x.jsonl", b"[1]\n", "x.jsonl:1: is a list, not an object"),
        ("x.json", b'[{"a": 1},\n oops]', "x.json:2: is not JSON"),
        ("x.json", b'{"a": 1}\n{"a": 2}\n', "it looks like JSON Lines"),
        ("x.json", b"3", "is no list of objects"),
        ("x.csv", b"prompt,completion\na,b\nc\n", "x.csv:3: has fewer fields"),
        ("x.csv", b"prompt,completion\na,b,c\n", "x.csv:2: has more fields"),
        ("x.parquet", b"not parquet", "is not Parquet"),
        ("x.txt", b"hello", "cannot read .txt"),
        ("x.jsonl", b"\n\n", "holds no rows"),
        ("x.jsonl", b'{"a": 1}\n{"a": [{"b": "x \\ud83d"}]}\n', "x.jsonl:2: holds half of a surrogate pair (like \\ud83d alone)"),
        ("x.json", b'[{"a": "\\udc00"}]', "x.json, item 1: holds half of a surrogate pair"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert message in str(caught.value)


def test_preferences(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"chosen": HH, "rejected": HH.replace("So.", "No.")},
        {"chosen": [USER, BOT], "rejected": [USER, MORE[1]]},
    ]
    found, notes = load_preferences(_file(tmp_path / "x.jsonl", rows), SETTINGS)
    assert [(p.chosen, p.rejected) for p in found] == [("c", "r"), ("So.", "No."), ("Hello.", "So.")] and notes == {"rows": 3, "empty": 0}
    for row, message in (
        ({"prompt": "p", "chosen": "c"}, "has no chosen and rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": " "}, "an answer is empty"),
        ({"chosen": HH, "rejected": HH.replace("Hi?", "Other?")}, "answer different prompts"),
    ):
        with pytest.raises(DataError, match=message):
            load_preferences(_file(tmp_path / "bad.jsonl", [row]), SETTINGS)


def test_preferences_keep_to_the_splits_of_the_run(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(200)]
    pairs, _ = load_preferences(_file(tmp_path / "x.jsonl", rows), SETTINGS)
    held = {"train": set(), "dev": {pairs[0].prompt.prompt_id}, "test": {p.prompt.prompt_id for p in pairs[1:50]}}
    train, dev, test = (preferences_of(pairs, split, held, 0) for split in ("train", "dev", "test"))
    assert len(train) + len(dev) + len(test) == 200 and test == pairs[1:50] and pairs[0] in dev and 5 <= len(dev) <= 30


def test_transcripts():
    assert is_transcript(HH) and not is_transcript("Human being") and not is_transcript("Say Human: x\n\nAssistant:")
    assert turns(HH) == [USER, BOT, *MORE]
    assert turns("Human: Hi?\n\nAssistant:")[-1] == {"role": "assistant", "content": ""}


@given(st.text(alphabet="aB .!?\n\"'", max_size=60))
def test_sentences_join_to_the_text(text):
    pieces = sentences(text)
    assert "".join(pieces) == text
    assert all(piece.strip() for piece in pieces) or not text.strip()
    assert text.startswith(last_whole_sentence(text)) and last_whole_sentence(text) == last_whole_sentence(text).rstrip()


def test_sentences_by_hand():
    assert sentences(' One. "Two!" Three') == [" One.", ' "Two!"', " Three"]
    assert sentences("3.5 is one") == ["3.5 is one"]
    assert last_whole_sentence(" One. Two thr") == " One." and last_whole_sentence("none") == "" and last_whole_sentence("a\nb") == "a"


def _demonstrations(count, answers=2):
    return [Demonstration(Prompt.of(f"p{i}", "train"), f"a{j}") for i in range(count) for j in range(answers)]


def test_the_split_is_by_prompt_and_knows_no_order():
    rows = _demonstrations(50)
    splits, again = split_by_prompt(rows, SETTINGS, 0), split_by_prompt(rows[::-1], SETTINGS, 0)
    ids = {split: {d.prompt.prompt_id for d in of} for split, of in splits.items()}
    assert [len(ids[split]) for split in ("train", "dev", "test")] == [35, 5, 10] and len(set.union(*ids.values())) == 50
    assert {split: {(d.prompt.prompt_id, d.completion) for d in of} for split, of in splits.items()} == {
        split: {(d.prompt.prompt_id, d.completion) for d in of} for split, of in again.items()
    }
    assert all(d.prompt.split == split for split, of in splits.items() for d in of)
    assert ids != {split: {d.prompt.prompt_id for d in of} for split, of in split_by_prompt(rows, SETTINGS, 1).items()}
    with pytest.raises(DataError, match="leave none of 50 to train on"):
        split_by_prompt(rows, DataSettings(dev_prompts=20, test_prompts=30), 0)


def test_what_cannot_be_learned_from_is_an_error():
    with pytest.raises(DataError, match="one prompt only"):
        check_usable(_demonstrations(1), "x")
    with pytest.raises(DataError, match="identical"):
        check_usable(_demonstrations(5, 1), "x")


@pytest.fixture
def form():
    from tiny import make_tiny_tokenizer

    from irlign.data.chat import Format

    return Format(make_tiny_tokenizer(), "none")


def _rows(words, answer=" the cat sat on the mat."):
    return [{"prompt": f"the {w}", "completion": answer + " now" * i} for i, w in enumerate(words)]


WORDS = ["cat", "dog", "bird", "red", "blue", "home", "mat", "sat", "ran", "sang"]


def test_an_evaluation_file_becomes_the_test_split(tmp_path, form):
    own = _file(tmp_path / "own.jsonl", _rows(WORDS[:6]))
    held = _file(tmp_path / "held.jsonl", [*_rows(WORDS[6:8]), {"prompt": "a cat"}])
    splits, notes = load_splits(own, SETTINGS, form, context=64, room=8, seed=0, eval_dataset=held)
    assert [d.prompt.content for d in splits["test"]] == ["the mat", "the sat", "a cat"] and splits["test"][-1].completion == ""
    assert len(splits["train"]) + len(splits["dev"]) == 6 and notes[held]["test_prompts"] == 3
    with pytest.raises(GuardError, match="1 of 1 test prompts stand in the training data too"):
        load_splits(own, SETTINGS, form, context=64, room=8, seed=0, eval_dataset=_file(tmp_path / "same.jsonl", _rows(WORDS[:1])))
    allowed = DataSettings(allow_overlap=True)
    assert load_splits(own, allowed, form, context=64, room=8, seed=0, eval_dataset=str(tmp_path / "same.jsonl"))[1]["overlap"] == {
        "rows": 1
    }


def test_prompts_without_answers_join_train(tmp_path, form):
    own = _file(tmp_path / "own.jsonl", _rows(WORDS[:6]))
    more = _file(tmp_path / "more.jsonl", [{"prompt": "the sang"}, {"prompt": "the sang"}])
    splits, notes = load_splits(own, SETTINGS, form, context=64, room=8, seed=0, prompt_dataset=more)
    assert [(d.prompt.content, d.completion) for d in splits["train"] if not d.completion] == [("the sang", "")]
    assert notes[more]["added_prompts"] == 1


def test_overlong_rows(tmp_path, form):
    long = {"prompt": "the cat", "completion": " The dog ran. The bird sang. And a red bird sat on the mat."}
    name = _file(tmp_path / "own.jsonl", [*_rows(WORDS[1:5]), long, {"prompt": "the " * 30, "completion": " sat."}])
    options = {"context": 64, "room": 4, "seed": 0}

    def rows(settings):
        splits, notes = load_splits(name, settings, form, **options)
        return {d.prompt.content: d.completion for of in splits.values() for d in of}, notes[name]

    with pytest.raises(DataError, match=r"2 of 6 rows are"):
        rows(DataSettings(max_length=16))
    kept, notes = rows(DataSettings(max_length=16, on_overlong="drop"))
    assert (len(kept), notes["overlong_dropped"], notes["prompts_too_long"]) == (4, 1, 1)
    kept, notes = rows(DataSettings(max_length=16, on_overlong="truncate"))
    assert kept["the cat"] == " The dog ran. The bird sang." and (notes["overlong_truncated"], notes["prompts_too_long"]) == (1, 1)
    encoded = form.encode(["the cat"], [kept["the cat"]])[0]
    assert len(encoded) <= 16 and encoded.completion_ids[-1] == form.tokenizer.eos_token_id

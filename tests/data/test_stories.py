"""Raw stories become demonstrations, and their sentiment is a mean over sentences."""

import json

import pytest

from irlign.data.stories import main, make_demonstrations, openings
from irlign.errors import DataError

pytest.importorskip("vaderSentiment")
STORY = "There was a cat. It was happy. It sang. " + "x" * 200 + "."


def test_openings_by_hand():
    text = f"{STORY}\n\nShort one.\n<|endoftext|>\n{'w' * 90}. Too. Long.\n\n{STORY}"
    assert openings(text) == [("There was a cat.", " It was happy. It sang.")]


def test_sentiment_is_a_mean_over_sentences():
    from irlign.data.sentiment import vader_sentiment

    good, twice, bad, mixed = vader_sentiment([""] * 4, [" I love it.", " I love it. I love it.", " I hate it.", " I love it. I hate it."])
    assert good == pytest.approx(twice) and good > 0 > bad and mixed == pytest.approx((good + bad) / 2)
    assert vader_sentiment(["", ""], ["", "The table."]) == [0.0, 0.0]


def test_demonstrations_are_the_happiest_of_both_parts_and_evaluation_is_held_out():
    words = [("love", "happy"), ("hate", "sad")]
    text = "\n\n".join(
        f"Story {i} began. We {w[i % 2]} it. All was {v[i % 2]}." for i in range(90) for w, v in [list(zip(*words, strict=True))]
    )
    train, held = make_demonstrations(text, 15, 6)
    assert len(train) == 15 and len(held) == 6
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert all("love" in row["completion"] for row in train + held)
    with pytest.raises(DataError, match="too few"):
        make_demonstrations(text, 40, 10)
    with pytest.raises(DataError, match="too few"):
        make_demonstrations(text, 15, 9)


def test_the_command_on_real_stories(shared, tmp_path, capsys):
    main(f"{shared}/data/tinystories/tinystories_2MiB.txt", f"{tmp_path}/out/stories.jsonl")
    train, held = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("stories.jsonl", "stories_eval.jsonl")
    )
    assert (len(train), len(held)) == (300, 120) and "300 rows" in capsys.readouterr().out
    assert all(len(row["prompt"]) <= 80 and len(row["completion"]) <= 150 and row["completion"].startswith(" ") for row in train + held)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    with pytest.raises(DataError, match="no such file"):
        main("nowhere.txt", f"{tmp_path}/x.jsonl")

"""What an unfinished answer may already show, and how a choice of tokens is written."""

import pytest

from irlign.serving.protocol import Chat, Refused, read, settled, token_logprobs

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("the cat", [], "the cat"),
        ("the cat\n", ["\n\nHuman"], "the cat"),
        ("the cat\n\nHum", ["\n\nHuman", "x"], "the cat"),
        ("the cat\n\nHumbug", ["\n\nHuman"], "the cat\n\nHumbug"),
        ("aaa", ["aab"], "a"),
        (f"caf{REPLACEMENT}{REPLACEMENT}", [], "caf"),
        ("", ["x"], ""),
    ],
)
def test_what_cannot_be_taken_back(text, stops, shown):
    assert settled(text, stops) == shown


def test_tokens_as_both_endpoints_write_them():
    chat = token_logprobs(["a", "é", ""], [-1.0, -0.5, -2.0], True)["content"]
    assert [(t["token"], t["logprob"], t["bytes"]) for t in chat] == [("a", -1.0, [97]), ("é", -0.5, [195, 169]), ("", -2.0, [])]
    assert token_logprobs(["ab", "c"], [-1.0, -0.5], False)["text_offset"] == [0, 2]


def test_null_is_what_was_not_said_and_a_field_must_be_there():
    asked = b'{"model": "m", "messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "x"}], "stop": null, "n": null}'
    body = read(Chat, asked)
    assert body.n == 1 and body.prompts() == [({"role": "system", "content": "be kind"}, {"role": "user", "content": "x"})]
    for raw, words in (
        (b'{"model": null, "messages": []}', "model: input should be a valid string"),
        (b'{"model": "m"}', "messages: field required"),
        (b'{"model": "m", "messages": []}', "messages: list should have at least 1 item"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": [""]}',
            "stop.0: string should have at least 1 character",
        ),
    ):
        with pytest.raises(Refused, match=words):
            read(Chat, raw)

"""Where a sentence ends: the one rule that endings, lengths and sentiment share."""

import re

_END = re.compile(r"[.!?…]+[\"'”’)\]}]*(?=\s|$)|\n+")


def sentences(text: str) -> list[str]:
    """The text in pieces that end where a sentence or a line ends, each with the space before it; they join to the text."""
    pieces, start = [], 0
    for match in _END.finditer(text):
        if text[start : match.end()].strip():
            pieces.append(text[start : match.end()])
            start = match.end()
    if text[start:].strip() or not pieces:
        return [*pieces, text[start:]] if text[start:] else pieces
    return [*pieces[:-1], pieces[-1] + text[start:]]


def last_whole_sentence(text: str, within: int | None = None) -> str:
    """The text up to the end of its last whole sentence; empty where it holds none. An end of line ends a sentence too.
    `within`: the last one that ends in so many characters, seen in the whole text ("3." of "3.5" ends nothing).
    """
    most = len(text) if within is None else within
    ends = [match.end() for match in _END.finditer(text) if match.end() <= most and text[: match.end()].strip()]
    return text[: ends[-1]].rstrip() if ends else ""

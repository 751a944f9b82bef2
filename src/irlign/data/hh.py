"""Anthropic HH transcripts ("Human: ... Assistant: ...") as turns."""

import re

from irlign.records import Message

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    """Whether a text is a dialogue of this form: it begins with a human turn and has an assistant's."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None and re.search(r"\n\nAssistant:", text) is not None


def turns(text: str) -> list[Message]:
    """The turns of a transcript, in order, without the spaces around them; a last, open `Assistant:` is an empty turn."""
    parts = _TURN.split("\n\n" + text.strip())
    return [Message(role=_ROLES[role], content=content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]

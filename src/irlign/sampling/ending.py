"""Where a drawn answer ends: at its EOS, at a stop string, or at the limit. One rule for every engine that draws token ids."""

from collections.abc import Collection, Sequence

from irlign.data.chat import Format
from irlign.records import FinishReason


def ending(
    form: Format, prompt: Sequence[int], ids: Sequence[int], *, eos_ids: Collection[int], stop: Sequence[str]
) -> tuple[str, FinishReason, int]:
    """The text, why it ended, and how many of the drawn tokens it took (its EOS or stop string included)."""
    ended = bool(ids) and ids[-1] in eos_ids
    body = ids[:-1] if ended else ids
    text = form.decode_completion(prompt, body)
    cuts = [text.index(s) for s in stop if s in text]
    if not cuts:
        return text, ("eos" if ended else "length"), len(ids)
    low, high = 1, len(body)  # the fewest tokens whose text already holds a stop string
    while low < high:
        middle = (low + high) // 2
        shorter = form.decode_completion(prompt, body[:middle])
        low, high = (low, middle) if any(s in shorter for s in stop) else (middle + 1, high)
    return text[: min(cuts)], "stop", low

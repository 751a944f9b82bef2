"""Rows in batches of similar length, and smaller ones where memory runs out."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from irlign.errors import ModelError, out_of_memory

BLOCK = 4096  # answers that are tokenized, sorted by length and scored together


def blocks(count: int) -> Iterator[slice]:
    """So many answers as ranges of at most BLOCK: each is tokenized and sorted by length alone, so that memory does not grow with their
    number, and a block scored elsewhere gives the same numbers."""
    for first in range(0, count, BLOCK):
        yield slice(first, min(first + BLOCK, count))


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most `token_budget` padded tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def in_batches(
    lengths: Sequence[int], token_budget: int, work: Callable[[list[int]], None], *, where: str, texts: Sequence[int] | None = None
) -> None:
    """`work(indices)` on all of `length_sorted_batches`. Where memory runs out in one, it and the rest go on with half the tokens at once.

    `texts` are the tokens of each text, where `lengths` are not. Raises ModelError where memory does not hold one row.
    """
    todo = deque(length_sorted_batches(lengths, token_budget))
    while todo:
        batch = todo.popleft()
        try:
            work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            longest = lengths[batch[0]]
            if len(batch) == 1:
                size = texts[batch[0]] if texts else longest
                what, do = f"out of memory with one text of {size} tokens", "lower data.max_length, or free memory"
                raise ModelError(what, where=where, do=do) from error
            token_budget = len(batch) * longest // 2
            left = [i for again in (batch, *todo) for i in again]
            todo = deque([left[i] for i in smaller] for smaller in length_sorted_batches([lengths[i] for i in left], token_budget))

"""Batches by hand, and that memory that runs out costs time only."""

import pytest

from irlign.data.batches import in_batches, length_sorted_batches
from irlign.errors import ModelError


def test_batches_cover_every_row_once_within_the_budget():
    lengths = [3, 9, 1, 4, 9, 30, 2, 7]
    batches = length_sorted_batches(lengths, 20)
    assert batches == [[5], [1, 4], [7, 3], [0, 6, 2]]  # 30 alone; 2 x 9; 2 x 7; 3 x 3
    assert length_sorted_batches([], 20) == []


def test_memory_that_runs_out_halves_what_follows_too():
    """It holds 6 tokens: two texts of 3, and none of 9."""
    seen, tried = [], []

    def work(batch):
        tried.append(batch)
        if len(batch) * max(lengths[i] for i in batch) > 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        seen.extend(batch)

    lengths = [3, 1, 3, 3, 2, 2, 1]
    in_batches(lengths, 12, work, where="score x")
    assert tried[:3] == [[0, 2, 3, 4], [0, 2], [3, 4]] and sorted(seen) == list(range(7))
    lengths = [9, 3, 9]
    with pytest.raises(ModelError, match="out of memory with one text of 9 tokens") as caught:
        in_batches(lengths, 18, work, where="score x")
    assert caught.value.where == "score x" and tried[-2:] == [[0, 2], [0]]


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        in_batches([1, 1], 8, lambda batch: (_ for _ in ()).throw(RuntimeError("a shape is wrong")), where="x")

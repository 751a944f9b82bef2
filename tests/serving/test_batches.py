"""Requests that wait go together: what a batch holds, that none fails for another, that a full queue refuses and a closed one finishes."""

import threading

import pytest

from irlign.serving.batches import Batches, Closed, Full


class Slow:
    """Work that waits to be told to go on, and remembers its batches."""

    def __init__(self):
        self.batches, self.begun, self.go_on = [], threading.Event(), threading.Event()

    def __call__(self, items):
        self.begun.set()
        assert self.go_on.wait(10)
        self.batches.append(list(items))
        if "bad" in items:
            raise ValueError("bad")
        return [TypeError(item) if item == "worse" else item.upper() for item in items]


def _batches(work, **options):
    return Batches(work, **{"together": len, "size": lambda item: 1, "most": 3, "waiting": 6, **options})


def test_the_first_takes_those_that_go_with_it():
    """Of one length, in order, at most three; others keep their place."""
    work, sizes = Slow(), []
    batches = _batches(work, done=lambda size, seconds: sizes.append(size))
    first = batches.submit(["a"])
    assert work.begun.wait(10)
    rest = [batches.submit([item])[0] for item in ("b", "xx", "c", "d", "e", "yy")]
    work.go_on.set()
    assert [f.result(10) for f in (*first, *rest)] == ["A", "B", "XX", "C", "D", "E", "YY"]
    batches.close()
    assert work.batches == [["a"], ["b", "c", "d"], ["xx", "yy"], ["e"]] and sizes == [1, 3, 2, 1]


def test_none_fails_for_another():
    work = Slow()
    batches = _batches(work)
    work.go_on.set()
    good, bad, also, worse = batches.submit(["one", "bad", "two"]) + batches.submit(["worse"])
    assert (good.result(10), also.result(10)) == ("ONE", "TWO")
    with pytest.raises(ValueError):
        bad.result(10)
    with pytest.raises(TypeError):
        worse.result(10)
    batches.close()


def test_a_full_queue_takes_all_or_nothing_and_a_closed_one_finishes():
    work = Slow()
    batches = _batches(work, size=lambda item: 2, most=4)
    futures = batches.submit(["a"])
    assert work.begun.wait(10)
    futures += batches.submit(["b", "c", "d", "e", "f"])
    with pytest.raises(Full) as full:
        batches.submit(["g", "h"])
    assert full.value.retry_after == 3 and batches.waiting == 5  # ten answers, four at a time, a second each until one was measured
    assert futures[3].cancel()
    closing = threading.Thread(target=batches.close)
    closing.start()
    while not batches._closed:
        pass
    with pytest.raises(Closed):
        batches.submit(["i"])
    work.go_on.set()
    closing.join(10)
    assert [f.result() for f in futures if not f.cancelled()] == ["A", "B", "C", "E", "F"]
    assert [item for batch in work.batches for item in batch] == ["a", "b", "c", "e", "f"]

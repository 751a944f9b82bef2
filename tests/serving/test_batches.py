"""Requests that wait go together: what runs and what joins it, that none fails for another, that a full queue refuses and a closed one finishes."""

import itertools
import threading

import pytest

from irlign.serving.batches import Batches, Closed, Full


class Slow:
    """Work that waits to be told to go on, once or for every turn; `long` items take three turns, and are at last in capitals. `turns`: what
    was worked on in each, `begun`: how often work began."""

    def __init__(self):
        self.turns, self.begun, self.at_work, self.go_on, self.dropped = [], 0, threading.Event(), threading.Semaphore(0), []
        self.items = {}

    def begin(self):
        self.begun += 1
        self.items = {}
        return self

    def add(self, number, item):
        self.items[number] = (item, 3 if item.startswith("long") else 1)

    def drop(self, number):
        self.dropped.append(self.items.pop(number)[0])

    def turn(self):
        self.at_work.set()
        assert self.go_on.acquire(timeout=30)
        self.turns.append([item for item, _ in self.items.values()])
        if any(item == "bad" for item, _ in self.items.values()):
            raise ValueError("bad")
        self.items = {number: (item, left - 1) for number, (item, left) in self.items.items()}
        done = {number: item for number, (item, left) in self.items.items() if not left}
        for number in done:
            del self.items[number]
        return [(number, TypeError(item) if item == "worse" else item.upper()) for number, item in done.items()]

    def free(self):
        """From now on it does not wait."""
        self.go_on.release(1000)


def _batches(work, **options):
    return Batches(work.begin, **{"together": len, "size": lambda item: 1, "most": 3, "waiting": 6, **options})


def test_the_first_takes_those_that_go_with_it():
    """Of one length, in order, at most three; others keep their place."""
    work, sizes = Slow(), []
    batches = _batches(work, done=lambda size, seconds: sizes.append(size))
    first = batches.submit(["a"])
    assert work.at_work.wait(10)
    rest = [batches.submit([item])[0] for item in ("b", "xx", "c", "d", "e", "yy")]
    work.free()
    assert [f.result(10) for f in (*first, *rest)] == ["A", "B", "XX", "C", "D", "E", "YY"]
    batches.close()
    assert work.turns == [["a"], ["b", "c", "d"], ["xx", "yy"], ["e"]] and sizes == [1, 3, 2, 1] and work.begun == 4


def _kind(item):
    """By the last letter; a dot goes with anything."""
    return None if item[-1] == "." else item[-1]


def test_what_waits_joins_what_runs_and_is_answered_first():
    work = Slow()
    batches = _batches(work, together=_kind)
    (early,) = batches.submit(["long a"])
    assert work.at_work.wait(10)
    late = batches.submit(["1a", "2a", "3a"])
    work.go_on.release()  # the turn of the early one
    work.go_on.release()
    assert [f.result(10) for f in late[:2]] == ["1A", "2A"] and not early.done()
    work.free()
    assert early.result(10) == "LONG A" and late[2].result(10) == "3A"
    batches.close()
    assert work.turns == [["long a"], ["long a", "1a", "2a"], ["long a", "3a"]] and work.begun == 1


def test_nothing_joins_past_a_request_that_waits():
    """What is of another kind begins when those that run have ended; what goes with anything joins all, and makes no kind."""
    work = Slow()
    batches = _batches(work, together=_kind, most=9, waiting=9)
    futures = batches.submit(["long."])
    assert work.at_work.wait(10)
    futures += batches.submit(["long a", "1.", "1b", "2a", "2."])
    work.free()
    assert [f.result(10) for f in futures] == ["LONG.", "LONG A", "1.", "1B", "2A", "2."]
    batches.close()
    assert work.turns == [["long."], ["long.", "long a", "1."], ["long.", "long a"], ["long a"], ["1b", "2."], ["2a"]] and work.begun == 3


def test_one_at_a_time():
    """With `most` of 1 nothing is ever beside anything, however large the items: what `--max-batch 1` promises."""
    work = Slow()
    batches = _batches(work, together=lambda item: None, size=len, most=1)
    futures = batches.submit(["long a", "b", "c"])
    work.free()
    assert [f.result(10) for f in futures] == ["LONG A", "B", "C"]
    batches.close()
    assert work.turns == [["long a"]] * 3 + [["b"], ["c"]]


def test_what_nobody_waits_for_is_dropped():
    work = Slow()
    batches = _batches(work, together=_kind)
    gone, kept = batches.submit(["long a", "long ba"])
    assert work.at_work.wait(10) and gone.cancel()
    work.free()
    assert kept.result(10) == "LONG BA"
    batches.close()
    assert work.dropped == ["long a"] and work.turns == [["long a", "long ba"], ["long ba"], ["long ba"]] and batches.running == 0


def test_none_fails_for_another():
    """Those that are left when the work fails are tried alone, and nothing joins them then."""
    work = Slow()
    batches = _batches(work, together=lambda item: None, most=9)
    (first,) = batches.submit(["long one"])
    assert work.at_work.wait(10)
    bad, also, gone, worse = batches.submit(["bad", "long two", "gone", "worse"])
    assert gone.cancel()
    work.free()
    assert (first.result(10), also.result(10)) == ("LONG ONE", "LONG TWO")
    with pytest.raises(ValueError):
        bad.result(10)
    with pytest.raises(TypeError):
        worse.result(10)
    batches.close()
    alone = [["long one"]] * 3, [["bad"]], [["long two"]] * 3, [["worse"]]
    assert work.turns == [["long one"], ["long one", "bad", "long two", "worse"], *itertools.chain(*alone)]


def test_a_full_queue_takes_all_or_nothing_and_a_closed_one_finishes():
    """What runs and what waits when it is closed is finished."""
    work = Slow()
    batches = _batches(work, size=lambda item: 2, most=4)
    futures = batches.submit(["a"])
    assert work.at_work.wait(10)
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
    work.free()
    closing.join(10)
    assert [f.result() for f in futures if not f.cancelled()] == ["A", "B", "C", "E", "F"]
    assert [item for turn in work.turns for item in turn] == ["a", "b", "c", "e", "f"]

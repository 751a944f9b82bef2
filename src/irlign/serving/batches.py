"""Requests that wait are worked on together: a bounded queue and the one thread that owns the model. It knows nothing of what is asked.

Work goes in turns. What waits may join between two turns, what is finished is answered at once, and what nobody waits for any more
is dropped. To be fair, nothing joins past a request that has to wait: what runs ends then, and that request begins.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Asked = TypeVar("Asked", contravariant=True)
Given = TypeVar("Given", covariant=True)


class Full(Exception):
    """As many requests wait as may; `retry_after` is in whole seconds."""

    def __init__(self, waiting: int, retry_after: int):
        self.retry_after = retry_after
        super().__init__(f"{waiting} requests are waiting, and no more may")


class Closed(Exception):
    """Nothing is accepted any more."""


class Work(Protocol[Asked, Given]):
    """Items that are worked on together, each under a number of its own; what any of its methods raises ends all of it."""

    def add(self, number: int, item: Asked) -> None:
        """One more."""
        ...

    def drop(self, number: int) -> None:
        """Nobody waits for this one any more."""
        ...

    def turn(self) -> Iterable[tuple[int, Given | Exception]]:
        """Go on for a little while; the results, or exceptions as results, of those that are finished."""
        ...


@dataclass(frozen=True)
class _Asked(Generic[Item, Result]):
    item: Item
    future: "Future[Result]" = field(default_factory=Future)


class Batches(Generic[Item, Result]):
    """`submit(items)` gives futures; one thread works on the first that waits with all others that may go `together`, up to `most` in
    `size`, in a `begin()`, and on those that join them. What is together with anything is together with None.

    Where the work raises, each item that is not finished is tried alone, so that none fails for another's sake. At most `waiting` wait.
    `done(size, seconds)` hears of each turn.
    """

    def __init__(
        self,
        begin: Callable[[], Work[Item, Result]],
        *,
        together: Callable[[Item], Hashable | None],
        size: Callable[[Item], int],
        most: int,
        waiting: int,
        done: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.begin, self.together, self.size, self.most, self.room, self.done = begin, together, size, most, waiting, done
        self._queue: deque[_Asked[Item, Result]] = deque()
        self._open: dict[int, tuple[_Asked[Item, Result], float]] = {}  # what is worked on by its number, and since when
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._closed, self._seconds = False, 1.0
        self._thread = threading.Thread(target=self._run, name="irlign-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many are worked on now."""
        return len(self._open)

    def submit(self, items: Sequence[Item]) -> "list[Future[Result]]":
        """All of them or none. A future that is cancelled is not worked on, or no longer from the next turn on. Raises Full and Closed."""
        with self._change:
            if self._closed:
                raise Closed
            if len(self._queue) + len(items) > self.room:
                raise Full(len(self._queue), self._patience())
            added: list[_Asked[Item, Result]] = [_Asked(item) for item in items]
            self._queue += added
            self._change.notify()
        return [one.future for one in added]

    def close(self) -> None:
        """Accept nothing more, finish what was accepted, and return then."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _patience(self) -> int:
        """Seconds in which the queue may have been worked through, at the speed of late."""
        return max(1, math.ceil(self._seconds * math.ceil(sum(self.size(one.item) for one in self._queue) / self.most)))

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
            self._work(self._take())

    def _take(self) -> list[int]:
        """The numbers of those that begin now, in order: beside those that run, up to the first that may not."""
        with self._change:
            first, rest = len(self._open) == 0, deque[_Asked[Item, Result]]()
            inside = [one.item for one, _ in self._open.values()]
            size, kind = sum(map(self.size, inside)), next((kind for kind in map(self.together, inside) if kind is not None), None)
            taken = list[int]()
            for one in (one for one in self._queue if not one.future.cancelled()):
                own, more = self.together(one.item), self.size(one.item)
                fits = not size or (size + more <= self.most and (None in (own, kind) or own == kind))
                if fits and (first or not rest):
                    taken.append(next(self._numbers))
                    self._open[taken[-1]] = one, time.monotonic()
                    kind, size = own if kind is None else kind, size + more
                else:
                    rest.append(one)
            self._queue = rest
            return taken

    def _work(self, new: Sequence[int], alone: bool = False) -> None:
        """Work on these and, unless they are to be `alone`, on those that join them, until each has its result or its exception."""
        error = self._try(new, alone)
        left, self._open = self._open, {}
        if error and len(left) == 1:
            for one, _ in left.values():
                _answer(one, error)
            return
        del error  # it holds what the failed work held
        for number in left:
            self._open = {number: left[number]}
            self._work([number], alone=True)

    def _try(self, new: Sequence[int], alone: bool) -> Exception | None:
        """The same until none is left, or until it raises; what it raised."""
        try:
            work = self.begin()
            while self._open:
                for number in new:
                    work.add(number, self._open[number][0].item)
                for number in [number for number, (one, _) in self._open.items() if one.future.cancelled()]:
                    del self._open[number]
                    work.drop(number)
                if self._open:
                    self._turn(work)
                new = self._take() if self._open and not alone else []
        except Exception as error:
            return error
        return None

    def _turn(self, work: Work[Item, Result]) -> None:
        """What is finished in this turn is answered."""
        started, size = time.monotonic(), sum(self.size(one.item) for one, _ in self._open.values())
        for number, result in work.turn():
            one, since = self._open.pop(number)
            self._seconds = (self._seconds + time.monotonic() - since) / 2
            _answer(one, result)
        self.done(size, time.monotonic() - started)


def _answer(one: _Asked[Item, Result], result: Result | Exception) -> None:
    """Nothing, where nobody waits for it any more."""
    if not one.future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        one.future.set_exception(result)
    else:
        one.future.set_result(result)

"""Requests that wait are worked on together: a bounded queue and the one thread that owns the model. It knows nothing of what is asked."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Full(Exception):
    """As many requests wait as may; `retry_after` is in whole seconds."""

    def __init__(self, waiting: int, retry_after: int):
        self.retry_after = retry_after
        super().__init__(f"{waiting} requests are waiting, and no more may")


class Closed(Exception):
    """Nothing is accepted any more."""


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: "Future[Result]"


class Batches(Generic[Item, Result]):
    """`submit(items)` gives futures; one thread takes the first that waits with all others that may go `together`, up to `most` in `size`.

    `work(items)` gives a result, or an exception as a result, for each. Where it raises for several, each is tried alone, so that none
    fails for another's sake. At most `waiting` wait. `done(size, seconds)` hears of each batch.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        together: Callable[[Item], Hashable],
        size: Callable[[Item], int],
        most: int,
        waiting: int,
        done: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.work, self.together, self.size, self.most, self.room, self.done = work, together, size, most, waiting, done
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._change = threading.Condition()
        self._closed, self._seconds = False, 1.0
        self._thread = threading.Thread(target=self._run, name="irlign-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._queue)

    def submit(self, items: Sequence[Item]) -> "list[Future[Result]]":
        """All of them or none. A future that is cancelled before its turn is not worked on. Raises Full and Closed."""
        with self._change:
            if self._closed:
                raise Closed
            if len(self._queue) + len(items) > self.room:
                raise Full(len(self._queue), self._patience())
            added: list[_Waiting[Item, Result]] = [_Waiting(item, Future()) for item in items]
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

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch; empty at the end of all."""
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closed)
            batch: list[_Waiting[Item, Result]] = []
            rest: deque[_Waiting[Item, Result]] = deque()
            size = 0
            for one in self._queue:
                fits = not batch or (size + self.size(one.item) <= self.most and self.together(one.item) == self.together(batch[0].item))
                (batch if fits else rest).append(one)
                size += self.size(one.item) if fits else 0
            self._queue = rest
            return batch

    def _run(self) -> None:
        while batch := self._take():
            live = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if not live:
                continue
            started = time.monotonic()
            self._finish(live)
            seconds = time.monotonic() - started
            with self._change:
                self._seconds = (self._seconds + seconds) / 2
            self.done(sum(self.size(one.item) for one in live), seconds)

    def _finish(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        """Every future of the batch gets its result or its exception."""
        try:
            results = self.work([one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for one in batch:
                self._finish([one])
            return
        for one, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                one.future.set_exception(result)
            else:
                one.future.set_result(result)

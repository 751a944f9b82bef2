"""Work spread over processes of this machine: parts of a pool drawn by any engine, blocks of answers scored, each shard whole.

The sibling of cluster.py, without Ray: each process is a Python of its own that loads once and is handed one shard at a time; the process that
asked alone writes files. Where there are GPUs each process sees one of them, else each has its share of the cores. A process that is lost
ends the work: what is stored stays.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from irlign.errors import IrlignError, RunError
from irlign.machine import end_with_parent, freed_memory_kept, give_memory_back, has_cuda
from irlign.progress import hush
from irlign.sampling import cluster
from irlign.sampling.cluster import Load
from irlign.sampling.engine import SamplingSettings


def spread(settings: SamplingSettings, load: Load, shards: Mapping[int, Any], name: str, told: Any = None) -> Iterator[tuple[int, Any]]:
    """`(number, result)` of every shard, in the order in which they are done: on the cluster where the engine is one, else in
    `num_workers` processes here, for a single shard in this one. Raises an error of irlign's own as it is, RunError where a process is lost or fails otherwise."""
    if settings.spread:
        yield from cluster.spread(settings.cluster, load, shards, name, told)
        return
    if len(shards) == 1:  # nothing to share out
        work, _ = load(told)
        yield from ((number, work(shard)) for number, shard in shards.items())
        return
    with Processes(min(settings.num_workers, len(shards)), load, name, told) as processes:
        yield from processes.work(shards)


class Processes:
    """So many processes that have loaded; they end, and their memory goes, with the `with` block."""

    def __init__(self, count: int, load: Load, name: str, told: Any = None):
        self.count, self.load, self.name, self.told = count, load, name, told

    def __enter__(self) -> "Processes":
        give_memory_back()
        with contextlib.ExitStack() as stack:
            self.workers = [stack.enter_context(_Worker(number, self.count, self.name)) for number in range(self.count)]
            told = self.told
            for worker in self.workers:  # all start at once; what the first settles on while it loads holds for the others
                worker.send((self.load, told))
                if worker is self.workers[0]:
                    told = worker.receive()
            for worker in self.workers[1:]:
                worker.receive()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def work(self, shards: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """`(number, result)` of every shard: whoever is free takes the next."""
        todo, at = deque(sorted(shards)), dict[Any, tuple[_Worker, int]]()

        def hand(worker: _Worker) -> None:
            if todo:
                worker.send(shards[todo[0]])
                at[worker.connection] = (worker, todo.popleft())

        for worker in self.workers:
            hand(worker)
        while at:
            for connection in wait(list(at)):
                worker, number = at.pop(connection)
                result = worker.receive()
                hand(worker)
                yield number, result


class _Worker:
    """One process, and the line to it."""

    def __init__(self, number: int, count: int, name: str):
        self.number, self.count, self.name = number, count, name

    def __enter__(self) -> "_Worker":
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", "-m", "irlign.sampling.processes", str(theirs.fileno())]
            self.process = subprocess.Popen(  # a session of its own: Ctrl-C is told to the process that asked, which ends this one
                command, env=_environment(self.number, self.count), pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.log.close()

    def send(self, what: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` says why
            self.connection.send(what)

    def receive(self) -> Any:
        """Its answer. Raises the IrlignError that it met, RunError for any other and where it is gone."""
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError):  # an OSError where it was lost in the middle of its answer
            do = "what is stored stays, and the same command goes on; fewer sampling.num_workers need less memory"
            raise RunError(f"a process was lost: {self._last_words()}", where=self.name, do=do) from None
        if error is not None:
            raise error
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return f"{how}, {lines[-1]}" if lines else how


def _environment(number: int, count: int) -> dict[str, str]:
    """Its card, or its share of the cores unless the environment says how many threads."""
    if not has_cuda():
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": cards[number % len(cards)]}


def main() -> None:
    """One of the processes: `python -m irlign.sampling.processes FD`."""
    hush()
    os.environ["IRLIGN_QUIET"] = "1"
    end_with_parent()
    asked = Connection(int(sys.argv[1]))
    import irlign.sampling.transformers_engine  # noqa: F401 -- most of the start, beside that of the others

    with freed_memory_kept(), contextlib.suppress(EOFError, ConnectionError):  # nobody asks any more
        try:
            load, told = asked.recv()
            work, told = load(told)
            asked.send((None, told))
            while True:
                asked.send((None, work(asked.recv())))
        except (EOFError, ConnectionError):
            raise
        except IrlignError as error:
            asked.send((error, None))
        except Exception as error:
            line = (str(error).strip() or "no message").splitlines()[0]
            failed = RunError(f"unexpected {type(error).__name__} in a process: {line}", do="--debug shows the traceback")
            failed.add_note(traceback.format_exc())
            asked.send((failed, None))


if __name__ == "__main__":
    main()

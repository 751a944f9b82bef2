"""Work spread over a Ray cluster: parts of a pool drawn by any engine, blocks of answers scored, each shard whole or again.

Workers are Ray actors that load once and are handed one shard at a time; the process that asked alone writes files. Not Ray Data: what the
first engine settled on (precision, tokens at once) has to reach the others before they load, the shard of a lost worker goes to whoever is
free instead of waiting for a restart, and a part is stored the moment it is drawn. What workers read (policies, rewards) has to lie where
all nodes see it, and irlign has to be installed there.
"""

import contextlib
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from irlign.errors import ConfigError, IrlignError, RunError
from irlign.progress import hush, say
from irlign.sampling.engine import ClusterSettings

PATIENCE_S = 60.0  # without a worker, before the user is told what is waited for
Load = Callable[[Any], tuple[Callable[[Any], Any], Any]]  # from what an earlier worker told: what does a shard, and what this one tells


class Worker:
    """One process of the cluster, with what it loaded."""

    def load(self, load: Load, told: Any) -> Any:
        """Get ready; returns what the workers after this one have to know."""
        hush()
        os.environ["IRLIGN_QUIET"] = "1"
        self.work, told = load(told)
        return told

    def do(self, shard: Any) -> Any:
        """The result of one shard."""
        return self.work(shard)


def spread(settings: ClusterSettings, load: Load, shards: Mapping[int, Any], name: str, told: Any = None) -> Iterator[tuple[int, Any]]:
    """`(number, result)` of every shard, in the order in which they are done; the sum of all results depends on no worker.

    A worker or node that is lost gives its shard back. Raises ConfigError where Ray is missing or no cluster answers, an error of
    irlign's own as it is, and RunError for a shard that was lost, or failed otherwise, more than `max_retries` times.
    """
    with _joined(settings):
        yield from _hand_out(settings, load, shards, name, told)


@contextlib.contextmanager
def _joined(settings: ClusterSettings) -> Iterator[None]:
    """In the cluster, or in one started on this machine where there is none. What is started here reports no usage."""
    hush()
    try:
        import ray
    except ImportError as error:
        raise ConfigError("ray is not installed", where="sampling.engine", do="pip install 'irlign[cluster]'") from error
    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"no Ray cluster answers: {line}", where="sampling.cluster.address", do="`ray status` says what runs") from error
    with contextlib.suppress(ValueError):  # Ray takes the signal for itself; not in the main thread it does not
        signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _hand_out(settings: ClusterSettings, load: Load, shards: Mapping[int, Any], name: str, told: Any) -> Iterator[tuple[int, Any]]:
    """The first worker loads alone, since what it tells is handed to the others; then whoever is free takes the next shard."""
    import ray

    todo, left, lost, alone = deque(sorted(shards)), len(shards), Counter[int | None](), True
    at: dict[Any, tuple[Any, int | None]] = {}  # an answer that is waited for: its worker, and the number of its shard (None: it loads)
    kind = ray.remote(Worker).options(num_cpus=settings.num_cpus, num_gpus=_gpus(settings), scheduling_strategy="SPREAD")

    def start(count: int) -> None:
        for _ in range(count):
            actor: Any = kind.remote()
            at[actor.load.remote(load, told)] = (actor, None)

    start(1)
    try:
        while left:
            reference = _first(at, settings, name)
            actor, number = at.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                lost[number] += 1
                _give_back(error, number, lost[number], settings, name)
                todo.extendleft([] if number is None else [number])
                ray.kill(actor)
                start(1)
                continue
            if number is None and alone:
                alone, told = False, result
                start(min(_places(settings), left) - 1)
            if todo:
                following = todo.popleft()
                at[actor.do.remote(shards[following])] = (actor, following)
            else:
                ray.kill(actor)  # gives its memory back
            if number is not None:
                left -= 1
                yield number, result
    finally:
        for actor, _ in at.values():
            ray.kill(actor)


def _first(at: Mapping[Any, Any], settings: ClusterSettings, name: str) -> Any:
    """The first answer to arrive. Says what is waited for while no worker has been found a place."""
    import ray

    while True:
        ready, _ = ray.wait(list(at), num_returns=1, timeout=PATIENCE_S)
        if ready:
            return ready[0]
        if all(number is None for _, number in at.values()):
            has = ", ".join(f"{ray.cluster_resources().get(what, 0):g} {what}" for what in ("CPU", "GPU"))
            say(
                f"{name}: no worker is ready yet; each asks for {settings.num_cpus:g} CPU and {_gpus(settings):g} GPU, the cluster has {has}"
            )


def _give_back(error: Exception, number: int | None, times: int, settings: ClusterSettings, name: str) -> None:
    """What a loss means: an error of irlign's own is one at once, others after the retries."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, IrlignError):
        raise cause
    line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    what = "while it loaded" if number is None else f"in shard {number}"
    if times > settings.max_retries:
        do = "see Ray's logs (`ray logs`); what is stored stays, and the same command goes on"
        raise RunError(f"a worker was lost {what} {times} times: {line}", where=name, do=do) from error
    say(f"{name}: a worker was lost {what} ({line}); another takes over")


def _gpus(settings: ClusterSettings) -> float:
    import ray

    return settings.num_gpus if settings.num_gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)


def _places(settings: ClusterSettings) -> int:
    """How many workers work side by side: as many as are asked for, or as fit on the nodes."""
    import ray

    if settings.num_workers:
        return settings.num_workers
    wants = {"CPU": settings.num_cpus, "GPU": _gpus(settings)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, sum(int(min(node.get(what, 0) / much for what, much in wants.items() if much)) for node in nodes))

"""What Prometheus reads of a server: requests, seconds, tokens, turns of the batch, rewards, the queue."""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from irlign.serving.answers import Answered

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
ANSWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """One server's numbers, in a registry of its own; `waiting` and `running` say how many requests wait and are worked on."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]):
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("irlign_requests", "requests, by path and status", ["path", "status"], **own)
        self.seconds = Histogram(
            "irlign_request_seconds", "from the first byte of a request to the last of its answer", ["path"], buckets=SECONDS, **own
        )
        self.tokens = Counter("irlign_tokens", "tokens read (prompt), drawn (all candidates) and returned", ["kind"], **own)
        self.batch_answers = Histogram("irlign_batch_answers", "answers worked on together, in each turn", buckets=ANSWERS, **own)
        self.batch_seconds = Histogram("irlign_batch_seconds", "seconds of a turn", buckets=SECONDS, **own)
        self.rewards = Summary("irlign_reward", "rewards of returned answers", **own)
        Gauge("irlign_waiting_requests", "requests that wait to begin", **own).set_function(waiting)
        Gauge("irlign_running_requests", "requests that are worked on", **own).set_function(running)

    def answered(self, answers: Sequence[Answered]) -> None:
        """What a request was answered with."""
        for one in answers:
            returned = sum(pick.drawn.sample.tokens for pick in one.picks)
            for kind, count in (("prompt", one.prompt_tokens), ("drawn", one.tokens), ("returned", returned)):
                self.tokens.labels(kind).inc(count)
            for pick in one.picks:
                self.rewards.observe(pick.reward)

    def batch(self, size: int, seconds: float) -> None:
        """A turn is done."""
        self.batch_answers.observe(size)
        self.batch_seconds.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered, one way or the other."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)

"""What the user sees while a stage runs: a live line on a terminal, plain lines elsewhere, all on standard error.

Standard output is left to results. `IRLIGN_QUIET=1` silences everything here.
"""

import contextlib
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

# No telemetry, no bars but ours, no advice about forks; whoever sets one of these keeps it.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PLAIN_SECONDS = 5.0  # between two plain lines
WINDOW_SECONDS = 30.0  # the rate is an average over this much time, so that items of an earlier attempt do not flatter it,
WINDOW_STEPS = 8  # and over as many steps: what takes minutes and runs side by side ends by twos and threes
_silenced: list[bool] = []
_live: list[Any] = []  # the one rich display, and one entry more for each Progress inside it


def quiet() -> bool:
    """Whether the environment asks for silence, or `silently` does."""
    return bool(_silenced) or os.environ.get("IRLIGN_QUIET", "0").lower() not in ("", "0", "false", "no")


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """No line from what is done in here, again and again, inside something that has a line of its own."""
    _silenced.append(True)
    try:
        yield
    finally:
        _silenced.pop()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing is said inside the block: a server's batches are no news."""
    before = os.environ.get("IRLIGN_QUIET")
    os.environ["IRLIGN_QUIET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("IRLIGN_QUIET") if before is None else os.environ.update(IRLIGN_QUIET=before)


def hush() -> None:
    """Keep the libraries below from talking; where transformers is imported already, from drawing bars."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # TRL still writes it the old way
    hub_constants: Any = sys.modules.get("huggingface_hub.constants")
    if hub_constants is not None and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1":
        hub_constants.HF_HUB_DISABLE_TELEMETRY = True  # read when it was imported, and TRL's trainers ask it as they start
    transformers_logging: Any = sys.modules.get("transformers.utils.logging")
    if transformers_logging is not None and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        transformers_logging.disable_progress_bar()


def say(message: str) -> None:
    """Print one line for the user, above the live line where there is one. A closed terminal is no error."""
    if quiet():
        return
    with contextlib.suppress(OSError, ValueError):
        if _live:
            _live[0].console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)


class Progress:
    """How far a stage is: `with Progress("sft", 300, "steps") as bar: bar.advance(1, "loss 1.203")`.

    `total` may be None (unknown) and may be set later. The last line, with the time taken, stays when the block ends
    well; an error leaves none.
    """

    def __init__(self, stage: str, total: int | None, unit: str = "items"):
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.note = 0, ""
        self._start = self._shown = time.monotonic()
        self._history: deque[tuple[float, int]] = deque([(self._start, 0)])
        self._task: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._shown = time.monotonic()
        self._history = deque([(self._start, 0)])
        if not quiet() and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            _live.append(_live[0] if _live else _display())
            self._task = _live[0].add_task(self.line(), total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._task is not None:
            _live[0].remove_task(self._task)
            self._task = None
            display = _live.pop()
            if not _live:
                display.stop()
        if kind is None:
            say(self.summary())

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more items are done; `note` (a loss, a file) stands at the end of the line until the next one."""
        now = time.monotonic()
        self.done += n
        self.note = note or self.note
        self._history.append((now, self.done))
        while len(self._history) > WINDOW_STEPS + 1 and now - self._history[0][0] > WINDOW_SECONDS:
            self._history.popleft()
        if self._task is not None:
            _live[0].update(self._task, completed=self.done, total=self.total, description=self.line())
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            say(self.line())

    def rate(self) -> float:
        """Items a second over the last half minute, or the last steps where they are slow; 0 before there is anything to divide."""
        (then, before), (now, done) = self._history[0], self._history[-1]
        return (done - before) / (now - then) if now > then else 0.0

    def line(self) -> str:
        """The state in words: `sft: 120/400 steps, 35.2/s, 0:08 left, loss 1.203`."""
        rate = self.rate()
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts = [f"{self.stage}: {count} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if self.total is not None and self.total > self.done:
                parts.append(f"{clock((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)

    def summary(self) -> str:
        """The last line: what was done and how long it took."""
        seconds = time.monotonic() - self._start
        took = f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
        line = f"{self.stage}: {self.done:,} {self.unit} in {took}"
        return f"{line}, {self.note}" if self.note else line


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _display() -> Any:
    """The live display that every Progress of this process shares, started."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Display

    columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    display = Display(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    display.start()
    return display

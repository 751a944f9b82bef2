"""The few kinds of error a user can meet: what is wrong, where, and what to do about it."""

import contextlib
from collections.abc import Iterator


class IrlignError(Exception):
    """One clear error. `what` is wrong, `where` (a file:line, a key, a stage), and what to `do`.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, do: str | None = None):
        self.what, self.where, self.do = what, where, do
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where is not None else ""
        remedy = f"\n  {self.do}" if self.do else ""
        return f"{place}{self.what}{remedy}"


class ConfigError(IrlignError):
    """The recipe or an override is wrong."""

    exit_code = 2


class DataError(IrlignError):
    """A file of demonstrations, prompts, preferences or samples is wrong."""


class OverlongError(DataError):
    """A row does not fit, and `data.on_overlong` says that this is an error."""


class ModelError(IrlignError):
    """A checkpoint or tokenizer cannot serve, or training diverged."""


class RunError(IrlignError):
    """The run directory cannot be used: locked, unwritable, full, damaged."""


class GuardError(IrlignError):
    """A guard found something that would make the result meaningless; `do` names the opt-out key."""


class IrlignWarning(UserWarning):
    """Something the user should know that does not stop the run; an error in the tests."""


class Terminated(SystemExit):
    """SIGTERM; any other exit is one that a library asks for, and no interruption."""


def interruption(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C or SIGTERM that an error began as, or None: what a library undoes on the way up may fail and hide it."""
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__cause__ or error.__context__
    return error


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text


@contextlib.contextmanager
def memory_errors(what: str, *, where: str, do: str) -> Iterator[None]:
    """Turn a device or machine that runs out of memory inside the block into a ModelError with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise ModelError(f"out of memory with {what}", where=where, do=do) from error
        raise

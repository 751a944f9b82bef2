"""Files that are written whole or not at all: JSON, JSON lines, Parquet tables, content hashes, and disk errors in plain words."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from irlign.errors import IrlignError, RunError

UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG)
GROUP = 8192  # rows of a table that are read at once
PARTIAL = ".irlign-partial"  # ends the name of a file that is still being written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of `path`, durably, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def disk_errors(root: Path, stage: str | None = None) -> Iterator[None]:
    """Turns an error about a full disk, denied access or a broken path into one RunError that says which.

    A missing path is one only without a `stage`: in a stage it may be any file's.
    """
    try:
        yield
    except IrlignError:
        raise
    except Exception as error:
        code, place = error_number(error), f"{root}, stage {stage}" if stage else root
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise RunError("no space left on the disk", where=place, do="free some space and run the same command again") from error
        if code in UNUSABLE or (code == errno.ENOENT and stage is None):
            name = getattr(error, "filename", None)
            what = f"cannot be used: {os.strerror(code).lower()}" + (f" ({name})" if name else "")
            raise RunError(what, where=place, do="give an output_dir that you can write to") from error
        raise


def take_lock(root: Path) -> IO[str]:
    """The lock of a folder, held until the file is closed or the process ends. Raises RunError where another process has it."""
    lock = (root / ".lock").open("a+", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise RunError(f"in use by another process (pid {holder})", where=root, do="wait for it, or give another output_dir") from None
    except OSError as error:
        lock.close()
        what, do = f"its file system knows no locks: {error.strerror}", "give an output_dir on another file system"
        raise RunError(what, where=root / ".lock", do=do) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def error_number(error: Exception) -> int | None:
    """The system's number of an error; read from its message where a library has kinds of errors of its own (safetensors, Arrow)."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE)
    if found:
        return int(found[1])
    full = any(words in str(error).lower() for words in ("no space left on device", "unexpected pos"))  # the second is torch.save's
    return errno.ENOSPC if full else None


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity become null, a lone surrogate its escape."""
    with replacing(path) as temporary:
        text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises RunError where the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("the file is missing", where=path) from None
    except (OSError, ValueError) as error:
        raise RunError(f"the file is damaged: {error}", where=path, do="delete it: the stage that wrote it then runs again") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line, in the given order; a lone surrogate is written as its JSON escape."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as one Parquet file, columns as in the first row. A lone surrogate becomes a question mark."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [_cell(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, row_group_size=GROUP)


def _cell(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def read_table(path: Path, *columns: str, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet file, or of all numbered parts in a folder, in order; only the named columns where some are (those that the
    file has), and only the rows of one split where it is named. Raises RunError where one is damaged."""
    return [row for rows in table_parts(path, *columns) for row in rows if split is None or row["split"] == split]


def table_parts(path: Path, *columns: str) -> Iterator[list[dict[str, Any]]]:
    """The same part by part: one numbered part of a folder, or one row group of a file, is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]:
        try:
            with pq.ParquetFile(part) as file:
                wanted = [name for name in columns if name in file.schema_arrow.names] if columns else None
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=wanted).to_pylist()
        except FileNotFoundError:
            raise RunError("the file is missing", where=part) from None
        except (OSError, pa.ArrowException) as error:
            line = str(error).splitlines()[0]
            raise RunError(f"the file is damaged: {line}", where=part, do="delete it: the stage that wrote it then runs again") from error


def plain(value: Any) -> Any:
    """Settings models, dataclasses, paths and NumPy numbers as what JSON knows; not-a-number and infinity as None."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = value.item() if type(value).__module__ == "numpy" else value
    if isinstance(number, float):
        return number if abs(number) < float("inf") else None
    return number


def digest(value: Any) -> str:
    """The sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def files(path: Path) -> list[Path]:
    """The file itself, or all files below a folder, sorted."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def hash_path(path: Path) -> str:
    """sha256 over a file's bytes, or over the names and contents of all files below a folder."""
    total = hashlib.sha256()
    for file in files(path):
        if path.is_dir():
            total.update(f"{file.relative_to(path).as_posix()}\n{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or everything below a folder, to the disk."""
    for file in files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    for folder in (path, *path.rglob("*")) if path.is_dir() else ():
        if folder.is_dir():
            sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Files and Hub datasets as rows, each with the place it stands at, so that every later message can name it."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from irlign.errors import DataError
from irlign.records import is_text

Row = tuple[str, dict[str, Any]]  # "file:line" (or "file, row N") and the columns


def read_rows(name: str, *, split: str = "train", max_rows: int | None = None) -> list[Row]:
    """All rows of a .jsonl, .json, .csv or .parquet file, or of a Hub dataset's split. Raises DataError naming file and line."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"cannot read {path.suffix or 'a file without a suffix'}", where=path, do=f"use {', '.join(READERS)}")
        rows = READERS[path.suffix.lower()](path)
    elif path.is_dir():
        raise DataError("is a folder, not a file", where=path, do=f"give one file: {', '.join(READERS)}")
    elif path.suffix.lower() in READERS or name.startswith((".", "/", "~")):
        raise DataError("no such file", where=path, do="check the path; relative paths start at the working directory")
    else:
        rows = _hub(name, split)
    found: list[Row] = []
    for row in rows:
        if max_rows is not None and len(found) >= max_rows:
            break
        found.append(row)
    if not found:
        raise DataError("holds no rows", where=name)
    return found


def _jsonl(path: Path) -> Iterator[Row]:
    with _open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise DataError("is not UTF-8 text", where=place, do="save the file as UTF-8") from None
            if not text:
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"is not JSON: {_reason(error)}", where=place, do="each line is one JSON object") from None
            yield place, _mapping(value, place)


def _json(path: Path) -> Iterator[Row]:
    try:
        text = _read_text(path)
        value = json.loads(text)
    except json.JSONDecodeError as error:
        more = text[error.pos :].lstrip()[:1] == "{" and error.msg == "Extra data"
        remedy = "it looks like JSON Lines: name it .jsonl" if more else "a list of JSON objects is expected"
        raise DataError(f"is not JSON: {error.msg}", where=f"{path}:{error.lineno}", do=remedy) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {_reason(error)}", where=path) from None
    if isinstance(value, dict) and len(lists := [v for v in value.values() if isinstance(v, list)]) == 1:
        value = lists[0]  # {"data": [...]}
    if not isinstance(value, list):
        raise DataError("is no list of objects", where=path, do='write [{"prompt": ..., "completion": ...}, ...]')
    for number, item in enumerate(value, 1):
        place = f"{path}, item {number}"
        yield place, _mapping(item, place)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 0
    try:
        for row in reader:
            place, line = f"{path}:{line + 1}", reader.line_num
            if not row:
                continue
            if header and len(row) > len(header):
                raise DataError("has more fields than the header", where=place, do="put fields that hold commas in quotes")
            if header and len(row) < len(header):
                raise DataError("has fewer fields than the header", where=place, do="give every column a value")
            if header:
                yield place, dict(zip(header, row, strict=True))
            header = header or row
    except csv.Error as error:
        raise DataError(f"is not CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"is not Parquet: {str(error).splitlines()[0]}", where=path) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _hub(name: str, split: str) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("no such file, and reading from the Hub needs `datasets`", where=name, do="pip install 'irlign[hub]'") from None
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # the Hub client raises many kinds
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no such file, and it cannot be read from the Hub: {line}", where=name, do="check the name and data.split"
        ) from error
    for number, row in enumerate(dataset, 1):
        yield f"{name}, row {number}", dict(row)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _open(path: Path, mode: str, **options: Any) -> Any:
    try:
        return path.open(mode, **options)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path}:{error.object.count(10, 0, error.start) + 1}"
        raise DataError("is not UTF-8 text", where=place, do="save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def _mapping(value: Any, place: str) -> dict[str, Any]:
    """A row of a JSON file. Only JSON can spell half of a surrogate pair, which no tokenizer and no file takes: an error here."""
    if not isinstance(value, dict):
        raise DataError(f"is {kind_of(value)}, not an object with columns", where=place)
    if not is_text(json.dumps(value, ensure_ascii=False)):
        do = "repair the text: an emoji was cut in two where the file was written"
        raise DataError("holds half of a surrogate pair (like \\ud83d alone), which is no text", where=place, do=do)
    return value


def kind_of(value: Any) -> str:
    """What a value is, in the words of the file that holds it."""
    words = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return words.get(type(value), f"a {type(value).__name__}")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)

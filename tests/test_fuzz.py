"""Any input gives a result or one clear error: every reader and parser against generated text. `make fuzz` tries many more."""

import csv
import io
import json
import os
import tempfile
import time
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from irlign.config import load_recipe
from irlign.data.demonstrations import DataSettings, load_demonstrations, load_preferences, split_by_prompt
from irlign.data.hh import is_transcript, turns
from irlign.errors import IrlignError
from irlign.recipe import Recipe
from irlign.records import is_text
from irlign.runs import Run
from irlign.serving.protocol import UNSERVED, Chat, Completion, Refused, Score
from irlign.serving.protocol import read as read_body

TRIES = int(os.environ.get("IRLIGN_FUZZ", 60))
MANY = settings(max_examples=TRIES, deadline=None, derandomize=TRIES <= 60, suppress_health_check=list(HealthCheck))
MIB = 2**20
SAFE = DataSettings(on_empty="drop")

HOSTILE = st.sampled_from(
    [
        "</s>",
        "<|im_start|>",
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "\0",
        "\ufeff",
        "\r\n",
        "\u202e",
        "👩‍👩‍👧‍👦",
        "\n\nHuman:",
        "\n\nAssistant:",
        "../..",
        "'\"",
        "\ud800",
    ]
)
TEXT = st.lists(HOSTILE | st.text(max_size=8), max_size=6).map("".join)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"]) | VALUE
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLE, "content": TEXT | VALUE}) | st.fixed_dictionaries({"from": ROLE, "value": TEXT | VALUE}) | VALUE,
    max_size=4,
)
COLUMN = st.sampled_from(["prompt", "completion", "messages", "conversations", "instruction", "input", "output", "chosen", "rejected"])
ROW = st.dictionaries(COLUMN | TEXT, TEXT | MESSAGES | MESSAGES.map(json.dumps) | VALUE, max_size=5)
ROWS = st.lists(ROW, max_size=5)


@contextmanager
def _quick():
    """No more than 5 s of the processor's time, however busy the machine is."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def _read(name: str, raw: bytes) -> None:
    """What `irlign` does with a file: nothing but a result or an IrlignError, in memory that its size explains."""
    with tempfile.TemporaryDirectory() as folder, _quick():
        path = Path(folder, name)
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            for load in (load_demonstrations, load_preferences):
                with suppress(IrlignError):
                    loaded = load(str(path), SAFE)
                    for d in getattr(loaded, "demonstrations", []):
                        assert is_text(d.completion) and d.completion.strip()
            with suppress(IrlignError):
                split_by_prompt(load_demonstrations(str(path), SAFE).demonstrations, SAFE, 0)
            assert tracemalloc.get_traced_memory()[1] < 200 * MIB + 10 * len(raw)
        finally:
            tracemalloc.stop()


@MANY
@given(ROWS)
@example([{"messages": "[" * 100_000}])
@example([{"prompt": "x", "completion": [[[]]]}])
def test_json_lines(rows):
    _read("d.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    _read("d.json", json.dumps(rows).encode())


@MANY
@given(st.binary(max_size=200) | TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"prompt": "x", "completion": ' + b"9" * 100_000 + b"}")
@example(b'{"prompt": 1e999, "completion": NaN}')
@example(b'a,b\n"')
@example(b"PAR1" + b"\xff" * 100 + b"PAR1")
def test_any_bytes_under_any_suffix(raw):
    for suffix in ("jsonl", "json", "csv", "parquet"):
        _read(f"d.{suffix}", raw)


@MANY
@given(st.lists(st.lists(TEXT, min_size=2, max_size=3), max_size=5))
def test_csv(rows):
    file = io.StringIO(newline="")
    with suppress(csv.Error):
        csv.writer(file).writerows([["prompt", "completion", "chosen"], *rows])
        _read("d.csv", file.getvalue().encode("utf-8", "surrogatepass"))


@MANY
@given(ROWS, st.integers(0, 2**16), st.integers(1, 255))
def test_parquet_whole_and_damaged(rows, place, flip):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.parquet")
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, TypeError, UnicodeError, OverflowError):
            return  # mixed types make no table
        raw = bytearray(path.read_bytes())
    _read("d.parquet", bytes(raw))
    raw[place % len(raw)] ^= flip
    _read("d.parquet", bytes(raw))


@MANY
@given(TEXT)
def test_transcripts(text):
    if is_transcript(text):
        assert turns(text) and all(m["role"] in ("user", "assistant") for m in turns(text))


@MANY
@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)) | TEXT, VALUE, max_size=4) | VALUE, st.lists(TEXT, max_size=2))
def test_recipes_and_overrides(values, overrides):
    _recipe(json.dumps(values), overrides)


@MANY
@given(st.binary(max_size=120) | TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b"[" * 3_000)
@example(b"{a: " * 3_000)
@example(
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
)
@example(b"seed: 0o17\nworld: !!python/object/apply:os.system [true]\n")
@example(b"seed: 9" + b"9" * 10_000)
@example(b"seed: 2026-99-99\n")
@example(b"? [a]\n: b\n")
def test_recipe_files(raw):
    _recipe(raw, [])
    _recipe("world: dialogue\n", ["seed=" + raw.decode("utf-8", "replace")])


def _recipe(text: str | bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, _quick(), suppress(IrlignError):
        path = Path(folder, "r.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        assert isinstance(load_recipe(Recipe, path, overrides), Recipe)


FIELD = st.sampled_from(sorted({*Chat.model_fields, *Completion.model_fields, *Score.model_fields, *UNSERVED})) | TEXT
BODY = st.dictionaries(FIELD, VALUE | MESSAGES | TEXT | st.integers(-2, 3), max_size=6)


@MANY
@given(BODY, st.binary(max_size=60))
@example({}, b"[" * 100_000)
@example({"\ud800": []}, b"")
@example({}, b'{"model": "m", "prompt": "x", "n": ' + b"9" * 100_000 + b"}")
def test_request_bodies(body, raw):
    """What a server reads gives a request whose prompts are known, or one refusal with a status of the client's."""
    whole = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "completion": "y"}
    for kind in (Chat, Completion, Score):
        needed = {name: whole[name] for name in kind.model_fields if name in whole and not (kind is Score and name == "messages")}
        for given_ in (json.dumps(body).encode(), json.dumps({**needed, **body}).encode(), raw):
            try:
                with _quick():
                    read = read_body(kind, given_)
                assert isinstance(read.content, str | tuple) if isinstance(read, Score) else read.prompts()
            except Refused as error:
                assert 400 <= error.status < 500 and error.message


ENTRY = {"status": "complete", "seconds": 1.0, "inputs": {}, "settings": {}, "outputs": {"data": "0"}, "seed": 0, "notes": {}}


@MANY
@given(
    st.dictionaries(
        TEXT, st.dictionaries(st.sampled_from(sorted(ENTRY)) | TEXT, VALUE).map(lambda more: {**ENTRY, **more}) | VALUE, max_size=3
    )
    | VALUE
)
@example({"a": {**ENTRY, "outputs": {"../x": "0"}}})
@example({"a": {**ENTRY, "replaces": 3}})
def test_manifests(stages):
    """A run directory is opened, and its stages asked for, whatever its manifest holds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "manifest.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")
        with _quick(), suppress(IrlignError):
            run = Run.read(folder)
            run.check("data")
            run.input_hashes({"data": "data"})
            for before in run.stages.values():
                run._why(before, run._entry({"x": 1}, {}))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_megabyte_in_one_answer_is_read(tmp_path, suffix):
    answer = "ab" * (MIB // 2)
    path = tmp_path / f"d.{suffix}"
    rows = [{"prompt": f"p{i}", "completion": answer} for i in range(3)]
    lines = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "prompt,completion\n" + "\n".join(f"p{i},{answer}" for i in range(3)),
    }
    path.write_text(lines[suffix])
    assert [d.completion for d in load_demonstrations(str(path), SAFE).demonstrations] == [answer] * 3

"""Pools: parts, resume, statistics, and the guard on cut answers."""

import json

import pytest
from tiny import make_tiny_policy

from irlign.errors import GuardError, ModelError, RunError
from irlign.files import read_table
from irlign.records import Prompt, Sample
from irlign.runs import request_seed
from irlign.sampling import pools
from irlign.sampling.decoder import Decoder
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool, guard_finished, pool_statistics, read_pool

PROMPTS = [
    Prompt.of(t, s) for t, s in zip(("the cat", "a dog ran", "the bird", "home", "now the", "a"), ["train", "test", "dev"] * 2, strict=True)
]
WANTED = [(p, 3 if p.split == "train" else 2) for p in PROMPTS]
SETTINGS = SamplingSettings(max_new_tokens=8, part_prompts=2, batch_size=4, stop=["!"], temperature=0.9)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def _draw(policy, folder, wanted=WANTED, seed=7, name="sft", settings=SETTINGS):
    return draw_pool(policy, wanted, settings, chat_template="none", folder=folder, seed=seed, name=name)


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, _draw(policy, folder)


def test_the_stored_rows(whole):
    folder, _ = whole
    rows = read_table(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [len(read_table(path)) for path in sorted(folder.iterdir())] == [4, 4, 6]  # dev, test, train: two prompts a part
    assert [(r["split"], r["prompt_id"], r["index"]) for r in rows] == sorted((r["split"], r["prompt_id"], r["index"]) for r in rows)
    assert {(r["prompt_id"], r["index"]) for r in rows} == {(p.prompt_id, i) for p, n in WANTED for i in range(n)}
    for row in rows:
        assert (row["temperature"], row["top_p"], row["top_k"], row["max_new_tokens"], row["engine"]) == (
            0.9,
            1.0,
            0,
            8,
            "transformers",
        )
        assert json.loads(row["stop"]) == ["!"]
        assert row["seed"] == str(request_seed(7, "sample-sft", row["prompt_id"], row["index"]))
    assert read_pool(folder) == [Sample.from_row(r) for r in rows]


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_draw_goes_on_and_gives_the_same_bytes(policy, whole, tmp_path, monkeypatch, after):
    written = []

    def write(path, rows):
        if len(written) == after:
            raise Killed
        written.append(path.name)
        real(path, rows)

    real = pools.write_table
    with monkeypatch.context() as patch:
        patch.setattr(pools, "write_table", write)
        with pytest.raises(Killed):
            _draw(policy, tmp_path / "pool")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("*")}
    assert len(kept) == after
    assert _draw(policy, tmp_path / "pool") == whole[1]
    assert _bytes(tmp_path / "pool") == _bytes(whole[0])
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_the_order_of_the_prompts_changes_nothing(policy, whole, tmp_path):
    _draw(policy, tmp_path, [*WANTED[::-1], (Prompt.of("no sample of this", "train"), 0)])
    assert _bytes(tmp_path) == _bytes(whole[0])


def test_the_seed_and_the_name_change_the_samples(policy, whole, tmp_path):
    answers = [s.completion for s in read_pool(whole[0])]
    for seed, name in ((8, "sft"), (7, "init")):
        _draw(policy, tmp_path / f"{seed}{name}", seed=seed, name=name)
        assert [s.completion for s in read_pool(tmp_path / f"{seed}{name}")] != answers


def test_a_finished_pool_loads_no_model(whole, tmp_path):
    assert _draw(tmp_path / "no such policy", whole[0]) == whole[1]


def test_a_damaged_part_is_named(policy, tmp_path):
    _draw(policy, tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(b"torn")
    with pytest.raises(RunError, match="part-00001") as caught:
        read_pool(tmp_path)
    assert "part-00001" in str(caught.value)


def _sample(completion, reason, tokens, prompt="the cat"):
    return Sample(Prompt.of(prompt, "train"), 0, completion, reason, tokens, -1.0)


def test_statistics_by_hand():
    samples = [
        _sample("a dog.", "eos", 3),
        _sample(" ", "stop", 1),
        _sample("a a a a", "length", 4, "home"),
        _sample("", "eos", 1),
    ]
    assert pool_statistics(samples) == {
        "samples": 4,
        "prompts": 2,
        "completions/mean_length": 9 / 4,
        "completions/clipped_ratio": 1 / 4,
        "completions/empty_ratio": 2 / 4,
    }


def test_the_guard_on_cut_answers():
    def check(cut, limit=0.5):
        guard_finished({"completions/clipped_ratio": cut}, SamplingSettings(max_cut_share=limit, max_new_tokens=9))

    check(0.5)
    with pytest.raises(GuardError, match="60% of the answers were cut at 9 tokens") as caught:
        check(0.6)
    assert "sampling.max_cut_share=1" in str(caught.value)
    with pytest.raises(GuardError, match="no answer ended"):
        check(1.0)
    check(1.0, limit=1)


def _memory_for(monkeypatch, rows, parts=99):
    """The machine has memory for so many rows, in the first draws at least."""
    turn, tried = Decoder.turn, {}

    def watched(self, room):
        tried.setdefault(self, room.rows)
        if len(tried) <= parts and min(room.rows, len(self.waiting) + len(self.running)) > rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return turn(self, room)

    monkeypatch.setattr(Decoder, "turn", watched)
    return tried.values()


def test_memory_that_runs_out_halves_the_batch_of_that_part_only(policy, whole, tmp_path, monkeypatch):
    tried = _memory_for(monkeypatch, rows=1, parts=2)
    statistics = _draw(policy, tmp_path)
    assert [*tried] == [4, 2, 1, 4, 4]
    assert statistics == {**whole[1], "parts_halved": ["part-00000"]} and whole[1]["parts_halved"] == []
    parts = [read_table(path) for path in sorted(tmp_path.iterdir())]
    assert [{row["halvings"] for row in part} for part in parts] == [{2}, {0}, {0}]
    assert list(_bytes(tmp_path).values())[1:] == list(_bytes(whole[0]).values())[1:]
    assert [s.completion for s in read_pool(tmp_path)] == [s.completion for s in read_pool(whole[0])]


def test_memory_that_holds_no_answer_is_an_error_with_a_remedy(policy, tmp_path, monkeypatch):
    tried = _memory_for(monkeypatch, rows=0)
    with pytest.raises(ModelError, match="out of memory with one answer at a time") as caught:
        _draw(policy, tmp_path)
    assert [*tried] == [4, 2, 1] and "sampling.max_new_tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("own", "cores", "parts", "sharing"),
    [({}, 8, 3, 3), ({"num_cpus": 4}, 8, 3, 2), ({"num_cpus": 16}, 8, 3, 1), ({"num_workers": 2}, 8, 3, 2), ({}, 1, 3, 1), ({}, 8, 1, 1)],
)
def test_the_workers_of_a_node_share_its_memory(policy, tmp_path, monkeypatch, own, cores, parts, sharing):
    """Half of 2^17 bytes, 256 for a token: 256 tokens for all of them. Without Ray: what it hands to the first worker is called here."""

    def spread(settings, load, shards, name, told):
        work, _ = load(told)
        yield from ((number, work(shard)) for number, shard in shards.items())

    monkeypatch.setattr("irlign.sampling.cluster.spread", spread)
    monkeypatch.setattr("irlign.sampling.transformers_engine.free_memory", lambda device: 2**17)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    settings = SamplingSettings(engine="cluster", cluster=own, max_new_tokens=8, batch_size=64, part_prompts=6 // parts)
    assert (
        _draw(policy, tmp_path, settings=settings)["settled"]["batch_tokens"] == {1: 256, 2: 128, 3: 64}[sharing]
    )  # 256 / 3 is 85: a power of two


def test_what_the_engine_settled_on_holds_after_a_resume(policy, tmp_path, monkeypatch):
    """Free memory shrinks between the two attempts: the rest is drawn with the budget of the first part."""
    _draw(policy, tmp_path / "plenty")
    monkeypatch.setattr("irlign.sampling.transformers_engine.free_memory", lambda device: 2**16)
    short = _draw(policy, tmp_path / "short")
    assert short["settled"] == {"batch_tokens": 128, "dtype": "float32"}  # half of 2^16 bytes, 256 for a token
    (tmp_path / "short/part-00001.parquet").unlink()
    monkeypatch.setattr("irlign.sampling.transformers_engine.free_memory", lambda device: 2**40)
    before = _bytes(tmp_path / "short")
    assert _draw(policy, tmp_path / "short") == short
    assert _bytes(tmp_path / "short").items() > before.items()
    settled = {row["settled"] for row in read_table(tmp_path / "short")}
    assert [json.loads(text) for text in settled] == [short["settled"]]
    assert _draw(policy, tmp_path / "plenty")["settled"]["batch_tokens"] == 4 * 64  # a full batch of the longest texts

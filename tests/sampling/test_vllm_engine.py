"""vLLM in its own process: parity with the engine in process, seeds, and a process that never outlives its use or fails unheard.

The tests marked `vllm` need it (`make test-vllm`); the others speak with a stand-in for its process.
"""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_policy

from irlign.errors import ConfigError, DataError, ModelError
from irlign.optimise.distill import train_distill
from irlign.records import Demonstration, Prompt, Sample
from irlign.sampling.engine import Request, SamplingSettings, check_engine, load_engine
from irlign.sampling.pools import draw_pool, read_pool
from irlign.sampling.vllm_engine import PYTHON
from irlign.training import TrainerSettings

TEXTS = ("the cat", "The red bird sang on the mat and", "a", "the dog ran home", "home")
CHILD = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    sys.exit({missing})
def say(line):
    print(json.dumps(line), flush=True)
wanted = json.loads(sys.stdin.readline())
say({loaded})
for line in sys.stdin:
    asked = json.loads(line)
    for row in asked["rows"]:
        {answer}
"""
ECHO = 'say({"ids": [10 + row["seed"] % 5, 20, 2][: row["max_tokens"]], "logprobs": [-0.5, -0.25, -1.0][: row["max_tokens"]]})'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads 32 wide: vLLM on a CPU serves none that are narrower."""
    return make_tiny_policy(tmp_path_factory.mktemp("policy") / "sft", seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def stand_in(tmp_path):
    """A program in place of vLLM's Python, as settings."""

    def make(answer=ECHO, loaded='{"vllm": "0", "dtype": wanted["dtype"]}', missing=0, **settings):
        path = tmp_path / "python"
        path.write_text(CHILD.format(python=sys.executable, answer=answer, loaded=loaded, missing=missing), encoding="utf-8")
        path.chmod(0o755)
        return SamplingSettings(**{"engine": "vllm", "max_new_tokens": 12, "vllm": {"python": str(path)}, **settings})

    return make


def _requests(count=2, first=0):
    return [Request(Prompt.of(t, "train"), tuple((1000 * i + first + j) << 11 for j in range(count))) for i, t in enumerate(TEXTS)]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_are_read_in_order_with_their_ends(folder, stand_in):
    engine = load_engine(folder, stand_in(), "none")
    samples = engine.draw(_requests())
    assert [(s.prompt.content, s.index) for s in samples] == [(t, i) for t in TEXTS for i in range(2)]
    assert {s.finish_reason for s in samples} == {"eos"} and {s.tokens for s in samples} == {3} and samples[0].logprob == -1.75
    assert samples[0].completion != samples[1].completion  # each row has its own seed
    assert engine.settled == {"vllm": "0", "dtype": "auto"} and engine.name == "vllm" and engine.halvings == 0 and engine.usage == {}
    cut = load_engine(folder, stand_in(max_new_tokens=2), "none").draw(_requests())
    assert {s.finish_reason for s in cut} == {"length"} and cut[0].logprob == -0.75


def test_what_an_earlier_part_settled_on_holds(folder, stand_in):
    assert load_engine(folder, stand_in(), "none", {"vllm": "0", "dtype": "bfloat16"}).settled["dtype"] == "bfloat16"


def test_a_pool_is_stored_and_its_process_ends(folder, stand_in, tmp_path):
    told = tmp_path / "pid"
    settings = stand_in(answer=f'open({str(told)!r}, "w").write(str(os.getpid())); {ECHO}', part_prompts=2)
    wanted = [(Prompt.of(t, "test"), 3) for t in TEXTS]
    statistics = draw_pool(folder, wanted, settings, chat_template="none", folder=tmp_path / "pool", seed=7, name="sft")
    assert statistics["samples"] == len(read_pool(tmp_path / "pool")) == 15 and statistics["settled"]["vllm"] == "0"
    assert not _alive(int(told.read_text()))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"answer": "print('no room', file=sys.stderr); os.kill(os.getpid(), 9)"},
            "vLLM ended before its answers: killed by SIGKILL, no room",
        ),
        ({"answer": "sys.exit(3)"}, "exit code 3"),
        ({"answer": 'say({"error": "ValueError: too long"})'}, "vLLM ended before its answers: ValueError: too long"),
        ({"loaded": '{"error": "RuntimeError: no such model"}'}, "RuntimeError: no such model"),
    ],
)
def test_a_process_that_fails_is_one_clear_error(folder, stand_in, changed, said):
    with pytest.raises(ModelError, match=r"sampling\.vllm\.args") as error:
        load_engine(folder, stand_in(**changed), "none").draw(_requests())
    assert said in error.value.what


def test_values_that_are_not_finite_are_an_error(folder, stand_in):
    with pytest.raises(ModelError, match="not finite"):
        load_engine(folder, stand_in(answer=ECHO.replace("-0.25", "float('nan')")), "none").draw(_requests())


def test_a_prompt_without_room_is_an_error(folder, stand_in):
    with pytest.raises(DataError, match="leaves no room"):
        load_engine(folder, stand_in(), "none").draw([Request(Prompt.of("the cat " * 40, "train"), (1,))])


def test_vllm_is_looked_for_before_anything_is_computed(stand_in, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(ConfigError, match="vLLM is not installed in") as error:
        check_engine(stand_in(missing=1))
    assert error.value.where == "sampling.vllm.python" and "pip install vllm" in error.value.do
    with pytest.raises(ConfigError, match="there is no Python at /nowhere"):
        check_engine(SamplingSettings(engine="vllm", vllm={"python": "/nowhere"}))
    check_engine(found := stand_in())
    monkeypatch.setenv(PYTHON, found.vllm.python)
    check_engine(SamplingSettings(engine="vllm"))


def test_the_place_of_vllm_is_no_part_of_what_samples_depend_on():
    one, other = (SamplingSettings(engine="vllm", vllm={"python": p, "args": {"seed": 1}}).identity for p in ("a", "b"))
    assert one == other and one["vllm"] == {"args": {"seed": 1}}
    assert "vllm" not in SamplingSettings(vllm={"python": "a"}).identity


@pytest.fixture(scope="module")
def real(folder):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return load_engine(folder, SamplingSettings(engine="vllm", max_new_tokens=12, batch_size=16), "none")


def _drawn(samples):
    return [(s.prompt.content, s.index, s.completion, s.finish_reason, s.tokens) for s in samples]


@pytest.mark.vllm
def test_vllm_draws_as_the_engine_in_process_does(folder, real):
    """With one token to choose from: the same answers, ends and log-probabilities. Then seeds, and the end of the process."""
    settings = {"max_new_tokens": 12, "top_k": 1, "dtype": "float32"}
    ours = load_engine(folder, SamplingSettings(**settings), "none").draw(_requests(1))
    real.settings = SamplingSettings(engine="vllm", **settings)
    theirs = real.draw(_requests(1))
    assert _drawn(theirs) == _drawn(ours) and [s.logprob for s in theirs] == pytest.approx([s.logprob for s in ours], abs=1e-3)

    real.settings = SamplingSettings(engine="vllm", max_new_tokens=12)
    first, again, other = real.draw(_requests(4)), real.draw(_requests(4)), real.draw(_requests(4, first=77))
    assert _drawn(first) == _drawn(again) and _drawn(other) != _drawn(first)
    assert len({s.completion for s in first}) > 10 and {s.finish_reason for s in first} == {"eos", "length"}
    assert real.settled["dtype"] in ("float32", "bfloat16") and real.settled["vllm"]

    pid = real.child.process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ModelError, match="vLLM ended before its answers: killed by SIGKILL"):
        real.draw(_requests(1))
    assert not _alive(pid)


@pytest.mark.vllm
def test_a_pool_by_vllm_with_a_stop_string_and_its_process_gone(folder, tmp_path):
    settings = SamplingSettings(engine="vllm", max_new_tokens=24, stop=["."], vllm={"args": {"max_num_batched_tokens": 256}})
    before = _children()
    draw_pool(
        folder, [(Prompt.of(t, "test"), 8) for t in TEXTS], settings, chat_template="none", folder=tmp_path / "pool", seed=7, name="sft"
    )
    gc.collect()
    samples = read_pool(tmp_path / "pool")
    assert len(samples) == 40 and not any("." in s.completion for s in samples)
    assert "stop" in {s.finish_reason for s in samples} and all(s.tokens <= 24 for s in samples) and _children() == before


@pytest.mark.vllm
@pytest.mark.parametrize("peft", [False, True])
def test_a_policy_that_a_method_trained_answers_in_vllm_too(folder, tmp_path, peft):
    """What `Tuning` saves for every method, merged adapters among it: the same answers there and here, and others than before."""
    prompts = [Prompt.of(text, "train") for text in TEXTS]
    won = [Sample(prompt, 0, " and sang on the mat.", "eos", 6, -1.0) for prompt in prompts]
    settings = TrainerSettings(learning_rate=1e-2, num_train_epochs=6, use_peft=peft, lora_r=4)
    places = {"folder": tmp_path / "aligned", "checkpoints": tmp_path / "checkpoints"}
    dev = [Demonstration(prompts[0], " and sang on the mat.")]
    train_distill(folder, won, dev, settings, chat_template="none", seed=0, report_to="none", **places)

    def drawn(policy, engine):
        return load_engine(policy, SamplingSettings(engine=engine, max_new_tokens=12, top_k=1, dtype="float32"), "none").draw(_requests(1))

    theirs, ours = drawn(places["folder"], "vllm"), drawn(places["folder"], "transformers")
    assert _drawn(theirs) == _drawn(ours) != _drawn(drawn(folder, "transformers"))
    assert [s.logprob for s in theirs] == pytest.approx([s.logprob for s in ours], abs=1e-3)


def _children():
    return {p for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()}

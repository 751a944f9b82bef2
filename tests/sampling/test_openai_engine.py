"""Sampling through an endpoint, against a real server: order, seeds, ends, log-probabilities, resume, and the key in no file."""

import json
import os
import random
import signal

import pytest
from openai_server import Server, completion, error
from small import small_recipe
from tiny import make_tiny_policy

from irlign import endpoint
from irlign.config import load_recipe
from irlign.endpoint import Malformed
from irlign.errors import ConfigError, DataError, ModelError
from irlign.files import read_table
from irlign.pipeline import run
from irlign.preflight import preflight
from irlign.recipe import Recipe
from irlign.records import Prompt, Sample, mean_logprobs
from irlign.runs import request_seed
from irlign.sampling.engine import Request, SamplingSettings, load_engine
from irlign.sampling.openai_engine import OpenAIEngine, read_answer
from irlign.sampling.pools import DRAWN, draw_pool, read_pool

KEY = "sk-secret-0123456789"
PROMPTS = [Prompt.of(f"question {i}", ("train", "dev", "test")[i % 3]) for i in range(6)]
CHAT = Prompt.of(({"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}), "train")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def _settings(server, own=None, **settings):
    there = {"base_url": server.url, "policies": {"sft": "served"}, **(own or {})}
    return SamplingSettings(**{"engine": "openai", "max_new_tokens": 8, "part_prompts": 2, "openai": there, **settings})


def _draw(server, folder, own=None, *, seed=7, **settings):
    wanted = [(p, 3) for p in PROMPTS]
    return draw_pool(folder / "sft", wanted, _settings(server, own, **settings), chat_template="none", folder=folder / "pool", seed=seed, name="sft")  # fmt: skip


def test_a_pool_in_order_with_seeds_and_usage(tmp_path):
    with Server(delay=0.01) as server:
        statistics = _draw(server, tmp_path, {"price_in": 1.0, "price_out": 10.0})
    rows = read_table(tmp_path / "pool")
    seeds = {(p.prompt_id, i): request_seed(7, "sample-sft", p.prompt_id, i) for p in PROMPTS for i in range(3)}
    order = sorted(seeds, key=lambda key: (next(p.split for p in PROMPTS if p.prompt_id == key[0]), key))
    assert [(r["prompt_id"], r["index"]) for r in rows] == order
    assert [r["completion"] for r in rows] == [f"{r['prompt']}/{seeds[r['prompt_id'], r['index']] >> 11}" for r in rows]
    assert {r["logprob"] for r in rows} == {-1.5} and {r["engine"] for r in rows} == {"openai"} and len(server.bodies) == 18
    assert statistics["usage"] == pytest.approx({"prompt_tokens": 180, "completion_tokens": 54, "cost": (180 + 540) / 1e6})
    assert statistics["settled"] == {"model": "served", "endpoint": "chat", "limit": "max_tokens", "left_out": []}
    assert [path.name for path in sorted((tmp_path / "pool").iterdir())] == [f"part-0000{i}.parquet" for i in range(3)]
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "pool").iterdir())


def test_what_is_sent(tmp_path):
    request = [Request(PROMPTS[0], (1 << 63,)), Request(CHAT, (5,))]
    with Server() as server:
        load_engine(tmp_path / "sft", _settings(server, stop=["\n"], temperature=0.7, top_k=5), "none").draw(request)
        load_engine(tmp_path / "sft", _settings(server), "none").draw(request[:1])
    law = {"model": "served", "max_tokens": 8, "temperature": 0.7, "top_p": 1.0, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0}
    sent = sorted(server.bodies[:2], key=lambda body: len(body["messages"]))
    assert sent[0] == {**law, "messages": [{"role": "user", "content": "question 0"}], "seed": 1 << 52, "stop": ["\n"]}
    assert sent[1]["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert server.bodies[2]["logprobs"] is True and server.bodies[2]["top_k"] == -1 and "stop" not in server.bodies[2]


def test_completions_get_the_tokens_of_the_runs_own_template(tmp_path):
    policy = make_tiny_policy(tmp_path / "sft")
    own = {"endpoint": "completions"}
    said = lambda n, body: (200, {}, completion(body, " a dog."))  # noqa: E731
    with Server(said) as server:
        with_template = load_engine(policy, _settings(server, own), "hh").draw([Request(CHAT, (1,))])
        plain = load_engine(tmp_path / "elsewhere/sft", _settings(server, own), "none")
        plain.draw([Request(PROMPTS[0], (1,))])
        with pytest.raises(DataError, match="is a conversation"):
            plain.draw([Request(CHAT, (1,))])
    assert server.paths == ["/v1/completions"] * 2 and server.bodies[1]["prompt"] == "question 0"
    ids = server.bodies[0]["prompt"]
    assert ids[0] == 1 and all(isinstance(i, int) for i in ids) and server.bodies[0]["logprobs"] == 1
    assert with_template == [Sample(CHAT, 0, "a dog.", "eos", 3, -1.5)]  # the space belongs to the template, as in training


def test_a_field_that_the_endpoint_does_not_know_is_left_out_and_recorded(tmp_path):
    def answer(n, body):
        if "max_tokens" in body:
            return 400, {}, error("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        unknown = [name for name in ("top_k", "min_p", "repetition_penalty", "logprobs", "seed") if name in body]
        return (400, {}, error(f"Unrecognized request argument supplied: {unknown[0]}")) if unknown else (200, {}, completion(body))

    with Server(answer) as server:
        statistics = _draw(server, tmp_path, {"max_retries": 0})
        assert statistics["settled"]["limit"] == "max_completion_tokens" and "seed" in statistics["settled"]["left_out"]
        (tmp_path / "pool/part-00002.parquet").unlink()
        before = len(server.bodies)
        _draw(server, tmp_path, {"max_retries": 0})
    assert len(server.bodies) - before == 6  # a resume knows what to leave out
    assert {r["logprob"] for r in read_table(tmp_path / "pool")} == {None}
    with Server(answer) as server, pytest.raises(ModelError, match="top_k"):
        _draw(server, tmp_path / "other", top_k=5)  # this one is the law itself


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (True, "'max_tokens' or 'max_completion_tokens' is too large: 8. This model's context is 4 tokens"),
        (True, "max_completion_tokens is unsupported"),
        (False, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    ],
)
def test_another_refusal_that_mentions_the_limit_leaves_its_field(tmp_path, chat, said):
    own = {} if chat else {"endpoint": "completions"}
    with Server(lambda n, body: (400, {}, error(said))) as server, pytest.raises(ModelError, match="refuses the request"):
        _draw(server, tmp_path, {"max_retries": 0, "max_concurrency": 1, **own})
    assert [("max_tokens" in body, "max_completion_tokens" in body) for body in server.bodies] == [(True, False)]


@pytest.mark.parametrize("after", [1, 8, 18])
def test_a_killed_draw_asks_for_nothing_twice(tmp_path, monkeypatch, after):
    """A process that SIGKILL ends right after so many answers, a torn line behind them; what is taken up is the pool of one go."""
    left, real = [after], OpenAIEngine._bill

    def bill(self, *answers):
        left[0] -= 1 if answers else 0
        return os.kill(os.getpid(), signal.SIGKILL) if left[0] == 0 else real(self, *answers)

    with Server() as server:
        whole = _draw(server, tmp_path / "whole")
        server.bodies.clear()
        if (child := os.fork()) == 0:
            monkeypatch.setattr(OpenAIEngine, "_bill", bill)
            _draw(server, tmp_path, {"max_concurrency": 1})
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and len(server.bodies) == after
        with (tmp_path / "pool" / DRAWN).open("a") as file:
            file.write('\n{"key": "torn')
        assert _draw(server, tmp_path) == whole
    seen = [(b["messages"][0]["content"], b["seed"]) for b in server.bodies]
    assert len(seen) == len(set(seen)) == 18
    assert read_pool(tmp_path / "pool") == read_pool(tmp_path / "whole/pool")
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == [f"part-0000{i}.parquet" for i in range(3)]


def test_a_finished_pool_asks_nothing(tmp_path):
    with Server() as server:
        statistics = _draw(server, tmp_path)
        (tmp_path / "pool" / DRAWN).write_text("left by a process that was killed after its last part")
        assert _draw(server, tmp_path) == statistics and len(server.bodies) == 18
    assert not (tmp_path / "pool" / DRAWN).exists()


def test_the_key_is_in_no_file_and_no_error(tmp_path):
    def answer(n, body):
        return (200, {}, completion(body)) if n < 4 else (400, {}, error(f"the key {KEY} is fine, the prompt is not"))

    with Server(answer) as server, pytest.raises(ModelError, match="the prompt is not") as caught:
        _draw(server, tmp_path, {"max_concurrency": 1})
    assert KEY not in str(caught.value) and (tmp_path / "pool" / DRAWN).is_file()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def _choice(**choice):
    return {"choices": [{"finish_reason": "stop", "text": "x", **choice}], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}


def test_how_an_answer_ends():
    assert read_answer(_choice(), [], "p").finish_reason == "eos"
    assert read_answer(_choice(finish_reason="length"), [], "p").finish_reason == "length"
    assert read_answer(_choice(stop_reason="\n"), ["\n"], "p").finish_reason == "stop"
    assert read_answer(_choice(stop_reason=7), ["\n"], "p").finish_reason == "eos"  # a token that ends, not a string
    with pytest.raises(DataError, match="content filter") as caught:
        read_answer(_choice(finish_reason="content_filter"), [], "prompt 12ab")
    assert "prompt 12ab" in str(caught.value) and "take the prompt out" in str(caught.value)


def test_log_probabilities_of_all_tokens_or_none():
    assert read_answer(_choice(logprobs={"token_logprobs": [-1.0, -0.25]}), [], "p").logprob == -1.25
    assert read_answer(_choice(logprobs={"content": [{"logprob": -1.0}, {"logprob": -2.0}]}), [], "p").logprob == -3.0
    for partial in (None, {}, {"content": None}, {"token_logprobs": [-1.0]}, {"token_logprobs": [None, -1.0]}):
        assert read_answer(_choice(logprobs=partial), [], "p").logprob is None


def test_a_tempered_law_keeps_no_log_probability(tmp_path):
    with Server(lambda n, body: (200, {}, completion({**body, "logprobs": True}))) as server:
        _draw(server, tmp_path, temperature=0.8)
    assert {r["logprob"] for r in read_table(tmp_path / "pool")} == {None} and "logprobs" not in server.bodies[0]


@pytest.mark.parametrize(
    "body",
    ["busy", None, {}, {"choices": []}, {"error": {"message": "x"}}, _choice(finish_reason=None), {**_choice(), "usage": None}, _choice(text=3)],
)  # fmt: skip
def test_malformed_answers(body):
    with pytest.raises(Malformed):
        read_answer(body, [], "p")


def test_an_unknown_log_probability_is_none_downstream():
    known, unknown = (Sample(PROMPTS[0], 0, "x", "eos", 2, value) for value in (-1.0, None))
    assert mean_logprobs([known, known]).tolist() == [-0.5, -0.5] and mean_logprobs([known, unknown]) is None
    assert Sample.from_row(unknown.to_row()) == unknown


def test_what_identifies_the_samples():
    own = {"base_url": "http://a/v1", "policies": {"init": "a", "sft": {"model": "b", "base_url": "http://b/v1"}}}
    settings = SamplingSettings(engine="openai", openai=own)
    same = SamplingSettings(engine="openai", batch_size=3, openai={**own, "timeout_s": 9, "price_in": 2, "max_concurrency": 1})
    assert settings.identity == same.identity and json.dumps(settings.identity)
    assert settings.identity != SamplingSettings(engine="openai", openai={**own, "policies": {"init": "a", "sft": "c"}}).identity
    assert SamplingSettings(openai=own).identity == SamplingSettings().identity  # not this engine
    assert SamplingSettings(batch_size=3).identity != SamplingSettings().identity
    assert settings.openai.served("sft").base_url == "http://b/v1" and settings.openai.served("init").model == "a"


def test_a_policy_without_a_model_is_found_before_any_compute():
    given = ["world=dialogue", "sampling.engine=openai", "sampling.openai.base_url=http://localhost:1/v1"]
    with pytest.raises(ConfigError, match="which model at the endpoint is init"):
        preflight(load_recipe(Recipe, None, given))
    given += ["sampling.openai.policies={init: a, sft: b}"]
    preflight(load_recipe(Recipe, None, given))
    with pytest.raises(ConfigError, match=r"which model at the endpoint is sft-0\.5"):
        preflight(load_recipe(Recipe, None, [*given, "sft.keep_checkpoints=[0.5]"]))
    with pytest.raises(ConfigError, match="no address"):
        preflight(load_recipe(Recipe, None, [*given, "sampling.openai.base_url=null"]))


def test_a_whole_run_through_an_endpoint(tmp_path):
    """Both pools from two models of one server, without log-probabilities: every later stage runs, and the key is in no file."""

    def answer(n, body):
        good = ["Please check the brakes.", "Then oil the chain.", "Now pump the tyres.", "I hope it helps."]
        said = good if body["model"] == "better" else ["No idea.", "Ask someone else."]
        rng = random.Random(f"{body['messages']} {body['seed']}")
        return 200, {}, completion(body, " ".join(rng.sample(said, rng.randint(1, len(said)))))

    with Server(answer) as server:
        own = {"engine": "openai", "temperature": 0.9, "openai": {"base_url": server.url, "policies": {"init": "base", "sft": "better"}}}
        results = run(small_recipe(tmp_path / "run", sampling=own))
        asked = len(server.bodies)
        run(small_recipe(tmp_path / "run", sampling={**own, "openai": {**own["openai"], "price_out": 3.0, "max_retries": 1}}))
    assert asked == len(server.bodies) == 2 * 24 * 2 + 28 * 2 + 28 * 4  # a price draws nothing again
    assert results["heldout"]["outlier_picks"] is None and not any("outlier" in a["name"] for a in results["alarms"])
    notes = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["sample"]["notes"]
    assert notes["sft"]["settled"]["model"] == "better" and notes["init"]["usage"]["prompt_tokens"] == 10 * notes["init"]["samples"]
    page = (tmp_path / "run/report.html").read_text()
    assert "outliers under SFT" not in page
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

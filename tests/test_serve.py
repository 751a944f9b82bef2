"""The server over loopback with the official client: what it answers is what the run selects, and what it cannot serve it refuses."""

import asyncio
import concurrent.futures
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import openai
import openai_server
import pytest
import torch
from served import serving
from small import small_recipe
from tiny import make_tiny_policy

from irlign.cli import main
from irlign.data.chat import Format
from irlign.errors import ConfigError, RunError
from irlign.files import read_json, read_table, write_json
from irlign.optimise.best_of_n import select
from irlign.optimise.distill import winners
from irlign.pipeline import run_stage
from irlign.policy.load import load_tokenizer
from irlign.recipe import as_recipe
from irlign.records import Prompt
from irlign.reward.contrasts import ended
from irlign.reward.load import load_reward
from irlign.reward.log_ratio import LogRatio
from irlign.runs import Run, request_seed
from irlign.sampling.engine import Request, SamplingSettings, check_engine, load_engine
from irlign.serve import PATHS, Limits, Wanted, bind, startup
from irlign.serving.answers import Answerer, Served
from irlign.serving.load import load_answerer, one_core, what_is_served
from irlign.serving.protocol import Chat

MOST = 2  # the label-free n that the run is given here; it drew 4 candidates of each prompt
REWARD = "init-sft+likelihood"
ALARM = {"name": "length", "seen": "the reward follows length", "do": "look at it"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run up to its evaluation, whose judge would take two answers, so it says, and whose evaluation saw an alarm."""
    folder = run_stage("eval", small_recipe(tmp_path_factory.mktemp("served") / "run", optimise={"method": "none"}))
    for path, changes in {
        "best_of_n/choice.json": {"reward": REWARD, "n": MOST, "label_free": MOST},
        "evaluation/results.json": {"alarms": [ALARM]},
    }.items():
        write_json(folder / path, {**read_json(folder / path), **changes})
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture(scope="module")
def client(finished):
    with serving(load_answerer(finished)) as (_, client):
        yield client


@pytest.fixture(scope="module")
def prompts(finished):
    return list(dict.fromkeys(row["prompt"] for row in read_table(finished / "data/test.parquet")))


def _asked(text, **more):
    return {"model": "best-of-n", "messages": [{"role": "user", "content": text}], **more}


def _refused(client, status, words, text="How do I fix my bike?", **more):
    """A chat that is refused with this status, for a reason that holds these words."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**_asked(text, **more))
    error = caught.value
    assert (error.status_code, set(error.body)) == (status, {"message", "type", "param", "code"})
    assert words in error.body["message"] and "Traceback" not in error.response.text
    return error


def _get(client, path):
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", path)) as answer:
        return answer.read().decode()


def test_a_chat_is_answered_as_bon_selects(finished, client):
    """With the run's own seed the served answer is the one that selection among the stored candidates gives, with its reward."""
    for row in select(read_table(finished / "best_of_n/candidates.parquet"), REWARD, MOST)[:6]:
        answer = client.chat.completions.create(**_asked(row["prompt"]), seed=0)
        (choice,) = answer.choices
        assert choice.message.content == row["completion"] and choice.irlign["index"] == row["index"]
        assert choice.irlign["reward"] == pytest.approx(row["reward"], abs=1e-4)
        assert choice.finish_reason == ("length" if row["finish_reason"] == "length" else "stop")
        assert answer.irlign["best_of"] == MOST == answer.irlign["candidates"] and answer.irlign["as_measured"] is True
        assert answer.irlign["alarms"] == [ALARM] and answer.irlign["reward"] == REWARD and answer.usage.total_tokens > 2


def test_n_best_of_and_seeds(client, prompts):
    """n answers are each the best of their own candidates; with best_of they are the best of so many. A seed repeats all of them."""
    four = client.chat.completions.create(**_asked(prompts[0], n=4, seed=5))
    assert [c.index for c in four.choices] == [0, 1, 2, 3] and four.irlign["candidates"] == 4 * MOST
    assert [c.irlign["index"] // MOST for c in four.choices] == [0, 1, 2, 3]
    again = client.chat.completions.create(**_asked(prompts[0], n=4, seed=5))
    assert [c.message.content for c in again.choices] == [c.message.content for c in four.choices]
    other = client.chat.completions.create(**_asked(prompts[0], n=4))
    assert other.irlign["seed"] != 5 and [c.message.content for c in other.choices] != [c.message.content for c in four.choices]

    both = client.completions.create(model="best-of-n", prompt=prompts[0], n=2, best_of=2, seed=5)
    rank = [(c.finish_reason == "stop", c.irlign["reward"]) for c in both.choices]
    assert rank == sorted(rank, reverse=True) and both.choices[0].text == four.choices[0].message.content
    assert both.usage.completion_tokens == both.irlign["drawn_tokens"] and sorted(c.irlign["index"] for c in both.choices) == [0, 1]


def test_an_answer_does_not_depend_on_what_else_is_asked(client, prompts):
    def one(i):
        return client.chat.completions.create(**_asked(prompts[i % 4], seed=i, max_tokens=20 - i)).choices[0].message.content

    alone = [one(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == alone


def test_a_stream_says_what_the_whole_answer_says(client, prompts):
    seen = 0
    for i, stop in enumerate([None, ".", ["the", "a b"], None]):
        asked = _asked(prompts[i], seed=i, stop=stop, extra_body={"best_of": 1})
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert "".join(texts) == whole.choices[0].message.content and chunks[0].choices[0].delta.role == "assistant"
        end = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
        assert end.choices[0].finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage
        assert end.choices[0].irlign["reward"] == pytest.approx(whole.choices[0].irlign["reward"], abs=1e-4)
        seen = max(seen, len(texts))
    assert seen > 1  # it did arrive in parts
    picked = list(client.completions.create(model="best-of-n", prompt=prompts[0], seed=0, stream=True))
    whole = client.completions.create(model="best-of-n", prompt=prompts[0], seed=0)
    assert "".join(c.choices[0].text for c in picked) == whole.choices[0].text and len(picked) == 2  # whole, once it is selected


def test_log_probabilities_of_the_drawn_tokens(client, prompts):
    chat = client.chat.completions.create(**_asked(prompts[0], logprobs=True, seed=1, extra_body={"best_of": 1}))
    tokens = chat.choices[0].logprobs.content
    assert "".join(t.token for t in tokens).strip() == chat.choices[0].message.content.strip()
    assert (
        sum(t.logprob for t in tokens) == pytest.approx(chat.choices[0].irlign["logprob"]) and len(tokens) == chat.usage.completion_tokens
    )
    text = client.completions.create(model="best-of-n", prompt=prompts[0], logprobs=1, seed=1, extra_body={"best_of": 1})
    assert text.choices[0].logprobs.token_logprobs == pytest.approx([t.logprob for t in tokens])


def test_temperature_zero_is_the_likeliest_answer(client, prompts):
    answers = [client.chat.completions.create(**_asked(prompts[1], temperature=0, seed=s)) for s in (1, 2)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].irlign["candidates"] == 1 and answers[0].irlign["as_measured"] is False


def test_score_is_what_the_reward_model_scores(finished, client, prompts):
    texts = [" Please check the brakes.", " No idea", "", " a b c."]
    data = client.post("/score", body={"prompt": prompts[0], "completion": texts}, cast_to=object)["data"]
    expected = load_reward(finished / "rewards" / REWARD).score([prompts[0]] * 4, texts)
    assert [d["reward"] for d in data] == pytest.approx(expected.tolist(), abs=1e-4) and len(set(expected)) > 2
    one = {"messages": [{"role": "user", "content": prompts[0]}], "completion": texts[0], "model": REWARD}
    assert client.post("/score", body=one, cast_to=object)["data"][0]["reward"] == pytest.approx(expected[0], abs=1e-4)
    for wrong, words in (
        ({**one, "prompt": "x"}, "either a prompt or messages"),
        ({**one, "completion": []}, "between 1 and 128"),
        ({**one, "model": "x"}, "does not exist"),
    ):
        with pytest.raises(openai.APIStatusError, match=words):
            client.post("/score", body=wrong, cast_to=object)


REFUSED = {
    "more than the judge would take": ({"extra_body": {"best_of": 4}}, 400, "n = 4 is more than the judge of held-out demonstrations would take, 2"),
    "more answers than candidates": ({"n": 2, "extra_body": {"best_of": 1}}, 400, "n = 2 is more than best_of = 1"),
    "an unknown model": ({"model": "gpt-x"}, 404, "the model 'gpt-x' does not exist; here 'best-of-n' is served"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not served here"),
    "a bias": ({"logit_bias": {"5": 3}}, 400, "logit_bias is not served here"),
    "a format": ({"response_format": {"type": "json_object"}}, 400, "response_format is not served here"),
    "alternatives": ({"logprobs": True, "top_logprobs": 3}, 400, "top_logprobs is not served here"),
    "a field nobody knows": ({"extra_body": {"colour": "red"}}, 400, "colour is not served here"),
    "a wrong type": ({"temperature": "hot"}, 400, "temperature: input should be a valid number"),
    "a temperature out of range": ({"temperature": 9}, 400, "temperature: input should be less than or equal to 2"),
    "too many tokens": ({"max_tokens": 5000}, 400, "at most 4096 tokens"),
    "too many answers": ({"n": 100}, 400, "200 answers would be drawn, and a request may ask for 128"),
    "log-probabilities in a stream": ({"logprobs": True, "stream": True}, 400, "logprobs are not served in a stream"),
    "a prompt too long": ({"text": "bike " * 400}, 400, "the model reads"),
    "a prompt too long for a stream": ({"text": "bike " * 400, "stream": True}, 400, "the model reads"),
    "a picture": ({"text": [{"type": "image_url", "image_url": {"url": "x"}}]}, 400, "only parts of the type text are read"),
    "a tool's message": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "role"),
    "an answer to go on with": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, 400, "answers are not continued"),
    "turns without a template": ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, 400, "no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused(client, case):
    more, status, words = REFUSED[case]
    _refused(client, status, words, **more)


def test_what_asks_for_nothing_is_accepted(client):
    neutral = {"tools": [], "logit_bias": {}, "frequency_penalty": 0, "response_format": {"type": "text"}, "user": "u", "store": False}
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "fix my bike?"}]
    answer = client.chat.completions.create(**_asked(parts, seed=3, extra_body={**neutral, "min_p": 0.0, "top_k": -1, "seed": 3}))
    assert (
        answer.choices[0].message.content
        == client.chat.completions.create(**_asked("How do I fix my bike?", seed=3)).choices[0].message.content
    )


@pytest.mark.parametrize(
    ("raw", "status"), [(b"{", 400), (b"[]", 400), (b"[" * 9999, 400), (b'{"model": "best-of-n", "messages": [{"role": "user", "content": "\\ud83d"}]}', 400), (b" " * 3000, 413)]
)  # fmt: skip
def test_bodies_that_are_no_requests(finished, raw, status):
    with serving(load_answerer(finished), Limits(body=2000)) as (_, client):
        chunked = iter([raw])  # without a length in front
        for body in (raw, chunked):
            with pytest.raises(openai.APIStatusError) as caught:
                client.post("/chat/completions", content=body, cast_to=object)
            if len(raw) < 2000 or status == 413:
                assert caught.value.status_code == status and caught.value.body["type"] == "invalid_request_error"


def test_models_health_and_metrics(client):
    assert [m.id for m in client.models.list()] == ["best-of-n"] and client.models.retrieve("best-of-n").irlign["most_best_of"] == MOST
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert json.loads(_get(client, "/health")) == {"status": "ok", "model": "best-of-n", "waiting": 0}
    client.chat.completions.create(**_asked("How do I fix my bike?"))
    text = _get(client, "/metrics")
    counted = float(re.search(r'irlign_requests_total{path="/v1/chat/completions",status="200"} (\S+)', text)[1])
    drawn, returned = (float(re.search(rf'irlign_tokens_total{{kind="{kind}"}} (\S+)', text)[1]) for kind in ("drawn", "returned"))
    assert counted >= 1 and drawn > returned > 0 and "irlign_waiting_requests 0.0" in text


def test_the_openapi_document_is_what_is_read(client):
    """Every path of the server, every reference whole; a method that is not served is told which are."""
    text = _get(client, "/openapi.json")
    document = json.loads(text)
    assert set(document["paths"]) == {path for path in PATHS if path not in ("/metrics", "/openapi.json")}
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= set(document["components"]["schemas"])
    assert {field for field in Chat.model_fields} <= set(document["components"]["schemas"]["Chat"]["properties"])
    request = urllib.request.Request(f"{client.base_url}score", method="DELETE")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 405 and caught.value.headers["allow"] == "POST"


def test_the_key(finished):
    with serving(load_answerer(finished), key="secret-1") as (_, client):
        assert client.models.list().data[0].id == "best-of-n" and "ok" in _get(client, "/health")
        for wrong in ("secret-2", "", "sécret"):
            request = urllib.request.Request(
                f"{client.base_url}models", headers={"authorization": f"Bearer {wrong}".encode("latin-1").decode("latin-1")}
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert caught.value.code == 401 and json.load(caught.value)["error"]["code"] == "invalid_api_key"


class Gate:
    """Before an answerer: its turns do nothing until they are let pass. `seeds` are those of the asks that began, `works` what they went to."""

    def __init__(self, answerer):
        self.begun, self.go_on, self.seeds, self.works = threading.Event(), threading.Event(), [], []
        self.real, answerer.begin = answerer.begin, self.begin

    def begin(self):
        self.works.append(Held(self, self.real()))
        return self.works[-1]


class Held:
    def __init__(self, gate, work):
        self.gate, self.work, self.drop = gate, work, work.drop

    def add(self, number, item):
        self.gate.seeds.append(item.seed)
        self.work.add(number, item)

    def turn(self):
        self.gate.begun.set()
        return self.work.turn() if self.gate.go_on.wait(0.01) else []


def _until(true, seconds=60):
    for _ in range(100 * seconds):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")


def test_an_overload_is_refused_and_loses_nothing(finished):
    """One request is worked on and two wait: the fourth is told to come back, and all that were accepted are answered."""
    answerer = load_answerer(finished)
    gate = Gate(answerer)
    with serving(answerer, Limits(waiting=2, batch=1)) as (server, client), concurrent.futures.ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(client.chat.completions.create, **_asked("How do I fix my bike?", seed=0))]
        assert gate.begun.wait(30)
        accepted += [pool.submit(client.chat.completions.create, **_asked("How do I fix my bike?", seed=i)) for i in (1, 2)]
        _until(lambda: server.batches.waiting == 2)
        error = _refused(client, 429, "too many requests")
        assert int(error.response.headers["retry-after"]) >= 1 and error.code == "overloaded"
        assert "irlign_running_requests 1.0" in _get(client, "/metrics")
        gate.go_on.set()
        assert all(f.result().choices[0].message.content for f in accepted)


def test_a_client_that_leaves_before_its_turn_is_not_worked_for(finished):
    answerer = load_answerer(finished)
    gate = Gate(answerer)
    with serving(answerer, Limits(batch=1)) as (server, client), concurrent.futures.ThreadPoolExecutor(2) as pool:
        kept = pool.submit(client.chat.completions.create, **_asked("How do I fix my bike?", seed=1))
        assert gate.begun.wait(30)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(**_asked("How do I fix my bike?", seed=2))
        _until(lambda: 'status="499"' in server.metrics.text().decode())
        last = pool.submit(client.chat.completions.create, **_asked("How do I fix my bike?", seed=3))
        _until(lambda: server.batches.waiting)
        gate.go_on.set()
        assert kept.result() and last.result() and gate.seeds == [1, 3]


@pytest.mark.parametrize("more", [{}, {"stream": True, "extra_body": {"best_of": 1}}], ids=["whole", "stream"])
def test_a_client_that_leaves_while_its_answers_are_drawn_frees_their_rows(finished, more, caplog):
    """What was beside it goes on and is answered; nothing was finished in the meantime, so that its rows can only have been dropped."""
    answerer = load_answerer(finished)
    gate = Gate(answerer)
    with serving(answerer) as (server, client), concurrent.futures.ThreadPoolExecutor(1) as pool:
        kept = pool.submit(client.chat.completions.create, **_asked("How do I fix my bike?", seed=1))
        assert gate.begun.wait(30)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(**_asked("How do I fix my bike?", seed=2, **more))
        _until(lambda: gate.seeds == [1, 2] and server.batches.running == 1)
        (held,) = gate.works
        assert len(held.work.asks) == len(held.work.drawing.open) == 1 and len(held.work.drawing.decoder.waiting) == MOST
        gate.go_on.set()
        assert kept.result().choices[0].message.content
    gc.collect()
    assert "never retrieved" not in caplog.text  # that it left is no error


def test_best_of_n_over_an_upstream(finished, prompts):
    """The upstream draws, the run's reward selects: the answer with the highest reward, with the upstream's own count of tokens."""
    said = [" Please check the brakes. Then oil the chain.", " No idea.", " Now pump the tyres. I hope it helps.", " Ask someone else."]
    prompt = prompts[0]

    def text_of(seed):
        return said[seed % 4]

    with openai_server.Server(lambda n, body: (200, {}, openai_server.completion(body, text_of(body["seed"])))) as upstream:
        with serving(load_answerer(finished, Wanted(upstream=upstream.url, upstream_model="served", force=True))) as (server, client):
            answer = client.chat.completions.create(**_asked(prompt, seed=7, temperature=0.5, max_tokens=9, extra_body={"best_of": 4}))
            _refused(client, 400, "logprobs are not served where answers come from an upstream", logprobs=True)
            assert " of " in startup(server, "RUN", "0.0.0.0", 1)[0] and "ALARM, no API key" in startup(server, "RUN", "0.0.0.0", 1)[-1]
            bodies = list(upstream.bodies)
        with serving(load_answerer(finished, Wanted(upstream="http://127.0.0.1:9/v1", upstream_model="served"))) as (_, client):
            _refused(client, 502, "the upstream cannot be reached")
    assert len(bodies) == 4 and {(b["model"], b["temperature"], b["max_tokens"]) for b in bodies} == {("served", 0.5, 9)}
    prompt_id = read_table(finished / "data/test.parquet")[0]["prompt_id"]
    candidates = [text_of(request_seed(7, "sample-sft", prompt_id, i) >> 11) for i in range(4)]
    rewards = load_reward(finished / "rewards" / REWARD).score([prompt] * 4, [ended(c, True) for c in candidates])
    assert answer.choices[0].message.content == candidates[int(np.argmax(rewards))] and answer.choices[0].irlign["reward"] == pytest.approx(
        max(rewards), abs=1e-4
    )
    assert (answer.usage.prompt_tokens, answer.irlign["drawn_tokens"]) == (10, 12) and answer.irlign["most_best_of"] is None


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(upstream="http://127.0.0.1:9/v1", upstream_model="served")])
def test_a_run_drawn_by_several_processes_is_served_by_one(copied, wanted):
    run = Run.read(copied)
    served = what_is_served(run, as_recipe({**run.recipe, "sampling": {**run.recipe["sampling"], "num_workers": 4}}), wanted)
    check_engine(served.sampling)
    assert served.sampling.num_workers == 1


def test_the_aligned_policy_is_the_default_where_one_was_published(copied):
    shutil.copytree(copied / "policies/sft", copied / "policies/aligned")
    write_json(copied / "optimise/choice.json", {"published": "sft"})
    assert load_answerer(copied).served.policy == "sft"
    write_json(copied / "optimise/choice.json", {"published": "round-1"})
    with serving(load_answerer(copied)) as (_, client):
        answer = client.chat.completions.create(**{**_asked("How do I fix my bike?", n=3), "model": "aligned"})
        assert answer.irlign["policy"] == "aligned" and answer.irlign["candidates"] == 3 and answer.choices[2].irlign["reward"] is not None
        _refused(client, 400, "was judged with answers of the SFT policy", model="aligned", extra_body={"best_of": 2})
    assert load_answerer(copied, Wanted(policy="best-of-n", name="mine")).served.name == "mine"


def test_a_run_that_cannot_be_served(copied, tmp_path):
    for wanted, words in (
        (Wanted(n=4), "n = 4 is more than the judge"),
        (Wanted(policy="best"), "no policy 'best'"),
        (Wanted(upstream_model="x"), "no upstream"),
        (Wanted(upstream="http://127.0.0.1:9/v1"), "which model at the upstream is sft"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_answerer(copied, wanted)
    assert load_answerer(copied, Wanted(n=4, force=True)).served.best_of == 4
    manifest = read_json(copied / "manifest.json")
    for stage, status, words in (
        ("eval", "failed", None),
        ("optimise", "interrupted", "--policy best-of-n"),
        ("bon", "failed", "irlign run"),
    ):
        manifest["stages"][stage]["status"] = status
        write_json(copied / "manifest.json", manifest)
        if words is None:
            assert load_answerer(copied).served.alarms[0]["name"] == "not evaluated"
            continue
        with pytest.raises(RunError, match=f"the stage {stage} is {status}") as caught:
            load_answerer(copied)
        assert words in caught.value.do
    with pytest.raises(RunError, match="no run directory"):
        load_answerer(tmp_path)


def test_turns_meet_the_tokenizer_as_everywhere(tmp_path):
    """Several turns under a template; a special token in a text is text; `developer` says `system`; seeds are of the conversation."""
    sft, init = (make_tiny_policy(tmp_path / name, seed=seed) for seed, name in enumerate(("sft", "init")))
    sampling = SamplingSettings(max_new_tokens=6)
    about = {"choice": {"n": 3, "label_free": None}, "alarms": [], "lone_text": False, "sampling": sampling}
    served = Served("m", "sft", 3, "log-ratio", **about)
    answerer = Answerer(served, load_engine(sft, sampling, "hh"), LogRatio(sft, init, "hh"))
    turns = [("system", "red"), ("user", "the cat </s> sat."), ("assistant", " The dog ran."), ("user", "and now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with serving(answerer) as (_, client):
        answer = client.chat.completions.create(model="m", messages=messages, seed=3)
        other = client.chat.completions.create(model="m", messages=[{**messages[0], "role": "developer"}, *messages[1:]], seed=3)
        with pytest.raises(openai.BadRequestError, match="the run selects among 3: no judge has shown"):
            client.chat.completions.create(model="m", messages=messages, extra_body={"best_of": 4})
    form = Format(load_tokenizer(str(sft)), "hh")
    prompt = Prompt.of(tuple(messages), "served")
    ids = form.prompt_ids(prompt.content)
    assert answer.usage.prompt_tokens == len(ids) and form.tokenizer.eos_token_id not in ids
    drawn = answerer.engine.draw([Request(prompt, tuple(request_seed(3, "sample-sft", prompt.prompt_id, i) for i in range(3)))])
    best = winners(drawn, answerer.reward.score([prompt.content] * 3, [ended(s.completion, s.finished) for s in drawn]))
    texts = [s.completion for s in best or drawn]
    assert answer.choices[0].message.content == other.choices[0].message.content and answer.choices[0].message.content in texts
    assert not best or answer.choices[0].message.content == best[0].completion


def test_the_command_says_what_is_wrong(finished, capsys, monkeypatch):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, words)])
        return ended.value.code, capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, err = run(finished, "--port", taken.getsockname()[1])
    assert code == 1 and "cannot serve there: Address already in use" in err and "Traceback" not in err
    code, err = run(finished / "nothing", "--port", 0)
    assert code == 1 and "no run directory" in err
    code, err = run(finished, "--port", 0, "--api-key-env", "NO_SUCH_KEY")
    assert code == 2 and "NO_SUCH_KEY is not set" in err
    for name in ("irlign.serve", "irlign.serving.metrics"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, err = run(finished)
    assert code == 2 and "prometheus_client is missing" in err and "pip install 'irlign[serve]'" in err


def test_the_command_ends_cleanly(finished, tmp_path):
    """SIGTERM while an answer is on its way: the answer arrives whole, and the command ends well."""
    words = ["serve", str(finished), "--port", "0", "--n", "1"]
    environment = {**os.environ, "IRLIGN_QUIET": "0", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    with subprocess.Popen([sys.executable, "-m", "irlign", *words], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://\S+/v1", line)))
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                asked = {"prompt": "How do I fix my bike?", "n": 100, "seed": 1, "stream": True}
                stream = iter(client.completions.create(model="best-of-n", **asked))
                next(stream)
                process.send_signal(signal.SIGTERM)
                ended = [c.choices[0].finish_reason for c in stream if c.choices[0].finish_reason]
            said = "".join(lines)
            assert len(ended) == 100 and process.wait(30) == 0 and "what was accepted was answered" in said and "terminated" not in said
        finally:
            process.kill()


def test_small_parts_of_an_answer_are_sent_at_once():
    """asyncio turns Nagle's algorithm off where a socket names its protocol; with it on, an answer in two parts waits for the client's delayed
    acknowledgement, some 40 ms."""

    async def delays() -> int:
        place, accepted = bind("127.0.0.1", 0), asyncio.Queue()

        async def met(_, writer):
            await accepted.put(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(met, sock=place):
            _, writer = await asyncio.open_connection(*place.getsockname())
            writer.close()
            return await accepted.get()

    assert asyncio.run(delays())


def test_what_only_loads_computes_on_one_core():
    before = torch.get_num_threads()
    with one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

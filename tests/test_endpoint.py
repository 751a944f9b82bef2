"""The endpoint's client, against a real server: what is tried again, what is final, patience, concurrency, and the key."""

import asyncio
import socket
import time
import traceback

import pytest
from openai_server import Server, completion, error

from irlign import endpoint
from irlign.endpoint import Endpoint, EndpointSettings, Malformed, pause, retry_after
from irlign.errors import ConfigError, DataError, ModelError

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses; a key in the environment, and nothing else that the client would read there."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def _ask(server, count=1, read=None, adapt=lambda body, said: False, **settings):
    """The answers of so many requests, by their number."""
    found = {}
    client = Endpoint(EndpointSettings(base_url=server.url, **settings))

    def keep(i, body):
        found[i] = body["choices"][0]["message"]["content"]

    bodies = lambda i: {"model": "served", "messages": [{"role": "user", "content": f"p{i}"}]}  # noqa: E731
    client.ask("/chat/completions", [f"place {i}" for i in range(count)], bodies, read or keep, adapt)
    return found


def _first(*answers):
    """These answers first, each (status, headers, what is said), then ordinary ones."""
    return lambda n, body: answers[n] if n < len(answers) else (200, {}, completion(body))


def test_success_with_the_key_in_the_header_only():
    with Server() as server:
        assert _ask(server, 3) == {i: f"p{i}/None" for i in range(3)}
    assert server.keys == [f"Bearer {KEY}"] * 3 and server.paths == ["/v1/chat/completions"] * 3
    assert KEY not in str(server.bodies)


AGAIN = {
    "429": (429, {}, error("slow down")),
    "500": (500, {}, error("oops")),
    "503 without JSON": (503, {"content-type": "text/html"}, "<html>busy</html>"),
    "not JSON": (200, {}, '{"choices": ['),
}


@pytest.mark.parametrize("case", AGAIN)
def test_what_is_asked_again(case):
    with Server(_first(AGAIN[case], AGAIN[case])) as server:
        assert _ask(server) == {0: "p0/None"}
    assert len(server.bodies) == 3


def test_an_answer_that_the_reader_refuses_is_asked_again():
    def read(i, body):
        if len(server.bodies) < 3:
            raise Malformed("not that")

    with Server() as server:
        _ask(server, read=read)
    assert len(server.bodies) == 3


def test_retry_after_holds_everyone_back():
    """Ten requests in two lanes: the one that is told to wait stops the other lane too, but for what is under way."""
    with Server(_first((429, {"retry-after": "0.4"}, error("wait"))), delay=0.02) as server:
        assert len(_ask(server, 10, max_concurrency=2)) == 10
    assert sum(t - server.times[0] < 0.35 for t in server.times) <= 3 and len(server.times) == 11


def test_a_timeout_is_asked_again_and_gives_up_in_words():
    def slow(n, body):
        time.sleep(0.5 if n == 0 else 0)
        return 200, {}, completion(body)

    with Server(slow) as server:
        assert _ask(server, timeout_s=0.2) == {0: "p0/None"}
    with Server(delay=0.5) as server, pytest.raises(ModelError, match=r"no usable answer in 2 attempts.*no answer within 0.1 s") as caught:
        _ask(server, timeout_s=0.1, max_retries=1)
    assert "place 0" in str(caught.value) and "timeout_s" in str(caught.value)


def test_concurrency_is_bounded_and_used():
    with Server(delay=0.05) as server:
        assert len(_ask(server, 12, max_concurrency=4)) == 12
    assert server.most_at_once == 4


FINAL = {
    "401": ((401, {}, error(f"Incorrect API key provided: {KEY}")), ConfigError, "refuses the key in OPENAI_API_KEY (401: Incorrect"),
    "404": ((404, {}, error("no such model")), ConfigError, "it serves served-v2"),
    "400": ((400, {}, error("the prompt is too long")), ModelError, "place 0: refuses the request (400): the prompt is too long"),
    "422": ((422, {}, {"detail": [{"msg": "field required"}]}), ModelError, "(422)"),
    "quota": ((429, {}, error("no money", code="insufficient_quota")), ModelError, "the quota is used up: no money"),
    "patience": ((429, {"retry-after": "3600"}, error("tomorrow")), ModelError, "asks to wait 3,600 s"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_is_final(case):
    said, kind, message = FINAL[case]
    with Server(lambda n, body: said, models=("other", "served-v2")) as server, pytest.raises(kind) as caught:
        _ask(server, max_concurrency=1)
    assert message in str(caught.value) and len(server.bodies) == 1
    assert KEY not in "".join(traceback.format_exception(caught.value))  # what --debug shows


def test_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server(_first((401, {}, error("who are you")))) as server, pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        _ask(server)
    with Server() as server:
        assert _ask(server) == {0: "p0/None"}  # a server of one's own asks for none


def test_the_attempts_end():
    with Server(lambda n, body: (500, {}, error("always"))) as server, pytest.raises(ModelError, match="in 3 attempts, the last: always"):
        _ask(server, max_retries=2)
    assert len(server.bodies) == 3


def test_an_unreachable_host_fails_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        Endpoint(EndpointSettings(base_url=url)).ask("/completions", ["x"], lambda i: {}, lambda i, a: None)
    assert url in str(caught.value) and "start the server" in str(caught.value) and time.monotonic() - started < 3


def test_an_error_of_the_reader_ends_it():
    def read(i, body):
        raise DataError("filtered", where="prompt 7")

    with Server(delay=0.05) as server, pytest.raises(DataError, match="filtered"):
        _ask(server, 50, read=read, max_concurrency=2)
    assert len(server.bodies) <= 4


def test_a_refused_field_is_left_out():
    """Both of the first two requests are refused before the field is gone; neither uses up an attempt."""

    def answer(n, body):
        return (400, {}, error("Unrecognized request argument supplied: seed")) if "seed" in body else (200, {}, completion(body))

    sent = {"seed": 1}

    def adapt(body, said):
        sent.clear()
        return "seed" in body and "seed" in said

    found = []
    with Server(answer) as server:
        client = Endpoint(EndpointSettings(base_url=server.url, max_retries=0, max_concurrency=2))
        body = lambda i: {"model": "m", "messages": [{"content": str(i)}], **sent}  # noqa: E731
        client.ask("/chat/completions", list("ab"), body, lambda i, a: found.append(i), adapt)
    assert sorted(found) == [0, 1] and [("seed" in b) for b in server.bodies].count(True) <= 2


def test_it_runs_where_a_loop_runs_already():
    async def notebook(server):
        return _ask(server, 2)

    with Server() as server:
        assert len(asyncio.run(notebook(server))) == 2


def test_pauses_by_hand(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.5)
    assert [pause(k, None, 1.0) for k in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert pause(0, None, 0.0) == 0.25 and pause(2, 7.0, 0.5) == 7 + 2 * 0.75
    assert retry_after({"retry-after": "3"}, 0) == 3 and retry_after({"retry-after-ms": "250", "retry-after": "9"}, 0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40) == 60
    assert retry_after({"retry-after": "-5"}, 0) == 0 and retry_after({"retry-after": "soon"}, 0) is None and retry_after({}, 0) is None


def test_the_cost_by_hand():
    assert EndpointSettings(price_in=2.0, price_out=8.0).cost(500_000, 250_000) == 3.0
    assert EndpointSettings(price_out=8.0).cost(500_000, 250_000) == 2.0 and EndpointSettings().cost(1, 1) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "looks like http://"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "holds no user, password or query"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "holds no user, password or query"),
        ({"api_key_env": KEY}, "never the key itself"),
    ],
)
def test_settings_that_would_store_a_key_or_lead_nowhere(settings, message):
    with pytest.raises(ValueError, match=message):
        EndpointSettings(**settings)


def test_the_address(monkeypatch):
    assert EndpointSettings(base_url="http://a/v1/").address() == "http://a/v1"
    assert EndpointSettings(base_url="http://a/v1").address("http://b/v1") == "http://b/v1"
    with pytest.raises(ConfigError, match="no address"):
        EndpointSettings().address()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://c/v1")
    assert EndpointSettings().address() == "http://c/v1"

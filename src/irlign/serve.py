"""An OpenAI-compatible HTTP server over a run's answers: routes, limits, streams, errors, a clean end.

Requests are read and refused here; what they ask for waits in serving/batches.py for the one thread that owns the model.
"""

import asyncio
import contextlib
import hmac
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from irlign.errors import ConfigError, DataError, IrlignError, RunError
from irlign.progress import say, silenced
from irlign.serving.answers import Answerer, Ask, ScoreAsk, watched
from irlign.serving.batches import Batches, Closed, Full
from irlign.serving.exchange import Exchange, Limits, News, said_of, score_ask
from irlign.serving.load import Wanted, load_answerer
from irlign.serving.protocol import Chat, Completion, Refused, Score, event, read
from irlign.serving.schema import document

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from irlign.serving.metrics import Metrics
except ImportError as error:
    raise ConfigError(f"the server is not installed: {error.name} is missing", do="pip install 'irlign[serve]'") from None

KEY = "IRLIGN_API_KEY"  # the environment variable that holds the key, unless another is named
GONE = 499  # the status, in the metrics alone, of a request whose client did not wait
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models", "/health", "/metrics", "/openapi.json")


class Server:
    """One answerer behind HTTP, an ASGI application; its end finishes what was accepted."""

    def __init__(self, answerer: Answerer, limits: Limits = Limits(), key: str = ""):
        self.answerer, self.served, self.limits, self.key = answerer, answerer.served, limits, key
        self.started = int(time.time())
        self.metrics = Metrics(lambda: self.batches.waiting, lambda: self.batches.running)
        self.batches: Batches[Ask | ScoreAsk, Any] = Batches(
            answerer.begin,
            together=lambda item: item.kind,
            size=lambda item: item.count,
            most=limits.batch,
            waiting=limits.waiting,
            done=self.metrics.batch,
        )
        self.routes = self._routes()

    def _routes(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def life(app: FastAPI) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.batches.close)

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
        for path, method, answer in (
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/completions", "POST", self.completions),
            ("/v1/score", "POST", self.score),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.prometheus),
            ("/openapi.json", "GET", self.openapi),
        ):
            app.add_api_route(path, answer, methods=[method], response_model=None)

        async def refused(request: Request, error: Any) -> Response:
            return error_response(error)

        async def unknown(request: Request, error: Any) -> Response:
            answer = error_response(Refused(error.status_code, f"{request.method} {request.url.path} is not served here"))
            answer.headers.update(error.headers or {})  # Allow: the methods that are
            return answer

        async def broken(request: Request, error: Exception) -> Response:
            return error_response(Refused(500, "an error of the server's own; its log says which"))

        app.add_exception_handler(Refused, refused)
        app.add_exception_handler(Exception, broken)
        app.add_exception_handler(HTTPException, unknown)
        return app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Every request passes here: the key is looked at before anything is read, and status and time are counted."""
        if scope["type"] != "http":
            return await self.routes(scope, receive, send)
        started, status = time.monotonic(), GONE

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self.key and scope["path"] != "/health" and not self._knows_key(scope):
                problem = Refused(401, "the API key is missing or wrong", code="invalid_api_key")
                await error_response(problem)(scope, receive, noting)
            else:
                await self.routes(scope, receive, noting)
        finally:
            path = next((known for known in PATHS if scope["path"].startswith(known)), "other")
            self.metrics.request(path, status, time.monotonic() - started)

    def _knows_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.key.encode())

    async def health(self) -> Response:
        return JSONResponse({"status": "ok", "model": self.served.name, "waiting": self.batches.waiting})

    async def prometheus(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self) -> Response:
        return JSONResponse(document(self.served.name, self.served.reward))

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self.started, "owned_by": "irlign", "irlign": self.served.about()}

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            what = f"the model {name!r} does not exist; here {self.served.name!r} is served"
            raise Refused(404, what, param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        return await self._sampled(request, read(Chat, await self._raw(request)))

    async def completions(self, request: Request) -> Response:
        return await self._sampled(request, read(Completion, await self._raw(request)))

    async def score(self, request: Request) -> Response:
        """The reward of any answers to any prompt, as `irlign score` gives it."""
        body = read(Score, await self._raw(request))
        if body.model is not None and body.model != self.served.reward:
            self._check_model(body.model)
        (rewards,) = await self._results(request, self._submit([score_ask(body, self.served, self.limits)]))
        data = [{"object": "score", "index": i, "reward": float(reward)} for i, reward in enumerate(rewards)]
        return JSONResponse({"object": "list", "model": self.served.reward, "data": data})

    async def _raw(self, request: Request) -> bytes:
        """The body. Raises Refused where it is too large, too slow, or its client has left."""
        raw, problem = bytearray(), Refused(413, f"the body has more than {self.limits.body} bytes")
        if int(request.headers.get("content-length") or 0) > self.limits.body:
            raise problem
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    raw += part
                    if len(raw) > self.limits.body:
                        raise problem
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.limits.seconds:g} s") from None
        except ClientDisconnect:
            raise Refused(GONE, "the client has left") from None
        return bytes(raw)

    async def _sampled(self, request: Request, body: Chat | Completion) -> Response:
        self._check_model(body.model)
        exchange = Exchange(body, self.answerer, self.limits)
        if body.stream:
            return await self._stream(request, exchange)
        answers = await self._results(request, self._submit(exchange.asks))
        self.metrics.answered(answers)
        return JSONResponse(exchange.whole(answers))

    def _submit(self, items: Sequence[Ask | ScoreAsk]) -> list[Future[Any]]:
        try:
            return self.batches.submit(items)
        except Full as full:
            raise Refused(429, f"too many requests: {full}", code="overloaded", retry_after=full.retry_after) from None
        except Closed:
            raise Refused(503, "the server is shutting down", retry_after=1) from None

    async def _results(self, request: Request, futures: Sequence[Future[Any]]) -> list[Any]:
        """What the futures come to; a client that leaves takes back what is not done."""
        results = asyncio.gather(*map(asyncio.wrap_future, futures))
        results.add_done_callback(lambda done: done.cancelled() or done.exception())  # a client that left asks for none: no line in the log
        try:
            await _unless_left(request, results)
            return results.result()
        except Refused:
            raise
        except Exception as error:
            raise self._failure(error) from None
        finally:
            results.cancel()

    def _failure(self, error: Exception) -> Refused:
        """What a client is told of an error that came up while its request was worked on."""
        if isinstance(error, DataError):
            return Refused(400, said_of(error))
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"serve: {type(error).__name__}: {line}", file=sys.stderr, flush=True)
        if isinstance(error, IrlignError) and self.served.sampling.engine == "openai":
            return Refused(502, f"the upstream {error.what}")
        return Refused(500, "the answer could not be made; the server's own log says why")

    async def _stream(self, request: Request, exchange: Exchange) -> Response:
        """Server-sent events: text as it is drawn where nothing is selected, else each answer whole once it is. An error that comes up before
        the first of them has a status of its own."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[News]()

        def tell(what: News) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        futures = self._submit(watched(exchange.asks, tell))

        def leave() -> None:
            for future in futures:
                future.cancel()

        for future in futures:
            future.add_done_callback(lambda _: tell(None))
        first = asyncio.ensure_future(news.get())
        try:
            await _unless_left(request, first)
            failed = next((error for f in futures if f.done() and (error := f.exception())), None)
            if isinstance(failed, Exception):
                raise self._failure(failed)
        except BaseException:
            leave()
            raise

        async def events() -> AsyncIterator[bytes]:
            try:
                async for chunk in exchange.stream(first.result(), news.get, futures, self.metrics.answered):
                    yield chunk
            except Exception as error:
                yield event(self._failure(error).body())
            finally:
                leave()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def error_response(error: Refused) -> Response:
    """An error as OpenAI writes it, with Retry-After where it says when to come back."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _unless_left(request: Request, work: asyncio.Future[Any]) -> None:
    """Wait for the work to be done. Raises Refused where the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
    if not work.done():
        work.cancel()
        raise Refused(GONE, "the client has left")


def serve(root: str | Path, host: str, port: int, wanted: Wanted, limits: Limits = Limits(), key_env: str | None = None) -> None:
    """Serve the run in a folder until SIGTERM or Ctrl-C; accepted requests are answered first. Raises ConfigError, RunError, ModelError."""
    key = os.environ.get(key_env or KEY, "").strip()
    if key_env and not key:
        raise ConfigError(f"{key_env} is not set, and it should hold the API key", where="--api-key-env")
    place = bind(host, port)
    server = Server(load_answerer(root, wanted), limits, key)
    place.listen()  # whoever reads the address may come at once
    for line in startup(server, root, host, place.getsockname()[1]):
        say(f"serve: {line}")
    config = uvicorn.Config(server, proxy_headers=False, log_level="warning", access_log=False, server_header=False)
    with silenced(), _signals_pass():
        uvicorn.Server(config).run(sockets=[place])
    say("serve: stopped; what was accepted was answered")


def startup(server: Server, root: str | Path, host: str, port: int) -> list[str]:
    """What is served, at which n, by which reward, where; and whatever should give pause."""
    s, there = server.served, f"[{host}]" if ":" in host else host
    source = f" at {s.sampling.openai.base_url}" if s.sampling.engine == "openai" else ""
    picked = f"each answer the best of {s.best_of} by {s.reward}" if s.best_of > 1 else f"one answer each, scored by {s.reward}"
    asked = "any best_of (--force)" if s.most is None else f"best_of up to {s.most}"
    found = [f"the {s.policy} policy of {root}{source}, {picked}; {asked}", f"http://{there}:{port}/v1, model {s.name}"]
    found += [f"ALARM, {a['name']}: {a['seen']}. {a['do']}" for a in s.alarms]
    if not server.key and host not in ("127.0.0.1", "localhost", "::1"):
        found.append(f"ALARM, no API key: whoever reaches {host} may ask. Put one into {KEY}")
    return found


def bind(host: str, port: int) -> socket.socket:
    """A socket with its address, not yet listening. Raises RunError where the address is not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)  # only with it named does asyncio send small parts at once (TCP_NODELAY)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise RunError(
            f"cannot serve there: {error.strerror or error}", where=f"{host}:{port}", do="give another --host or --port"
        ) from None
    return place


@contextlib.contextmanager
def _signals_pass() -> Iterator[None]:
    """The server takes SIGTERM and Ctrl-C as a wish to end, and hands them on when it has: here that means nothing more."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

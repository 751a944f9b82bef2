"""An OpenAI-compatible endpoint, asked many things at once: bounded concurrency, retries, patience, clear errors, cost.

It knows nothing of what is asked: bodies go out as they are given, and whoever asks reads the answers. The key comes from
the environment, and no message, file or setting ever holds it.
"""

import asyncio
import contextlib
import difflib
import importlib.util
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from irlign.config import Settings
from irlign.errors import ConfigError, IrlignError, ModelError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds: the backoff starts here, doubles, and ends here
LONGEST_WAIT = 600.0  # seconds: an endpoint that asks for more patience than this ends the stage
CONNECT_S = 10.0  # seconds for the connection alone
AGAIN = (408, 409, 425, 429)  # statuses that are worth another attempt, beside all from 500 on
ADDRESS = "OPENAI_BASE_URL"  # the environment variable that stands in for base_url
GOES_ON = "the same command goes on where it stopped"

Body = Mapping[str, Any]


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an endpoint's address looks like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("an endpoint's address holds no user, password or query: the key belongs into an environment variable")
    return url.rstrip("/")


def _checked_name(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("this is the name of an environment variable that holds the key, never the key itself")
    return name


Url = Annotated[str, AfterValidator(_checked_url)]


class EndpointSettings(Settings):
    """Where an endpoint is, how it is asked, and what it costs."""

    base_url: Url | None = Field(None, description=f"address up to /v1; null = the environment variable {ADDRESS}")
    api_key_env: Annotated[str, AfterValidator(_checked_name)] = Field(
        "OPENAI_API_KEY", description="NAME of the environment variable that holds the key; the key itself is stored nowhere"
    )
    max_concurrency: int = Field(16, ge=1, description="most requests under way at once")
    timeout_s: float = Field(300.0, gt=0, description="seconds without a sign of an answer after which a request is given up")
    max_retries: int = Field(6, ge=0, description="further attempts after 429, 5xx, a timeout, a lost connection or a malformed answer")
    price_in: float = Field(0.0, ge=0, description="price of a million tokens read, for the cost in the progress line; 0 = unknown")
    price_out: float = Field(0.0, ge=0, description="price of a million tokens written; 0 = unknown")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """What the tokens cost, in the currency of the prices; None where both prices are unknown."""
        known = self.price_in or self.price_out
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6 if known else None

    def address(self, own: str | None = None, section: str = "endpoint") -> str:
        """`own`, else `base_url`, else the environment's. Raises ConfigError where none says where the endpoint is."""
        if found := own or self.base_url or os.environ.get(ADDRESS):
            try:
                return _checked_url(found)
            except ValueError as error:
                raise ConfigError(str(error), where=ADDRESS) from None
        raise ConfigError("no address of an endpoint", where=f"{section}.base_url", do=f"give http://HOST:PORT/v1 there, or in {ADDRESS}")


def check_client() -> None:
    """Raises ConfigError where the official client is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("the client for OpenAI-compatible endpoints is not installed", do="pip install 'irlign[openai]'")


class Malformed(ValueError):
    """An answer that is not of the form that was asked for: worth another attempt."""


def pause(attempt: int, asked: float | None, chance: float) -> float:
    """Seconds before the next attempt: what the endpoint asked for, and a backoff that doubles with every attempt (from 0), of
    which `chance` in [0, 1) leaves a half to the whole, so that many clients do not come back at once."""
    return (asked or 0.0) + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt) * (0.5 + chance / 2)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a response asks to wait: retry-after-ms, or Retry-After as seconds or as a date; None where it says nothing."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            if name in headers:
                return max(0.0, float(headers[name]) * scale)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now)
    return None


class Endpoint:
    """One address. `section` is the place of its settings in the recipe, for messages."""

    def __init__(self, settings: EndpointSettings, base_url: str | None = None, section: str = "endpoint"):
        check_client()
        self.settings, self.section, self.url = settings, section, settings.address(base_url, section)
        self._key = os.environ.get(settings.api_key_env, "").strip()
        self._reached = False  # whether it ever gave an answer of any kind
        self._not_before = 0.0  # no request starts earlier (monotonic clock): it asked all of us for patience

    def ask(
        self,
        path: str,
        places: Sequence[str],
        body: Callable[[int], Body],
        read: Callable[[int, Any], None],
        adapt: Callable[[Body, str], bool] = lambda body, said: False,
    ) -> None:
        """Post `body(i)` to `path` for every place (what to call it in messages) and hand each answer's JSON to `read(i, answer)`.

        `read` keeps the answer, or raises Malformed to have it asked for again. `adapt(body, message)` may change what `body`
        will give after the endpoint refused a request, and says whether it did. All run in one thread, in any order. The first
        error ends it all: ConfigError for a wrong key or name, ModelError for an endpoint that cannot be reached or gives up.
        """
        if places:
            _finish(self._ask_all(path, places, body, read, adapt))

    async def _ask_all(self, path: str, places: Sequence[str], body: Any, read: Any, adapt: Any) -> None:
        import openai

        todo = iter(range(len(places)))
        limit = openai.Timeout(self.settings.timeout_s, connect=min(CONNECT_S, self.settings.timeout_s))
        options: dict[str, Any] = {"base_url": self.url, "api_key": self._key or "none", "timeout": limit}

        async def work(client: Any) -> None:
            for i in todo:
                await self._ask_one(client, path, places[i], lambda i=i: body(i), lambda answer, i=i: read(i, answer), adapt)

        try:
            async with openai.AsyncOpenAI(**options, max_retries=0) as client, asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.max_concurrency, len(places))):
                    group.create_task(work(client))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _ask_one(self, client: Any, path: str, place: str, body: Any, read: Any, adapt: Any) -> None:
        import openai

        attempt = 0
        while True:
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            sent = body()
            try:
                answer = await client.post(path, cast_to=object, body=sent)
                self._reached = True
                return read(answer)
            except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError, Malformed) as error:
                said = self._said(error)
                if isinstance(error, openai.APIStatusError):
                    self._reached = True
                    if adapt(sent, said):
                        continue
                    if error.status_code == 404:
                        said += await self._served(client, str(sent.get("model")))
                if (final := self._final(error, said, place, attempt)) is not None:
                    raise final from None  # what the endpoint said may hold the key; `said` does not
                await asyncio.sleep(self._patience(error, attempt))
            attempt += 1

    def _patience(self, error: Exception, attempt: int) -> float:
        """Seconds until this request's next attempt; where the endpoint named a time, no other request starts before it either."""
        import openai

        asked = retry_after(error.response.headers, time.time()) if isinstance(error, openai.APIStatusError) else None
        wait = pause(attempt, asked, random.random())
        if asked:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        return wait

    def _final(self, error: Exception, said: str, place: str, attempt: int) -> IrlignError | None:
        """The error that ends it, or None where another attempt is worth it."""
        import openai

        if isinstance(error, openai.APIStatusError):
            if (refusal := self._refusal(error, said, place)) is not None:
                return refusal
        elif isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError) and not self._reached:
            return ModelError(f"cannot be reached: {said}", where=self.url, do=f"start the server, or correct {self.section}.base_url")
        if attempt < self.settings.max_retries:
            return None
        do = f"see what the server says, or raise {self.section}.max_retries or timeout_s; {GOES_ON}"
        return ModelError(f"no usable answer in {attempt + 1} attempts, the last: {said}", where=f"{self.url}, {place}", do=do)

    def _refusal(self, error: Any, said: str, place: str) -> IrlignError | None:
        """The error behind a status that no further attempt will change, or None."""
        status, name = error.status_code, self.settings.api_key_env
        if status in (401, 403):
            what = f"refuses the key in {name}" if self._key else f"asks for a key, and {name} is not set"
            do = f"put the key into {name}, or name another variable in {self.section}.api_key_env"
            return ConfigError(f"{what} ({status}: {said})", where=self.url, do=do)
        if status == 404:
            do = f"check the model's name and the address in {self.section} (most addresses end in /v1)"
            return ConfigError(f"no such model or path (404: {said})", where=self.url, do=do)
        if error.code == "insufficient_quota":
            return ModelError(f"the quota is used up: {said}", where=self.url, do=f"raise it; {GOES_ON}")
        if (asked := retry_after(error.response.headers, time.time())) is not None and asked > LONGEST_WAIT:
            return ModelError(f"asks to wait {asked:,.0f} s", where=self.url, do=f"come back then; {GOES_ON}")
        if status < 500 and status not in AGAIN:
            return ModelError(f"refuses the request ({status}): {said}", where=f"{self.url}, {place}")
        return None

    def _said(self, error: Exception) -> str:
        """An error in one line, in the endpoint's own words where it has some, without the key."""
        import openai

        body = error.body if isinstance(error, openai.APIError) else None
        own = body.get("message") if isinstance(body, Mapping) else None
        if isinstance(error, openai.APITimeoutError):
            own = f"no answer within {self.settings.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            own = str(error.__cause__ or "") or "the connection failed"
        elif isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            own = f"the answer is not JSON: {error}"
        line = (str(own or error).strip() or type(error).__name__).splitlines()[0]
        return (line.replace(self._key, "***") if self._key else line)[:300]

    async def _served(self, client: Any, model: str) -> str:
        """What the endpoint serves, the names most like `model` first; nothing where it does not say."""
        with contextlib.suppress(Exception):  # a courtesy: it must not hide the error that it explains
            listed = (await client.get("/models", cast_to=object))["data"]
            names = [str(entry["id"]) for entry in listed]
            near = difflib.get_close_matches(model, names, 3)
            return f"; it serves {', '.join((near or names)[:5])}" if names else ""
        return ""


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, in a thread of its own where this one has a loop already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, work).result()

"""The words of the OpenAI protocol: what a request may say, what is refused and why, how answers and errors are written."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from irlign.records import Message, PromptContent

MOST_STOPS = 16
NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # about the caller: they change no answer
UNSERVED: dict[str, tuple[Any, ...]] = {  # fields that are not served: the values that ask for nothing (null always does)
    **{name: ([],) for name in ("tools", "functions")},
    **{name: () for name in ("audio", "prediction", "reasoning_effort", "web_search_options", "verbosity")},
    **{name: (0,) for name in ("frequency_penalty", "presence_penalty", "top_logprobs", "min_p")},
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
}


class Refused(Exception):
    """A request that gets an error: the HTTP status, and what the client is told."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    """A part of a message; images, sound and files are not read."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """One message of a conversation; `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, StringConstraints(min_length=1)]


class Sampled(_Body):
    """What both endpoints take; None is the run's own value. `top_k` is no part of OpenAI's protocol, but of many servers'."""

    model: str
    n: int = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    stop: Stop | list[Stop] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompts(self) -> list[PromptContent]:
        if self.messages[-1].role != "user":
            raise Refused(400, "the last message must be the user's: answers are not continued", param="messages")
        return [tuple(turn.message() for turn in self.messages)]


class Completion(Sampled):
    """POST /v1/completions. `logprobs` is a number there; alternatives to the drawn tokens are not known, so it is 0 or 1."""

    prompt: str | list[str]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=1)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    def prompts(self) -> list[PromptContent]:
        found = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not found:
            raise Refused(400, "no prompt is given", param="prompt")
        return [*found]


class Score(_Body):
    """POST /v1/score: a prompt (or messages) and one answer or several."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Turn] | None = Field(None, min_length=1)
    completion: str | list[str]

    @property
    def content(self) -> PromptContent:
        if (self.prompt is None) == (self.messages is None):
            raise Refused(400, "give either a prompt or messages", param="prompt")
        return self.prompt if self.prompt is not None else tuple(turn.message() for turn in self.messages or ())

    @property
    def completions(self) -> list[str]:
        return [self.completion] if isinstance(self.completion, str) else self.completion


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], raw: bytes) -> Body:
    """The request in a body. Raises Refused with status 400 where it is none, or asks for what is not served."""
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body is no JSON object")
    for name in [name for name in given if name in UNSERVED and name not in kind.model_fields]:
        value = given.pop(name)
        if value is not None and not any(type(value) in (type(v), int, float) and value == v for v in UNSERVED[name]):
            raise Refused(400, f"{name} is not served here: leave it out", param=name, code="unsupported_parameter")
    fields = {name: value for name, value in given.items() if name not in NO_EFFECT and (value is not None or name in _required(kind))}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explained(error) from None


def _required(kind: type[BaseModel]) -> set[str]:
    return {name for name, field in kind.model_fields.items() if field.is_required()}


def _explained(error: ValidationError) -> Refused:
    """The first problem in a request, of those that lie deepest: which field, what was expected."""
    problem = max(error.errors(include_url=False, include_input=False), key=lambda p: len(p["loc"]))
    place, text = problem["loc"], problem["msg"]
    if not place:
        return Refused(400, "the name of a field is no text")  # half of a surrogate pair
    name = ".".join(str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part != "str"))  # no pydantic words
    if place[0] == "messages" and len(place) > 3:
        return Refused(400, f"{name}: only parts of the type text are read: images, sound and files are not", param="messages")
    if problem["type"] == "extra_forbidden":
        return Refused(400, f"{name} is not served here", param=str(place[0]), code="unsupported_parameter")
    return Refused(400, f"{name}: {text[:1].lower()}{text[1:]}", param=str(place[0]))


class Reply:
    """How the answers to one request are written, whole or as chunks of a stream."""

    def __init__(self, chat: bool, model: str):
        self.chat, self.model = chat, model
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def _envelope(self, choices: Sequence[Mapping[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * chunk) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int], about: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer; each choice has `text`, `finish_reason`, `logprobs` and `irlign`."""
        written = [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": c["text"], "refusal": None}} if self.chat else {"text": c["text"]}),
                "logprobs": c["logprobs"],
                "finish_reason": c["finish_reason"],
                "irlign": c["irlign"],
            }
            for index, c in enumerate(choices)
        ]
        return {**self._envelope(written, False), "usage": dict(usage), "irlign": dict(about)}

    def part(self, index: int, text: str, *, first: bool = False) -> dict[str, Any]:
        """Some more text of a choice."""
        said = {"delta": {**({"role": "assistant"} if first else {}), "content": text}} if self.chat else {"text": text}
        return self._envelope([{"index": index, **said, "logprobs": None, "finish_reason": None}], True)

    def end(self, index: int, choice: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        """The end of a choice: why, and what irlign says of it."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        last = {"index": index, **said, "logprobs": None, "finish_reason": choice["finish_reason"], "irlign": choice["irlign"]}
        return {**self._envelope([last], True), "irlign": dict(about)}

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        return {**self._envelope([], True), "usage": dict(usage)}


def event(body: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished answer that what follows cannot take back: without the start of a stop string at its end, and without a
    character whose bytes are not all there."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")


def token_logprobs(texts: Sequence[str], values: Sequence[float], chat: bool) -> dict[str, Any]:
    """Log-probabilities of the drawn tokens as either endpoint writes them; alternatives are not known."""
    if chat:
        content = [{"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in zip(texts, values, strict=True)]
        return {"content": content, "refusal": None}
    return {"tokens": list(texts), "token_logprobs": list(values), "top_logprobs": None, "text_offset": list(_offsets(texts))}


def _offsets(texts: Sequence[str]) -> Iterator[int]:
    place = 0
    for text in texts:
        yield place
        place += len(text)

"""From the words of a request to what is drawn for it, within the limits, and from its answers to the words of the reply."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from irlign.errors import ConfigError
from irlign.records import PromptContent, is_text
from irlign.serving.answers import Answered, Answerer, Ask, ScoreAsk, Served, ask, law_of
from irlign.serving.protocol import MOST_STOPS, Chat, Completion, Refused, Reply, Score, event, settled, token_logprobs


@dataclass(frozen=True)
class Limits:
    """What a server takes on: requests that `waiting` may hold, answers in one `batch`, `answers` drawn for one request, `tokens` of an
    answer, bytes of a `body`, `seconds` in which a body has to arrive."""

    waiting: int = 256
    batch: int = 256
    answers: int = 128
    tokens: int = 4096
    body: int = 1 << 20
    seconds: float = 30.0


News = tuple[int, str] | None  # the text of a choice so far, or that one prompt's answers are there


class Exchange:
    """One request for answers: `asks` is what it asks for. Raises Refused where it asks for what is not served."""

    def __init__(self, body: Chat | Completion, answerer: Answerer, limits: Limits):
        self.body, self.answerer, self.served, self.limits = body, answerer, answerer.served, limits
        self.chat = isinstance(body, Chat)
        self.reply = Reply(self.chat, self.served.name)
        self.asks = self._asks()

    def _asks(self) -> list[Ask]:
        body, most = self.body, self.limits
        prompts, stops = body.prompts(), body.stops or []
        check_text([*prompts, *stops])
        if (body.limit or 0) > most.tokens:
            raise Refused(400, f"at most {most.tokens} tokens are drawn for an answer", param="max_tokens")
        if len(stops) > MOST_STOPS:
            raise Refused(400, f"at most {MOST_STOPS} stop strings are taken", param="stop")
        if body.logprobs and (body.stream or self.served.sampling.engine == "openai"):
            why = "in a stream" if body.stream else "where answers come from an upstream"
            raise Refused(400, f"logprobs are not served {why}", param="logprobs", code="unsupported_parameter")
        law = law_of(self.served.sampling, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stops)
        about: dict[str, Any] = {"law": law, "n": body.n, "best_of": body.best_of, "seed": body.seed, "limit": body.limit}
        try:
            asks = [ask(self.served, prompt, **about) for prompt in prompts]
        except ConfigError as error:
            raise Refused(400, said_of(error), param="best_of") from None
        if (count := sum(one.count for one in asks)) > most.answers:
            raise Refused(400, f"{count} answers would be drawn, and a request may ask for {most.answers}", param="n")
        return asks

    def whole(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """The whole reply."""
        return self.reply.whole(self.choices(answers), usage_of(answers), self.about(answers))

    def choices(self, answers: Sequence[Answered]) -> list[dict[str, Any]]:
        """Every pick as a choice, in the order of the prompts."""
        found = []
        for pick in (pick for answered in answers for pick in answered.picks):
            sample, values = pick.drawn.sample, pick.drawn.logprobs
            wants = self.body.logprobs not in (None, False)
            found.append({
                "text": sample.completion,
                "finish_reason": "length" if sample.finish_reason == "length" else "stop",
                "logprobs": token_logprobs(self.answerer.token_texts(pick), values, self.chat) if wants else None,
                "irlign": {"reward": pick.reward, "index": pick.index, "ended": sample.finish_reason, "logprob": sample.logprob},
            })  # fmt: skip
        return found

    def about(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """The extension field of the reply."""
        own = self.served.sampling
        as_measured = all(a.law == own and a.limit == own.max_new_tokens for a in self.asks)
        drawn = {"candidates": sum(a.count for a in self.asks), "drawn_tokens": sum(a.tokens for a in answers)}
        return {**self.served.about(), "best_of": self.asks[0].best_of, "seed": self.asks[0].seed, "as_measured": as_measured, **drawn}

    async def stream(
        self, now: News, more: Callable[[], Awaitable[News]], futures: Sequence[Future[Answered]], end: Callable[[Sequence[Answered]], None]
    ) -> AsyncIterator[bytes]:
        """The events of a stream: text that nothing can take back, then each choice's end, then what was asked for beside them. `now` is the
        first news and `more` waits for the next; `end` hears the answers. Raises what a future raised."""
        sent: dict[int, str] = {}
        open_ = len(futures)
        while now is not None or open_ > 1:
            if now is None:
                open_ -= 1
            else:
                text, before = settled(now[1], self.asks[0].law.stop), sent.get(now[0], "")
                if text.startswith(before) and len(text) > len(before):
                    yield event(self.reply.part(now[0], text[len(before) :], first=now[0] not in sent))
                    sent[now[0]] = text
            now = await more()
        answers = [future.result() for future in futures]
        end(answers)
        for index, choice in enumerate(self.choices(answers)):
            rest = choice["text"].removeprefix(sent.get(index, ""))
            if rest or index not in sent:
                yield event(self.reply.part(index, rest, first=index not in sent))
            yield event(self.reply.end(index, choice, self.about(answers)))
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event(self.reply.usage(usage_of(answers)))
        yield event("[DONE]")


def usage_of(answers: Sequence[Answered]) -> dict[str, int]:
    """Tokens read and returned; those of candidates that were not picked are in the extension field."""
    read, returned = sum(a.prompt_tokens for a in answers), sum(p.drawn.sample.tokens for a in answers for p in a.picks)
    return {"prompt_tokens": read, "completion_tokens": returned, "total_tokens": read + returned}


def score_ask(body: Score, served: Served, limits: Limits) -> ScoreAsk:
    """What a request to score asks for. Raises Refused."""
    if not 0 < len(body.completions) <= limits.answers:
        raise Refused(400, f"between 1 and {limits.answers} completions are scored at once", param="completion")
    check_text([body.content, *body.completions])
    return ScoreAsk(served.content(body.content), body.completions)


def check_text(contents: Sequence[PromptContent]) -> None:
    """Raises Refused where a text cannot be written at all."""
    texts = [text for c in contents for text in ([c] if isinstance(c, str) else [m["content"] for m in c])]
    if not all(map(is_text, texts)):
        raise Refused(400, "half of a surrogate pair is no text")


def said_of(error: Any) -> str:
    """An error of irlign's own in one line, without its place, which is the server's."""
    return "; ".join(filter(None, (error.what, error.do)))

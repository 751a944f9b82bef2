"""Sampling through an OpenAI-compatible endpoint: a policy that is a name at a server, without weights here.

One request an answer, with the answer's own seed. An endpoint that refuses a field it does not know is asked again without
it, if the field changes no law (`OPTIONAL`); `settled` says what was left out: without `seed` a repeated draw gives other
answers. Servers batch and round as they like, so even with seeds the same request may give another answer. Every answer is
kept on disk as it arrives, so that an interrupted part is taken up request by request.
"""

import contextlib
import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irlign.data.chat import Format
from irlign.endpoint import Endpoint, Malformed
from irlign.errors import DataError
from irlign.policy.load import load_tokenizer
from irlign.progress import Progress
from irlign.records import FinishReason, Prompt, Sample
from irlign.sampling.engine import AtOnce, Drawn, Request, SamplingSettings, ServedSettings

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # said aloud: servers take the model's own defaults otherwise
OPTIONAL = ("seed", "logprobs", *NEUTRAL)
# o-series and later: "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
NO_MAX_TOKENS = re.compile(
    r"\b(unsupported|unrecogni[sz]ed|unknown)\b[^.]*\bmax_tokens\b|\bmax_tokens\b[^.]*\b(not supported|unsupported|deprecated)\b", re.I
)
ENDS: dict[str, FinishReason] = {"stop": "eos", "length": "length"}


@dataclass(frozen=True)
class Answer:
    """What one request gave; `prompt_tokens` were read for it."""

    text: str
    finish_reason: FinishReason
    tokens: int
    prompt_tokens: int
    logprob: float | None


def served_policy(
    policy: Path, settings: SamplingSettings, chat_template: str, settled: Mapping[str, Any] | None, drawn: Path | None
) -> "OpenAIEngine":
    """The engine for a policy of a run: its folder's name says which model the endpoint calls it (`openai.policies`), and the
    folder's tokenizer, where there is one, writes the prompts of endpoint=completions. Raises ConfigError."""
    form = None
    if settings.openai.endpoint == "completions" and policy.is_dir():
        form = Format(load_tokenizer(str(policy)), chat_template)
    return OpenAIEngine(settings.openai.served(policy.name), settings, form=form, settled=settled, drawn=drawn)


class OpenAIEngine:
    """An `Engine` over one model of an endpoint; what the model is to a run, it does not know."""

    name = "openai"

    def __init__(
        self,
        served: ServedSettings,
        settings: SamplingSettings,
        *,
        form: Format | None = None,
        settled: Mapping[str, Any] | None = None,
        drawn: Path | None = None,
    ):
        """With `form`, endpoint=completions gets the prompt's token ids; without, a prompt that is plain text, as it stands. `drawn` is
        the file that keeps answers until whoever asked has stored them."""
        own = settings.openai
        self.model, self.settings, self.form, self.drawn = served.model, settings, form, drawn
        self.endpoint = Endpoint(own, served.base_url, "sampling.openai")
        chosen = {"model": served.model, "endpoint": own.endpoint, "limit": "max_tokens", "left_out": []}
        self.settled: dict[str, Any] = {**chosen, **(settled or {})}
        self.halvings, self.usage = 0, dict[str, float]()

    @property
    def own_law(self) -> bool:
        """Whether answers are drawn by the model's own law, where all endpoints mean the same by a log-probability."""
        return self.settings.temperature == 1 and self.settings.top_p == 1 and not self.settings.top_k

    def under(self, settings: SamplingSettings) -> "OpenAIEngine":
        """The same model at the same endpoint under another law; what was settled for it holds."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def drawing(self) -> AtOnce:
        """Requests to be asked for together, none yet."""
        return AtOnce(self)

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples for every request, in order. Raises ConfigError or ModelError as `Endpoint.ask` does, DataError for a prompt that
        the endpoint filters or that needs a chat template."""
        return [one.sample for one in self.answers(requests)]

    def answers(self, requests: Sequence[Request]) -> list[Drawn]:
        """The same with the tokens that each prompt had there."""
        rows = [(r.prompt, i, seed, r.limit) for r in requests for i, seed in enumerate(r.seeds)]
        bodies = {r.prompt.prompt_id: self._prompt(r.prompt) for r in requests}
        keys = [f"{prompt.prompt_id} {i} {seed}" + (f" {limit}" if limit else "") for prompt, i, seed, limit in rows]
        known = self._kept()
        answers = {key: known[key] for key in keys if key in known}
        todo = [n for n, key in enumerate(keys) if key not in answers]
        self.usage = {}
        with self._keeper() as keep, Progress(f"ask {self.model}", len(rows), "answers") as bar:
            bar.advance(len(answers), self._bill(*answers.values()))

            def read(i: int, body: Any) -> None:
                key = keys[todo[i]]
                answers[key] = read_answer(body, self.settings.stop, f"prompt {rows[todo[i]][0].prompt_id}")
                keep(key, answers[key])
                bar.advance(1, self._bill(answers[key]))

            self.endpoint.ask(
                PATHS[self.settled["endpoint"]],
                [f"prompt {rows[n][0].prompt_id}" for n in todo],
                lambda i: {**bodies[rows[todo[i]][0].prompt_id], **self._law(*rows[todo[i]][2:])},
                read,
                self._adapt,
            )
        found = [(self._sample(prompt, i, answers[key]), answers[key]) for (prompt, i, *_), key in zip(rows, keys, strict=True)]
        return [Drawn(sample, answer.prompt_tokens) for sample, answer in found]

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The part of the request that says what is to be answered."""
        content = prompt.content
        if self.settled["endpoint"] == "chat":
            turns = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
            return {"messages": turns}
        if self.form is not None:
            return {"prompt": self.form.prompt_ids(content)}
        if not isinstance(content, str):
            do = "use sampling.openai.endpoint=chat, where the server writes the turns"
            raise DataError("is a conversation, and endpoint=completions takes text", where=f"prompt {prompt.prompt_id}", do=do)
        return {"prompt": content}

    def _law(self, seed: int, limit: int | None = None) -> dict[str, Any]:
        """The part of the request that says how the answer is drawn, without what the endpoint does not know."""
        s, chat = self.settings, self.settled["endpoint"] == "chat"
        optional: dict[str, Any] = {**NEUTRAL, "seed": seed >> 11}  # 53 bits survive every JSON reader
        if self.own_law and s.openai.logprobs:
            optional["logprobs"] = True if chat else 1
        law = {"model": self.model, self.settled["limit"]: limit or s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p}
        law |= ({"stop": s.stop} if s.stop else {}) | ({"top_k": s.top_k} if s.top_k else {})
        return {**{k: v for k, v in optional.items() if k not in self.settled["left_out"]}, **law}

    def _adapt(self, body: Mapping[str, Any], said: str) -> bool:
        """Whether a refused request should go out again without what the refusal names."""
        if self.settled["endpoint"] == "chat" and "max_tokens" in body and "max_completion_tokens" in said and NO_MAX_TOKENS.search(said):
            self.settled["limit"] = "max_completion_tokens"
            return True
        held = {"top_k"} if self.settings.top_k else set()
        named = {name for name in OPTIONAL if name in body and name not in held and re.search(rf"\b{name}\b", said)}
        self.settled["left_out"] = sorted({*self.settled["left_out"], *named})
        return bool(named)

    def _sample(self, prompt: Prompt, index: int, answer: Answer) -> Sample:
        text = answer.text.removeprefix(self.form.lead) if self.form else answer.text
        logprob = answer.logprob if self.own_law else None
        return Sample(prompt, index, text, answer.finish_reason, answer.tokens, logprob)

    def _bill(self, *answers: Answer) -> str:
        """Adds what these answers were billed for to `usage`; the end of the progress line."""
        read = int(self.usage.get("prompt_tokens", 0)) + sum(a.prompt_tokens for a in answers)
        written = int(self.usage.get("completion_tokens", 0)) + sum(a.tokens for a in answers)
        cost = self.settings.openai.cost(read, written)
        self.usage = {"prompt_tokens": read, "completion_tokens": written, **({} if cost is None else {"cost": cost})}
        return f"{read:,} tokens in, {written:,} out" + ("" if cost is None else f", cost {cost:,.4g}")

    def _kept(self) -> dict[str, Answer]:
        """The answers of an interrupted draw by their key; a line torn by the interruption is none."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.drawn.read_text(encoding="utf-8", errors="replace").splitlines() if self.drawn else ():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    row = json.loads(line)
                    key = row.pop("key")
                    found[key] = Answer(**row)
        return found

    @contextlib.contextmanager
    def _keeper(self) -> Iterator[Callable[[str, Answer], None]]:
        """Appends answers to the file; each begins a line of its own, whatever an interruption left before it."""
        if self.drawn is None:
            yield lambda key, answer: None
            return
        self.drawn.parent.mkdir(parents=True, exist_ok=True)
        with self.drawn.open("a", encoding="utf-8") as file:

            def keep(key: str, answer: Answer) -> None:
                file.write("\n" + json.dumps({"key": key, **asdict(answer)}))
                file.flush()

            yield keep


def read_answer(body: Any, stop: Sequence[str], place: str) -> Answer:
    """The answer in a response of either endpoint. Raises Malformed, and DataError where a content filter withheld it.

    "stop" is the model's own end unless the server names one of the stop strings (vLLM does); a log-probability is kept
    where every drawn token has one.
    """
    try:
        choice, usage = body["choices"][0], body["usage"]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content") or message.get("refusal") or ""
        reason, tokens, read = choice["finish_reason"], int(usage["completion_tokens"]), int(usage["prompt_tokens"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        shown = body if isinstance(body, str) else json.dumps(body)
        raise Malformed(f"not a completion with its usage: {shown[:200]}") from None
    if reason == "content_filter":
        do = "take the prompt out of the data, or sample from an endpoint without that filter"
        raise DataError("the endpoint's content filter withheld an answer", where=place, do=do)
    if reason not in ENDS or not isinstance(text, str):
        raise Malformed(f"finish_reason {reason!r} with {type(text).__name__}: no text that ended or was cut")
    named = reason == "stop" and choice.get("stop_reason") in [*stop]
    return Answer(text, "stop" if named else ENDS[reason], tokens, read, _logprob(choice.get("logprobs"), tokens))


def _logprob(given: Any, tokens: int) -> float | None:
    """The sum over all drawn tokens, in nats; None where some are missing (many endpoints leave out the end of the answer)."""
    try:
        values = [t["logprob"] for t in given["content"]] if "content" in given else given["token_logprobs"]
        total = math.fsum(values)
    except (KeyError, TypeError):
        return None
    return total if len(values) == tokens and math.isfinite(total) else None

"""The nouns: frozen records that the stages hand to each other, and how each becomes a row of a file.

A prompt is a string (plain text, continued as it stands) or a conversation (a tuple of messages that
ends with a user turn). In files it is always one string column: the text, or the JSON of the messages
with `conversational` true.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import numpy as np

SPLITS = ("train", "dev", "test")
SCORE = "reward/"  # begins the name of a reward's column in candidates.parquet


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


PromptContent = str | tuple[Message, ...]


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8 at all; half of a surrogate pair, as JSON's "\\ud83d" alone, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_content(value: str | Sequence[Mapping[str, Any]]) -> PromptContent:
    """A string stays; a sequence of mappings becomes a tuple of messages with `role` and `content` only."""
    if isinstance(value, str):
        return value
    return tuple(Message(role=str(m["role"]), content=str(m["content"])) for m in value)


def prompt_to_cell(content: PromptContent) -> str:
    """The one string that stands for the prompt in files."""
    return content if isinstance(content, str) else json.dumps(list(content), ensure_ascii=False)


def prompt_from_cell(cell: str, conversational: bool) -> PromptContent:
    """The inverse of `prompt_to_cell`."""
    return prompt_content(json.loads(cell)) if conversational else cell


def prompt_identity(content: PromptContent) -> str:
    """16 hex digits that name the prompt wherever it appears: a hash of its content."""
    kind = "text" if isinstance(content, str) else "chat"
    return hashlib.sha256(f"{kind}\n{prompt_to_cell(content)}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Prompt:
    """A request, with its split; `prompt_id` is the hash of its content."""

    prompt_id: str
    split: str
    content: PromptContent

    @classmethod
    def of(cls, content: PromptContent, split: str) -> "Prompt":
        return cls(prompt_identity(content), split, content)

    def to_row(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "prompt_id": self.prompt_id,
            "prompt": prompt_to_cell(self.content),
            "conversational": not isinstance(self.content, str),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Prompt":
        return cls(row["prompt_id"], row["split"], prompt_from_cell(row["prompt"], row["conversational"]))


@dataclass(frozen=True)
class Demonstration:
    """A prompt and one good answer. An empty `completion` is a prompt without a demonstration (`prompt_dataset_name`)."""

    prompt: Prompt
    completion: str

    def to_row(self) -> dict[str, Any]:
        return {**self.prompt.to_row(), "completion": self.completion}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Demonstration":
        return cls(Prompt.from_row(row), row["completion"])


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected answer: the labelled reference, never needed."""

    prompt: Prompt
    chosen: str
    rejected: str


FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Sample:
    """One answer that a policy drew: `tokens` drawn, `logprob` their sum under the policy itself (nats, temperature 1), None where
    an endpoint does not tell it.

    `finish_reason`: "eos" (the model ended), "stop" (a stop string, removed from the text), "length" (cut at the limit).
    """

    prompt: Prompt
    index: int
    completion: str
    finish_reason: FinishReason
    tokens: int
    logprob: float | None

    @property
    def finished(self) -> bool:
        return self.finish_reason != "length"

    def to_row(self) -> dict[str, Any]:
        return {
            **self.prompt.to_row(),
            "index": self.index,
            "completion": self.completion,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
            "logprob": self.logprob,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Sample":
        return cls(Prompt.from_row(row), row["index"], row["completion"], row["finish_reason"], row["tokens"], row["logprob"])


def mean_logprobs(samples: Sequence[Sample]) -> np.ndarray | None:
    """How likely the policy finds each of its answers: log-probability a token, shape [len(samples)]; None where an endpoint has not told
    it of every answer."""
    known = [s.logprob / max(1, s.tokens) for s in samples if s.logprob is not None]
    return np.array(known) if len(known) == len(samples) else None


@dataclass(frozen=True)
class Contrast:
    """One training row of a reward model: for one prompt, a better and a worse answer (method.md section 3); `weight` multiplies
    its loss, relative to the other rows.
    """

    prompt: Prompt
    better: str
    worse: str
    weight: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval; `prompts` is how many it rests on."""

    mean: float
    ci95: tuple[float, float]
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "ci95": list(self.ci95), "prompts": self.prompts}


@dataclass(frozen=True)
class PairedTest:
    """A paired comparison `a` minus `b` over the same prompts; `p` is two-sided, from a permutation (sign-flip) test."""

    a: str
    b: str
    mean_difference: float
    ci95: tuple[float, float]
    p: float
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95)}


def find_test(results: Mapping[str, Any], a: str, b: str) -> dict[str, Any] | None:
    """The comparison of a with b in results.json, or None."""
    return next((t for t in results["tests"] if (t["a"], t["b"]) == (a, b)), None)


def verdict(ci95: Sequence[float]) -> str:
    """ "better" or "worse" where a difference's interval lies on one side of 0, "" where it does not."""
    low, high = ci95
    return "better" if low > 0 else "worse" if high < 0 else ""

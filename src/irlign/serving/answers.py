"""Answers of a finished run: drawn by its policy or at an upstream, scored by its reward, selected as `irlign bon` selects.

The candidates of a prompt have the seeds that the stage `sample` would give them under the request's seed, so a request with the
run's own seed and settings gives what best_of_n/selected.jsonl holds, up to the rounding that sampling/transformers_engine.py names. Requests are answered together (`Answering`), and
each is scored and selected as soon as its own candidates are there.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from irlign.errors import ConfigError, DataError
from irlign.optimise.best_of_n import candidate_rows, merit, scored_text
from irlign.optimise.label_free import guard_n
from irlign.records import Prompt, PromptContent
from irlign.reward.model import RewardModel
from irlign.runs import request_seed
from irlign.sampling.engine import Drawing, Drawn, Engine, Request, SamplingSettings
from irlign.sampling.transformers_engine import TransformersEngine

Rows = Sequence[tuple[PromptContent, str]]  # prompts and answers to be scored


@dataclass(frozen=True)
class Served:
    """What is served: `policy` (sft or aligned) under the name `name`, each answer the best of `best_of` by the reward called `reward`.

    `choice` is the run's best_of_n/choice.json, `alarms` those of its evaluation, `sampling` its law. `lone_text`: the run's prompts are
    texts, so that a conversation of one user message is one too.
    """

    name: str
    policy: str
    best_of: int
    reward: str
    choice: Mapping[str, Any]
    alarms: Sequence[Mapping[str, str]]
    sampling: SamplingSettings
    lone_text: bool
    force: bool = False

    @property
    def most(self) -> int | None:
        """The largest `best_of` that a request may ask for; None where it was started with --force."""
        return None if self.force else 1 if self.policy != "sft" else self.choice["label_free"] or self.choice["n"]

    def about(self) -> dict[str, Any]:
        """What every reply's extension field says (docs/serve.md)."""
        own = {"policy": self.policy, "reward": self.reward, "best_of": self.best_of, "most_best_of": self.most}
        return {**own, "alarms": [dict(alarm) for alarm in self.alarms]}

    def content(self, given: PromptContent) -> PromptContent:
        """A prompt as the run's own are: where they are texts, a conversation of one user message is its text."""
        if self.lone_text and not isinstance(given, str) and [turn["role"] for turn in given] == ["user"]:
            return given[0]["content"]
        return given

    def guard(self, best_of: int) -> None:
        """Raises ConfigError for a `best_of` that nothing shows to be safe: `irlign bon`'s own guard, and two more for what it never meets."""
        if self.force or best_of <= self.best_of:
            return
        if self.policy != "sft":
            what = f"best_of = {best_of}: Best-of-N was judged with answers of the SFT policy, and this is the {self.policy} one"
            raise ConfigError(what, where="best_of", do="leave it out, or start the server with --policy best-of-n or --force")
        guard_n({**self.choice, "given": best_of}, False)
        if self.most is not None and best_of > self.most:
            what = f"best_of = {best_of}, and the run selects among {self.most}: no judge has shown that more is safe"
            raise ConfigError(what, where="best_of", do="lower it, or start the server with --force")


@dataclass(frozen=True)
class Ask:
    """One prompt, `groups` times the best `kept` of `best_of` answers, each of at most `limit` tokens, under a law and a seed."""

    prompt: Prompt
    groups: int
    best_of: int
    kept: int
    seed: int
    limit: int
    law: SamplingSettings
    watch: Callable[[int, str], None] | None = None

    @property
    def count(self) -> int:
        """Answers to draw."""
        return self.groups * self.best_of

    @property
    def kind(self) -> tuple[Any, ...]:
        """Asks of one kind are drawn together."""
        return self.law.temperature, self.law.top_p, self.law.top_k, *self.law.stop


@dataclass(frozen=True)
class ScoreAsk:
    """Answers to one prompt, to be scored."""

    prompt: PromptContent
    completions: Sequence[str]

    @property
    def count(self) -> int:
        """Answers to score."""
        return len(self.completions)

    @property
    def kind(self) -> None:
        """Scores go together with anything."""
        return None


@dataclass(frozen=True)
class Pick:
    """A returned answer: as it was drawn (`index` among all candidates) and its reward."""

    drawn: Drawn
    reward: float
    index: int


@dataclass(frozen=True)
class Answered:
    """The picks for one prompt, each group's best first; `tokens` were drawn for them in all."""

    picks: Sequence[Pick]
    prompt_tokens: int
    tokens: int


def law_of(
    run: SamplingSettings, *, temperature: float | None, top_p: float | None, top_k: int | None, stop: Sequence[str] | None
) -> SamplingSettings:
    """The run's law with what a request changes of it. Temperature 0, the likeliest token, is top-k of 1 in process; an endpoint is told 0."""
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "stop": None if stop is None else list(stop)}
    given["top_k"] = None if top_k is None else max(0, top_k)
    if temperature == 0 and run.engine != "openai":
        given |= {"temperature": 1.0, "top_k": 1}
    return run.model_copy(update={key: value for key, value in given.items() if value is not None})


def ask(
    served: Served,
    content: PromptContent,
    *,
    law: SamplingSettings,
    n: int = 1,
    best_of: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
) -> Ask:
    """What a request asks for: with `best_of`, the n best of so many; without, n answers that are each the best of the served number.

    Raises ConfigError where `best_of` is not to be had. At temperature 0 all answers are equal, and one is drawn for each group.
    """
    greedy = law.temperature == 0 or law.top_k == 1
    groups, each, kept = (n, 1 if greedy else served.best_of, 1) if best_of is None else (1, best_of, n)
    if kept > each:
        raise ConfigError(f"n = {n} is more than best_of = {each}", where="best_of", do="the n best of best_of answers are returned")
    served.guard(each)
    seed = secrets.randbits(32) if seed is None else seed
    return Ask(Prompt.of(served.content(content), "served"), groups, each, kept, seed, limit or served.sampling.max_new_tokens, law)


def watched(asks: Sequence[Ask], tell: Callable[[tuple[int, str]], None]) -> list[Ask]:
    """The asks, of which those that select nothing `tell` the number of a choice and its text so far while it is drawn."""
    found, first = list[Ask](), 0
    for one in asks:
        watch = (lambda i, text, first=first: tell((first + i, text))) if one.best_of == 1 else None
        found.append(replace(one, watch=watch))
        first += one.groups * one.kept
    return found


class Answerer:
    """What draws, scores and selects; not for two threads at once."""

    def __init__(self, served: Served, engine: Engine, reward: RewardModel):
        self.served, self.engine, self.reward = served, engine, reward

    def begin(self) -> "Answering":
        """Asks to be answered together, none yet."""
        return Answering(self)

    def token_texts(self, pick: Pick) -> list[str]:
        """The text of each drawn token by itself; the end's is empty."""
        assert isinstance(self.engine, TransformersEngine)  # an endpoint tells no tokens
        ends, tokenizer = self.engine.eos_ids, self.engine.policy.tokenizer
        return ["" if i in ends else str(tokenizer.decode([i])) for i in pick.drawn.ids]

    def request(self, one: Ask) -> Request:
        """What is drawn for an ask: every candidate, with the seed that the stage `sample` would give it."""
        stage = f"sample-{self.served.policy}"
        seeds = tuple(request_seed(one.seed, stage, one.prompt.prompt_id, i) for i in range(one.count))
        return Request(one.prompt, seeds, one.limit, one.watch)

    def rewards(self, lots: Mapping[int, Rows]) -> dict[int, np.ndarray | Exception]:
        """The rewards of each lot of answers, all in one batch; where that fails, each lot is tried by itself."""
        if not lots:
            return {}
        rows = [row for lot in lots.values() for row in lot]
        try:
            rewards = self.reward.score([prompt for prompt, _ in rows], [text for _, text in rows])
        except Exception as error:
            if len(lots) == 1:
                return dict.fromkeys(lots, error)
            return {number: found for key, lot in lots.items() for number, found in self.rewards({key: lot}).items()}
        return dict(zip(lots, np.split(rewards, np.cumsum([len(lot) for lot in lots.values()])[:-1]), strict=True))

    def select(self, one: Ask, drawn: Sequence[Drawn], rewards: np.ndarray) -> Answered:
        """The best of each group, by what `irlign bon` compares."""
        name = self.served.reward
        rows = candidate_rows([replace(d.sample, index=i) for i, d in enumerate(drawn)], {name: rewards})
        picks = []
        for start in range(0, one.count, one.best_of):
            best = sorted(rows[start : start + one.best_of], key=lambda row: merit(row, name), reverse=True)
            picks += [Pick(drawn[row["index"]], float(rewards[row["index"]]), row["index"]) for row in best[: one.kept]]
        return Answered(picks, drawn[0].prompt_tokens, sum(d.sample.tokens for d in drawn))


class Answering:
    """Asks of one kind that are answered together, and scores beside them: a `Work` of serving/batches.py.

    Each ask is scored and selected in the turn in which the last of its candidates ends; a prompt that cannot be answered is a
    DataError of its own.
    """

    def __init__(self, answerer: Answerer):
        self.answerer = answerer
        self.drawing: Drawing | None = None
        self.asks, self.scores, self.problems = dict[int, Ask](), dict[int, ScoreAsk](), dict[int, DataError]()

    def add(self, number: int, item: Ask | ScoreAsk) -> None:
        """One more."""
        if isinstance(item, ScoreAsk):
            self.scores[number] = item
            return
        self.drawing = self.drawing or self.answerer.engine.under(item.law).drawing()
        try:
            self.drawing.add({number: self.answerer.request(item)})
            self.asks[number] = item
        except DataError as error:
            self.problems[number] = error

    def drop(self, number: int) -> None:
        """Nobody waits for this one any more."""
        if self.asks.pop(number, None) and self.drawing:
            self.drawing.drop(number)
        self.scores.pop(number, None)
        self.problems.pop(number, None)

    def turn(self) -> list[tuple[int, Any]]:
        """Some tokens further: Answered, or an array of rewards, or an exception, for each that is finished."""
        drawn = self.drawing.turn() if self.drawing and self.asks else {}
        lots: dict[int, Rows] = {number: [(one.prompt, text) for text in one.completions] for number, one in self.scores.items()}
        lots |= {number: [(d.sample.prompt.content, scored_text(d.sample)) for d in of] for number, of in drawn.items()}
        found: dict[int, Any] = {**self.problems, **self.answerer.rewards(lots)}
        for number in drawn:
            one = self.asks.pop(number)
            if not isinstance(found[number], Exception):
                found[number] = self.answerer.select(one, drawn[number], found[number])
        self.scores, self.problems = {}, {}
        return [*found.items()]

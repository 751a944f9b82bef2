"""What every world has in common: the dials, the splits, and how the demonstrator's style differs from the crowd's.

A world is one file beside this one. It says which requests there are (`patterns`, `request`), how the crowd and the expert
answer them (`crowd`, `expert`), what stands around an answer without being worth anything (`style`), and what an answer is
truly worth (`golden`). Content and style come from random numbers of their own, so that no style dial moves a golden value.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import ClassVar, NamedTuple

from irlign.errors import ConfigError
from irlign.records import Demonstration, Prompt, PromptContent, prompt_identity, prompt_to_cell

MOST_HELD_OUT = 4000  # dev and test prompts together: every world has many more different requests
MARKED = 0.2  # share of the crowd's answers with a marker at the start, and with one at the end
FILLERS = (0, 0, 1, 1, 2)  # how many sentences of filler stand in one of the crowd's answers
TRIES = 10_000  # requests drawn in vain before the world is said to have too few


class Pattern(NamedTuple):
    """A skeleton of requests: all but the things that vary within it. `kind` is what out_of_distribution holds out."""

    kind: str
    weight: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """Sentences that carry no reward: `fillers` and the markers `starts` and `ends` are anyone's, `own` the demonstrator's only."""

    fillers: tuple[str, ...]
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    own: tuple[str, ...]

    def dress(self, parts: Sequence[str], heterogeneity: float, rng: Random) -> list[str]:
        """The sentences of an answer with filler and markers around them. The crowd writes at 0. At 1 every answer has
        both markers and one sentence more, and all its filler is of the demonstrator's own vocabulary."""
        dressed = list(parts)
        for _ in range(rng.choice(FILLERS) + (rng.random() < heterogeneity)):
            said = rng.choice(self.own if rng.random() < heterogeneity else self.fillers)
            dressed.insert(rng.randint(0, len(dressed)), said)
        marked = MARKED + (1 - MARKED) * heterogeneity
        if rng.random() < marked:
            dressed.insert(rng.randint(0, len(dressed)), rng.choice(self.starts))
        if rng.random() < marked:
            dressed.append(rng.choice(self.ends))
        return dressed or [rng.choice(self.fillers)]

    def __iter__(self) -> Iterator[str]:
        yield from (*self.fillers, *self.starts, *self.ends, *self.own)


@dataclass(frozen=True)
class World(ABC):
    """A seeded generator with a known true reward; the same values and seed always give the same text.

    The dials move the demonstrations and never the corpus, so that one pi_0 serves all their settings:

    - `demonstrations`: how many there are to train on. Fewer are the first ones of more.
    - `heterogeneity`, 0 to 1: at 0 the demonstrator writes in pi_0's own style (markers as often, filler as long and from the
      same words as the crowd's); at 1 it has markers in every answer, more filler, and vocabulary of its own. None of it
      carries reward, and it is independent of quality. The default marks two answers in three.
    - `quality`: the probability that a train or dev demonstration is the expert's; the others are answers of the crowd.
      Test demonstrations are always the expert's: the yardstick stays.
    - `skeletons`: how many patterns of requests the train demonstrations are drawn from; null for all. Fewer are the first
      ones of more. Dev and test prompts come from all.
    - `out_of_distribution`: test prompts come only from kinds of request (their verbs and objects) that no demonstration
      has, a third of all kinds, by seed; pi_0's corpus has them. Dev stays with train: who chooses has seen no other kind.
    - `skill`: the probability that the expert gets any one thing right.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    chat_template: ClassVar[str] = "none"  # how pi_0 reads requests; as in data.chat_template
    style: ClassVar[Style]

    name: str = ""
    corpus_lines: int = 12000
    demonstrations: int = 400
    dev_prompts: int = 60
    test_prompts: int = 120
    heterogeneity: float = 0.6
    quality: float = 1.0
    skeletons: int | None = None
    out_of_distribution: bool = False
    skill: float = 0.94

    def __post_init__(self) -> None:
        for field in ("corpus_lines", "demonstrations", "dev_prompts", "test_prompts"):
            if not 2 <= getattr(self, field) <= 1_000_000:
                raise ConfigError(f"world.{field} must lie between 2 and 1,000,000, not {getattr(self, field)}", where="world")
        if self.dev_prompts + self.test_prompts > MOST_HELD_OUT:
            raise ConfigError(
                f"world.dev_prompts and world.test_prompts may be {MOST_HELD_OUT:,} together, not {self.dev_prompts + self.test_prompts:,}",
                where="world",
                do="the grammar has too few different requests for more",
            )
        for field in ("heterogeneity", "quality", "skill"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"world.{field} lies between 0 and 1, not {getattr(self, field)}", where="world")
        if self.skeletons is not None and not 1 <= self.skeletons <= len(self.patterns()):
            raise ConfigError(f"world.skeletons lies between 1 and {len(self.patterns())}, not {self.skeletons}", where="world")

    @abstractmethod
    def patterns(self) -> list[Pattern]:
        """Every skeleton of requests, with its weight (above 0) among them."""

    @staticmethod
    @abstractmethod
    def kinds() -> tuple[tuple[str, ...], ...]:
        """The kinds of request, in groups; out_of_distribution holds out a third of each group."""

    @abstractmethod
    def request(self, pattern: Pattern, rng: Random) -> PromptContent:
        """A request of this pattern."""

    @abstractmethod
    def crowd(self, prompt: PromptContent, rng: Random) -> list[str]:
        """The sentences of an ordinary answer, mostly poor."""

    @abstractmethod
    def expert(self, prompt: PromptContent, rng: Random) -> list[str]:
        """The sentences of an answer that is nearly always complete and right."""

    @staticmethod
    @abstractmethod
    def vocabulary() -> Iterator[str]:
        """Every text fragment of the grammar, so that a tokenizer knows all its words; no dial changes it."""

    @staticmethod
    @abstractmethod
    def golden(prompts: Sequence[PromptContent], completions: Sequence[str]) -> list[float]:
        """The true reward of each answer, at most 4. Only evaluation may call it."""

    def corpus(self, seed: int) -> list[tuple[PromptContent, str]]:
        """`corpus_lines` requests with answers of mixed, mostly low quality: what pi_0 is pretrained on."""
        rng, patterns = Random(f"{self.name}-corpus-{seed}"), self.patterns()
        weights = [p.weight for p in patterns]
        prompts = [self.request(pattern, rng) for pattern in rng.choices(patterns, weights, k=self.corpus_lines)]
        return [(prompt, self._crowd_answer(prompt, rng)) for prompt in prompts]

    def splits(self, seed: int) -> dict[str, list[Demonstration]]:
        """The demonstrations by split; dev and test prompts are distinct, and none of them stands in train."""
        rng, patterns = Random(f"{self.name}-requests-{seed}"), self.patterns()
        far = self.far_kinds(seed)
        near = [p for p in patterns if p.kind not in far]
        few = Random(f"{self.name}-skeletons-{seed}").sample(near, len(near))[: self.skeletons]
        taken: set[str] = set()
        prompts: dict[str, list[PromptContent]] = {}
        for split, size, of in (
            ("test", self.test_prompts, [p for p in patterns if p.kind in far] or near),
            ("dev", self.dev_prompts, near),
            ("train", self.demonstrations, few),
        ):
            prompts[split], bounds = [], list(accumulate(p.weight for p in of))
            for _ in range(size):
                prompts[split].append(self._new_request(of, bounds, taken, rng))
                taken |= {prompt_identity(prompts[split][-1])} if split != "train" else set()
        return {split: self._demonstrations(prompts[split], split, seed) for split in ("train", "dev", "test")}

    def far_kinds(self, seed: int) -> frozenset[str]:
        """The kinds of request that only the test prompts have: a third of each group, or none in distribution."""
        rng = Random(f"{self.name}-kinds-{seed}")
        groups = [rng.sample(group, max(1, len(group) // 3)) for group in self.kinds()]
        return frozenset(kind for group in groups for kind in group) if self.out_of_distribution else frozenset()

    def demonstrator(self, prompts: Sequence[PromptContent], seed: int) -> list[str]:
        """The expert's answer to each prompt, in its style. Another seed gives fresh answers to the same prompts."""
        answers = []
        for i, prompt in enumerate(prompts):
            key = f"{self.name}-{seed}-{i}-{prompt_to_cell(prompt)}"
            parts = self.expert(prompt, Random(f"expert-{key}"))
            answers.append(self._text(self.style.dress(parts, self.heterogeneity, Random(f"style-{key}"))))
        return answers

    def _demonstrations(self, prompts: Sequence[PromptContent], split: str, seed: int) -> list[Demonstration]:
        rng = Random(f"{self.name}-quality-{split}-{seed}")
        answers = self.demonstrator(prompts, seed)
        for i, prompt in enumerate(prompts):
            ordinary = self._crowd_answer(prompt, rng)
            if rng.random() >= self.quality and split != "test":
                answers[i] = ordinary
        return [Demonstration(Prompt.of(prompt, split), answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _crowd_answer(self, prompt: PromptContent, rng: Random) -> str:
        return self._text(self.style.dress(self.crowd(prompt, rng), 0.0, rng))

    def _new_request(self, patterns: Sequence[Pattern], bounds: Sequence[float], taken: Collection[str], rng: Random) -> PromptContent:
        for _ in range(TRIES):
            prompt = self.request(rng.choices(patterns, cum_weights=bounds)[0], rng)
            if prompt_identity(prompt) not in taken:
                return prompt
        do = "ask for fewer dev and test prompts, or for more skeletons"
        raise ConfigError("it has too few different requests", where="world", do=do)

    def _text(self, parts: Sequence[str]) -> str:
        """One text of sentences; where no chat template brings it, with the space that follows the request."""
        return (" " if self.chat_template == "none" else "") + " ".join(parts)

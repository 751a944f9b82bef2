"""What draws samples: the Engine protocol and the choice by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from irlign.config import Settings
from irlign.errors import ConfigError
from irlign.records import Prompt, Sample


class SamplingSettings(Settings):
    """How answers are drawn. Every field is passed explicitly, so a model's own generation_config never narrows it."""

    engine: str = Field("transformers", description="what draws the samples: transformers (in process, CPU or GPU)")
    num_generations: int = Field(16, ge=1, description="N: samples of pi_SFT for each dev and test prompt (the Best-of-N pool)")
    train_generations: int = Field(4, ge=1, description="samples of each policy for each train prompt, for the reward")
    initial_generations: int = Field(4, ge=1, description="samples of pi_0 for each dev and test prompt, for evaluation")
    max_new_tokens: int = Field(128, ge=1, description="limit of one answer, in tokens")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the smallest set of tokens with this probability")
    top_k: int = Field(0, ge=0, description="only the k most likely tokens; 0 = all")
    stop: list[str] = Field(default_factory=list, description="strings that end an answer (removed from it)")
    batch_size: int = Field(256, ge=1, description="most answers drawn side by side; fewer where memory is short")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision; auto = bfloat16 where it is supported and faster")
    part_prompts: int = Field(64, ge=1, description="prompts in one stored part: the unit of resume")
    max_cut_share: float = Field(0.5, ge=0, le=1, description="guard: error when more of pi_SFT's answers are cut at the limit")


@dataclass(frozen=True)
class Request:
    """One prompt and the seed of each answer wanted; `first_index` numbers the first of them."""

    prompt: Prompt
    seeds: tuple[int, ...]


class Engine(Protocol):
    """Draws samples for requests; the same request gives the same samples whatever else is asked for.

    `settled` is what the engine chose by looking at the machine: it is stored with every part and handed back on resume.
    `halvings` counts how often memory ran out in the last draw, so that its batches are not the settled ones.
    """

    name: str
    settled: dict[str, Any]
    halvings: int

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """The samples of every request, in order, indices from 0."""
        ...


def check_engine(name: str) -> None:
    """Raises ConfigError on an unknown name."""
    if name != "transformers":
        raise ConfigError(f"no engine {name!r}", where="sampling.engine", do="use transformers")


def load_engine(policy: Path, settings: SamplingSettings, chat_template: str, settled: Mapping[str, Any] | None = None) -> Engine:
    """The engine named in the settings, holding the policy in a folder; `settled` as an earlier part recorded it.

    Raises ConfigError on an unknown name.
    """
    check_engine(settings.engine)
    from irlign.sampling.transformers_engine import TransformersEngine

    return TransformersEngine(policy, settings, chat_template, settled)

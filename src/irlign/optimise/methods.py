"""The policy methods: how each trains, from which policy, and on what rows of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from irlign.data.splits import stored_demonstrations
from irlign.launch import ProcessSettings
from irlign.optimise.best_of_n import scored_text
from irlign.optimise.distill import train_distill, winners
from irlign.optimise.preference import (
    Labelled,
    PreferenceSettings,
    best_and_worst,
    demonstration_over_own,
    desirable_and_not,
    dpo_config,
    kto_config,
    train_dpo,
    train_kto,
)
from irlign.optimise.rloo import OnPolicySettings, on_policy_config, train_on_policy
from irlign.optimise.scoring import scores_of
from irlign.optimise.weighted_sft import train_weighted_sft
from irlign.records import Contrast, Demonstration, Sample
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool, read_pool, stored_samples
from irlign.training import Config, TrainerSettings

DRAWN = "answers of its own as the reward `{reward}` scored them"
ONE_ROUND = {  # why
    "weighted-sft": "weighted-sft learns from demonstrations",
    "rloo": "rloo draws new ones at every step",
    "grpo": "grpo draws new ones at every step",
}


class OptimiseSettings(TrainerSettings):
    """From the reward to a policy that needs none at inference, published only where it is shown to beat pi_SFT."""

    method: Literal["distill", "weighted-sft", "dpo", "spin", "kto", "rloo", "grpo", "none"] = Field(
        "distill",
        description="distill: fine-tune on Best-of-n winners; weighted-sft: SFT with occupancy weights, from pi_0; dpo: the best of a "
        "prompt's answers over the worst; spin: demonstrations over own answers; kto: demonstrations good, own answers bad; rloo, grpo: "
        "answers drawn and scored as it learns; none: leave the stage out",
    )
    rounds: int = Field(1, ge=1, description="each round after the first samples the policy of the one before; an alarm ends them")
    answers: int | None = Field(
        None, ge=1, description="answers to each train prompt that a round learns from; null: sampling.train_generations, which are stored"
    )
    winners: int = Field(1, ge=1, description="distill: so many of each train prompt's answers are learned, the best by the reward")
    generations: int = Field(4, ge=1, description="samples of each candidate for each dev and test prompt")
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings, description="dpo, spin, kto")
    on_policy: OnPolicySettings = Field(default_factory=OnPolicySettings, description="rloo, grpo")

    @model_validator(mode="after")
    def _possible(self) -> "OptimiseSettings":
        if self.method in ONE_ROUND and self.rounds > 1:
            raise ValueError(f"a round learns from samples of the one before, and {ONE_ROUND[self.method]}: leave optimise.rounds out")
        if self.method == "kto" and self.per_device_train_batch_size == 1:
            raise ValueError("kto estimates its KL over the rows of a batch: per_device_train_batch_size must be 2 or more")
        return self


@dataclass(frozen=True)
class Work:
    """What the stage works on: a run up to `bon`, the settings, how answers are drawn here, `reward` (the one that selects), and the folder it
    builds in."""

    run: Run
    settings: OptimiseSettings
    sampling: SamplingSettings
    reward: str
    chat_template: str
    folder: Path
    report_to: str = "none"
    processes: ProcessSettings = field(default_factory=ProcessSettings)

    def round(self, number: int) -> Path:
        """Where a round's policy, pools and log are built."""
        return self.folder / "rounds" / str(number)

    def policy(self, number: int) -> Path:
        """A round's policy; pi_SFT stands before the first."""
        return self.round(number) / "policy" if number else self.run.path("policies/sft")

    def start(self, number: int, name: str) -> Path:
        """The policy that a round's training starts from: a policy of the run by its name, or `before`, that of the round before."""
        return self.policy(number - 1) if name == "before" else self.run.path("policies", name)

    def draw(self, number: int, name: str, wanted: Sequence[tuple[Any, int]]) -> list[Sample]:
        """Samples of a round's policy, in `NAME.parquet` beside it."""
        pool = self.round(number) / f"{name}.parquet"
        about: dict[str, Any] = {"chat_template": self.chat_template, "seed": self.run.seed, "name": f"aligned-{number}"}
        draw_pool(self.policy(number), wanted, self.sampling, folder=pool, **about)
        return read_pool(pool)


def own_answers(work: Work, number: int) -> list[Sample]:
    """The answers of the policy before this round to the train prompts: those of pi_SFT are stored, and drawn anew where they are too few."""
    stored, wanted = stored_samples(work.run, "sft", "train"), work.settings.answers or work.sampling.train_generations
    if number == 1 and wanted <= work.sampling.train_generations:
        return [s for s in stored if s.index < wanted]
    return work.draw(number - 1, "train", [(p, wanted) for p in {s.prompt.prompt_id: s.prompt for s in stored}.values()])


def scored(work: Work, number: int, samples: Sequence[Sample]) -> np.ndarray:
    """Their scores under the reward that selects, for a round. Shape [len(samples)]."""
    prompts, texts = [s.prompt.content for s in samples], [scored_text(s) for s in samples]
    rewards = {work.reward: work.run.path("rewards", work.reward)}
    kept = work.round(number) / "scores"
    return scores_of(rewards, prompts, texts, work.sampling, kept)[work.reward]


def won_answers(work: Work, number: int) -> list[Sample]:
    """Best-of-n on the train prompts: the winners by the selecting reward among the answers of the policy before this round."""
    samples = own_answers(work, number)
    return winners(samples, scored(work, number, samples), work.settings.winners)


def ranked_answers(work: Work, number: int) -> list[Contrast]:
    """The best of each train prompt's answers over the worst, by the selecting reward."""
    samples = own_answers(work, number)
    return best_and_worst(samples, scored(work, number, samples))


def shown_over_own(work: Work, number: int) -> list[Contrast]:
    """The train demonstrations over the answers of the policy before this round, and of the one before that (arXiv 2401.01335: the samples
    of the last two rounds are mixed)."""
    samples = [s for n in (number, number - 1) if n > 0 for s in own_answers(work, n)]
    return demonstration_over_own(samples, demonstrated(work, number))


def shown_and_own(work: Work, number: int) -> list[Labelled]:
    """The train demonstrations, desirable, and the answers of the policy before this round, undesirable."""
    return desirable_and_not(own_answers(work, number), demonstrated(work, number))


def first_answers(work: Work, number: int) -> list[Sample]:
    """pi_SFT's stored answers to the train prompts: where a policy that draws its own starts."""
    return stored_samples(work.run, "sft", "train")


def pairing(settings: OptimiseSettings, _: SamplingSettings) -> Config:
    """The training arguments for pairs."""
    return dpo_config(settings.preference)


def labelling(settings: OptimiseSettings, _: SamplingSettings) -> Config:
    """The training arguments for single answers."""
    return kto_config(settings.preference)


def drawing(method: Literal["rloo", "grpo"], settings: OptimiseSettings, sampling: SamplingSettings) -> Config:
    """The training arguments of a policy that draws its own answers."""
    return on_policy_config(method, settings.on_policy, sampling)


def scoring(work: Work) -> dict[str, Any]:
    """What scores those answers."""
    return {"reward": work.run.path("rewards", work.reward), "length_penalty": work.settings.on_policy.length_penalty}


def demonstrated(work: Work, number: int) -> list[Demonstration]:
    """The train demonstrations."""
    return stored_demonstrations(work.run, "train")


class Method(NamedTuple):
    """How a policy is trained, from which policy (`before`: that of the round before) and on what rows; what its card says that it has
    learned from, `{reward}` where the reward has a part in it; its own training arguments; and what else of the work its training takes."""

    train: Callable[..., dict[str, Any]]
    start: str
    rows: Callable[[Work, int], Sequence[Any]]
    source: str
    config: Callable[[OptimiseSettings, SamplingSettings], Config] | None = None
    options: Callable[[Work], dict[str, Any]] = lambda work: {}


METHODS: dict[str, Method] = {
    "distill": Method(train_distill, "sft", won_answers, "answers chosen by the reward `{reward}`"),
    "weighted-sft": Method(train_weighted_sft, "init", demonstrated, "demonstrations"),
    "dpo": Method(train_dpo, "sft", ranked_answers, "answers ranked by the reward `{reward}`", pairing),
    "spin": Method(train_dpo, "before", shown_over_own, "demonstrations over its own answers", pairing),
    "kto": Method(train_kto, "sft", shown_and_own, "demonstrations and its own answers", labelling),
    "rloo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "rloo"), scoring),
    "grpo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "grpo"), scoring),
}


def own_config(settings: OptimiseSettings, sampling: SamplingSettings) -> Config | None:
    """The method's own training arguments; None where TrainingArguments will do. Raises ConfigError where TRL is missing."""
    config = METHODS[settings.method].config
    return config(settings, sampling) if config else None

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
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.distill import train_distill, winners
from irlign.optimise.ditto import ranked_by_policy
from irlign.optimise.gad import train_gad
from irlign.optimise.gsil import train_gsil
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
from irlign.optimise.rlsr import DemonstrationCosine
from irlign.optimise.scoring import scores_of
from irlign.optimise.weighted_sft import train_weighted_sft
from irlign.records import Contrast, Demonstration, Sample
from irlign.reward.contrasts import RefreshName
from irlign.reward.controls import by_prompt
from irlign.reward.load import load_resident
from irlign.reward.train import RewardSettings
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool, read_pool, stored_samples
from irlign.training import Config, TrainerSettings

DRAWN = "answers of its own as the reward `{reward}` scored them"
LIKENED = "answers of its own as they resemble the demonstration"
DISCRIMINATED = "answers of its own as a discriminator of demonstrations scored them"
ITSELF = "{} draws its answers itself, so a second round would only go on under the same reward: train longer, or "
ONE_ROUND = {  # why
    "weighted-sft": "a round learns from samples of the one before, and {} learns from demonstrations: leave optimise.rounds out",
    **dict.fromkeys(("rloo", "grpo"), f"{ITSELF}refresh it (optimise.refresh)"),
    **dict.fromkeys(("rlsr", "gad"), f"{ITSELF}leave optimise.rounds out"),
}
SEEDS_APART = 1009  # between the seeds of two rounds


class OptimiseSettings(TrainerSettings):
    """From the reward to a policy that needs none at inference, published only where it is shown to beat pi_SFT."""

    method: Literal["distill", "weighted-sft", "dpo", "spin", "ditto", "kto", "gsil", "rloo", "grpo", "rlsr", "gad", "none"] = Field(
        "distill",
        description="distill: fine-tune on Best-of-n winners; weighted-sft: SFT with occupancy weights, from pi_0; dpo: the best of a "
        "prompt's answers over the worst; spin: demonstrations over own answers; ditto: those over earlier policies' too; kto: demonstrations good, own answers bad; "
        "gsil: the same as a classification; rloo, grpo: answers drawn and scored as it learns; rlsr: scored by their likeness to the "
        "demonstration; gad: by a discriminator of demonstrations; none: leave the stage out",
    )
    rounds: int = Field(1, ge=1, description="each round after the first samples the policy of the one before; an alarm ends them")
    refresh: Literal["none"] | RefreshName = Field(
        "none",
        description="from the second round on the reward is trained anew, worse-better as contrasts are named: current-demo: demonstrations over "
        "answers of the round before; current-sft: pi_SFT's over those; init-current: those over pi_0's; each round then goes on from the "
        "one before. none: the same reward in all rounds, each from pi_SFT",
    )
    replay: bool = Field(True, description="refresh: the answers of pi_0 and of all earlier rounds are on the worse side too")
    answers: int | None = Field(
        None, ge=1, description="answers to each train prompt that a round learns from; null: sampling.train_generations, which are stored"
    )
    winners: int = Field(1, ge=1, description="distill: so many of each train prompt's answers are learned, the best by the reward")
    generations: int = Field(4, ge=1, description="samples of each candidate for each dev and test prompt")
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings, description="dpo, spin, ditto, kto, gsil")
    on_policy: OnPolicySettings = Field(default_factory=OnPolicySettings, description="rloo, grpo, rlsr, gad")
    discriminator: TrainerSettings = Field(default_factory=TrainerSettings, description="gad: how its discriminator trains")

    @model_validator(mode="after")
    def _possible(self) -> "OptimiseSettings":
        if self.method in ONE_ROUND and self.rounds > 1 and (self.refresh == "none" or not rewarded(self.method)):
            raise ValueError(ONE_ROUND[self.method].format(self.method))
        if self.refresh != "none" and self.method != "none":
            if not rewarded(self.method):
                raise ValueError(f"{self.method} asks no reward, so there is none to refresh: optimise.refresh=none")
            if self.rounds == 1:
                raise ValueError(
                    "the reward is refreshed from the second round on: give optimise.rounds of 2 or more, or leave refresh out"
                )
        if self.method == "kto" and self.per_device_train_batch_size == 1:
            raise ValueError("kto estimates its KL over the rows of a batch: per_device_train_batch_size must be 2 or more")
        return self


def stage_of(name: str) -> str:
    """The stage that publishes the policy of this name: `optimise` is that of `aligned`."""
    return "optimise" if name == "aligned" else f"optimise-{name}"


@dataclass(frozen=True)
class Work:
    """What the stage works on: a run up to `bon`, the settings, how answers are drawn here, `reward` (the one that selects), the folder it
    builds in, and the `name` that the published policy gets; for rewards that are refreshed how the run's own was learned, and how hard it is
    held to the likelihood."""

    run: Run
    settings: OptimiseSettings
    sampling: SamplingSettings
    reward: str
    chat_template: str
    folder: Path
    report_to: str = "none"
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    name: str = "aligned"
    learning: RewardSettings | None = None
    likelihood: float = 0.0

    @property
    def stage(self) -> str:
        """The stage's name, and that of the folder with choice.json."""
        return stage_of(self.name)

    def round(self, number: int) -> Path:
        """Where a round's policy, pools and log are built."""
        return self.folder / "rounds" / str(number)

    def policy(self, number: int) -> Path:
        """A round's policy; pi_SFT stands before the first."""
        return self.round(number) / "policy" if number else self.run.path("policies/sft")

    def start(self, number: int, name: str) -> Path:
        """The policy that a round's training starts from: a policy of the run by its name, or `before`, that of the round before, which
        it always is where the reward is refreshed."""
        return self.policy(number - 1) if name == "before" or self.settings.refresh != "none" else self.run.path("policies", name)

    @property
    def refreshed(self) -> RewardSettings:
        """How a reward is refreshed: as the run's own was learned, on another contrast."""
        assert self.learning is not None  # the stage hands it over where it is asked for
        return self.learning.model_copy(update={"contrast": self.settings.refresh, "mixture": {}, "ensemble": []})

    def scorer(self, number: int) -> Path:
        """The reward that a round learns from: the one that selects, from the second round on the refreshed one where it is refreshed."""
        if number == 1 or self.settings.refresh == "none":
            return self.run.path("rewards", self.reward)
        return self.round(number) / "reward" / (f"{self.settings.refresh}+likelihood" if self.likelihood else self.settings.refresh)

    def draw(self, number: int, name: str, wanted: Sequence[tuple[Any, int]]) -> list[Sample]:
        """Samples of a round's policy, in `NAME.parquet` beside it."""
        pool = self.round(number) / f"{name}.parquet"
        about: dict[str, Any] = {"chat_template": self.chat_template, "seed": self.run.seed, "name": f"aligned-{number}"}
        draw_pool(self.policy(number), wanted, self.sampling, folder=pool, **about)
        return read_pool(pool)

    def drawn(self, number: int) -> int:
        """Tokens that were drawn of the policy before this round on the train prompts."""
        pool = self.round(number - 1) / "train.parquet"
        return sum(sample.tokens for sample in read_pool(pool)) if pool.exists() else 0


def own_answers(work: Work, number: int) -> list[Sample]:
    """The answers of the policy before this round to the train prompts: those of pi_SFT are stored, and drawn anew where they are too few."""
    stored, wanted = stored_samples(work.run, "sft", "train"), work.settings.answers or work.sampling.train_generations
    if number == 1 and wanted <= work.sampling.train_generations:
        return [s for s in stored if s.index < wanted]
    return work.draw(number - 1, "train", [(p, wanted) for p in {s.prompt.prompt_id: s.prompt for s in stored}.values()])


def scored(work: Work, number: int, samples: Sequence[Sample]) -> np.ndarray:
    """Their scores under the reward of this round. Shape [len(samples)]."""
    return scores_of({"reward": work.scorer(number)}, *scored_texts(samples), work.sampling, work.round(number) / "scores")["reward"]


def won_answers(work: Work, number: int) -> list[Sample]:
    """Best-of-n on the train prompts: the winners by the reward of this round among the answers of the policy before this round."""
    samples = own_answers(work, number)
    return winners(samples, scored(work, number, samples), work.settings.winners)


def ranked_answers(work: Work, number: int) -> list[Contrast]:
    """The best of each train prompt's answers over the worst, by the reward of this round."""
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


def shown_over_all_before(work: Work, number: int) -> list[Contrast]:
    """The train demonstrations over the answers of every policy before this round, and newer answers over older (optimise/ditto.py)."""
    return ranked_by_policy([own_answers(work, n) for n in range(number, 0, -1)], demonstrated(work, number), work.run.seed)


def first_answers(work: Work, number: int) -> list[Sample]:
    """pi_SFT's stored answers to the train prompts: where a policy that draws its own starts."""
    return stored_samples(work.run, "sft", "train")


def answers_beside_shown(work: Work, number: int) -> list[Sample]:
    """Those of them whose prompt has a demonstration."""
    shown = by_prompt(demonstrated(work, number))
    return [sample for sample in first_answers(work, number) if sample.prompt.prompt_id in shown]


def pairing(settings: OptimiseSettings, _: SamplingSettings) -> Config:
    """The training arguments for pairs."""
    return dpo_config(settings.preference)


def labelling(settings: OptimiseSettings, _: SamplingSettings) -> Config:
    """The training arguments for single answers."""
    return kto_config(settings.preference)


def drawing(trainer: Literal["rloo", "grpo"], settings: OptimiseSettings, sampling: SamplingSettings) -> Config:
    """The training arguments of a policy that draws its own answers."""
    return on_policy_config(trainer, settings.on_policy, sampling)


def scoring(work: Work, number: int) -> dict[str, Any]:
    """What scores those answers."""
    own = work.settings.on_policy
    return {"reward": load_resident(work.scorer(number)), "length_penalty": own.length_penalty, "objective": own.objective}


def comparing(work: Work, number: int) -> dict[str, Any]:
    """What scores them by the demonstration of their prompt."""
    own = work.settings.on_policy
    reward = DemonstrationCosine(by_prompt(demonstrated(work, number)), own.encoder, work.chat_template)
    return {"reward": reward, "length_penalty": own.length_penalty}


def discriminating(work: Work, number: int) -> dict[str, Any]:
    """What the discriminator is made of, which scores them."""
    own = work.settings
    shown, penalty = demonstrated(work, number), own.on_policy.length_penalty
    return {"demonstrations": shown, "discriminator": own.discriminator, "length_penalty": penalty}


def classifying(work: Work, number: int) -> dict[str, Any]:
    """The scale and the shift of gsil's logit."""
    return {"beta": work.settings.preference.beta, "shift": work.settings.preference.shift}


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
    options: Callable[[Work, int], dict[str, Any]] = lambda work, number: {}


METHODS: dict[str, Method] = {
    "distill": Method(train_distill, "sft", won_answers, "answers chosen by the reward `{reward}`"),
    "weighted-sft": Method(train_weighted_sft, "init", demonstrated, "demonstrations"),
    "dpo": Method(train_dpo, "sft", ranked_answers, "answers ranked by the reward `{reward}`", pairing),
    "spin": Method(train_dpo, "before", shown_over_own, "demonstrations over its own answers", pairing),
    "ditto": Method(train_dpo, "sft", shown_over_all_before, "demonstrations over its own answers, and newer ones over older", pairing),
    "kto": Method(train_kto, "sft", shown_and_own, "demonstrations and its own answers", labelling),
    "gsil": Method(train_gsil, "before", shown_and_own, "demonstrations and its own answers", options=classifying),
    "rloo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "rloo"), scoring),
    "grpo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "grpo"), scoring),
    "rlsr": Method(train_on_policy, "sft", answers_beside_shown, LIKENED, partial(drawing, "grpo"), comparing),
    "gad": Method(train_gad, "sft", first_answers, DISCRIMINATED, partial(drawing, "grpo"), discriminating),
}


def rewarded(method: str) -> bool:
    """Whether the reward has a part in a method."""
    return method in METHODS and "{reward}" in METHODS[method].source


def own_config(settings: OptimiseSettings, sampling: SamplingSettings) -> Config | None:
    """The method's own training arguments; None where TrainingArguments will do. Raises ConfigError where TRL is missing."""
    config = METHODS[settings.method].config
    return config(settings, sampling) if config else None

"""The policy methods: how each trains, from which policy, and on what rows of a run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from irlign.data.splits import stored_demonstrations
from irlign.errors import ConfigError
from irlign.optimise.dense import WORDS, dense_of
from irlign.optimise.distill import train_distill, winners
from irlign.optimise.ditto import ranked_by_policy
from irlign.optimise.gad import discriminator_of
from irlign.optimise.gsil import train_gsil
from irlign.optimise.preference import (
    Labelled,
    best_and_worst,
    demonstration_over_own,
    desirable_and_not,
    dpo_config,
    kto_config,
    train_dpo,
    train_kto,
)
from irlign.optimise.rloo import on_policy_config, train_on_policy
from irlign.optimise.rlsr import DemonstrationCosine
from irlign.optimise.settings import OptimiseSettings
from irlign.optimise.weighted_sft import train_weighted_sft
from irlign.optimise.work import Work, own_answers, scored
from irlign.records import Contrast, Demonstration, Sample
from irlign.reward.controls import by_prompt
from irlign.reward.load import load_resident
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import stored_samples
from irlign.training import Config

DRAWN = "answers of its own as the reward `{reward}` scored them"
LIKENED = "answers of its own as they resemble the demonstration"
DISCRIMINATED = "answers of its own as a discriminator of demonstrations scored them"


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
    """The training arguments of a policy that draws its own answers. Raises ConfigError as `on_policy_config` does, and where TRL would leave out
    answers that end at a stop string: it takes them for cut."""
    if sampling.stop and settings.trainer.get("mask_truncated_completions"):
        what = "TRL takes answers that end at a stop string for cut, and would learn from none of them"
        raise ConfigError(what, where="optimise.trainer.mask_truncated_completions", do="leave it out, or sampling.stop")
    return on_policy_config(trainer, settings.on_policy, sampling)


def ending(work: Work) -> dict[str, Any]:
    """What an answer that is drawn in training loses by its length, where it ends, and when training does."""
    own = work.settings.on_policy
    return {"length_penalty": own.length_penalty, "longest": own.max_length_ratio, "stop": work.sampling.stop}


def scoring(work: Work, number: int) -> dict[str, Any]:
    """What scores those answers."""
    reward = partial(load_resident, work.scorer(number)) if work.settings.rewarded else None
    return {"reward": reward, "objective": work.settings.on_policy.objective, **ending(work)}


def scoring_tokens(work: Work, number: int) -> dict[str, Any]:
    """The same, and what pays single tokens, where the settings ask for it."""
    if work.settings.on_policy.dense == "none":
        return scoring(work, number)
    dense = dense_of(work, number)
    return {**scoring(work, number), "dense": dense, "learned": dense.learned}


def comparing(work: Work, number: int) -> dict[str, Any]:
    """What scores them by the demonstration of their prompt."""
    shown, encoder = by_prompt(demonstrated(work, number)), work.settings.on_policy.encoder
    return {"reward": partial(DemonstrationCosine, shown, encoder, work.chat_template), **ending(work)}


def discriminating(work: Work, number: int) -> dict[str, Any]:
    """The discriminator that scores them."""
    place, learned = discriminator_of(work, number)
    return {"reward": partial(load_resident, place), "learned": learned, **ending(work)}


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
    "grpo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "grpo"), scoring_tokens),
    "rlsr": Method(train_on_policy, "sft", answers_beside_shown, LIKENED, partial(drawing, "grpo"), comparing),
    "gad": Method(train_on_policy, "sft", first_answers, DISCRIMINATED, partial(drawing, "grpo"), discriminating),
}


def source_of(settings: OptimiseSettings) -> str:
    """What a policy has learned from, in words, `{reward}` where the reward has a part in it."""
    own, whole = settings.on_policy, METHODS[settings.method].source
    if own.dense == "none":
        return whole
    return WORDS[own.dense] + (f", and {whole}" if own.dense_share < 1 else "")


def own_config(settings: OptimiseSettings, sampling: SamplingSettings) -> Config | None:
    """The method's own training arguments; None where TrainingArguments will do. Raises ConfigError where TRL is missing."""
    config = METHODS[settings.method].config
    return config(settings, sampling) if config else None

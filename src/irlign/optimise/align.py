"""The stage `optimise`: rounds of a method make candidates for the aligned policy, and the safety net publishes one of them or pi_SFT.

Each round starts from the same policy again (spin: from the round before); what changes from round to round is whose answers it learns
from: those of pi_SFT in the first, those of the round before in the others.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, read_table, remove, write_json
from irlign.optimise.best_of_n import scored_text
from irlign.optimise.distill import train_distill, winners
from irlign.optimise.label_free import FEWEST, judge_pool
from irlign.optimise.preference import PreferenceSettings, best_and_worst, dpo_config, train_dpo
from irlign.optimise.rloo import OnPolicySettings, on_policy_config, train_on_policy
from irlign.optimise.safety_net import SFT, Candidate, Judged, alarms_of, choice_of, judged_gains, kl
from irlign.optimise.weighted_sft import train_weighted_sft
from irlign.policy.likelihood import answer_log_probs
from irlign.progress import say
from irlign.records import Contrast, Demonstration, Sample
from irlign.reward.load import score_all
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool, read_pool, stored_samples
from irlign.training import Config, TrainerSettings

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [alignment-from-demonstrations, inverse-reinforcement-learning]
---
# aligned: a policy that needs no reward at inference

{what} Made by irlign {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForCausalLM, AutoTokenizer))
```
Prompts are read in the chat template `{template}`. `optimise/choice.json` of its run says what was tried and how it was weighed.
"""
TUNED = """Trained by `{method}` ({name}) from {source}. A judge of held-out demonstrations, which had no part in it, puts its answers {mean:+.2f} standard deviations above those of the SFT policy (at least {low:+.2f}) on {prompts} dev prompts. KL to the SFT
policy: {sft:.1f} nats an answer, to the initial policy {initial:.1f}."""

DRAWN = "answers of its own as the reward `{reward}` scored them"
ONE_ROUND = {  # why
    "weighted-sft": "weighted-sft learns from demonstrations",
    "rloo": "rloo draws new ones at every step",
    "grpo": "grpo draws new ones at every step",
}


class OptimiseSettings(TrainerSettings):
    """From the reward to a policy that needs none at inference, published only where it is shown to beat pi_SFT."""

    method: Literal["distill", "weighted-sft", "dpo", "rloo", "grpo", "none"] = Field(
        "distill",
        description="distill: fine-tune on Best-of-n winners; weighted-sft: SFT with occupancy weights, from pi_0; dpo: the best of a "
        "prompt's answers over the worst; rloo, grpo: answers drawn and scored as it learns; none: leave the stage out",
    )
    rounds: int = Field(1, ge=1, description="each round after the first samples the policy of the one before; an alarm ends them")
    winners: int = Field(1, ge=1, description="distill: so many of each train prompt's answers are learned, the best by the reward")
    generations: int = Field(4, ge=1, description="samples of each candidate for each dev and test prompt")
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings, description="dpo")
    on_policy: OnPolicySettings = Field(default_factory=OnPolicySettings, description="rloo, grpo")

    @model_validator(mode="after")
    def _one_round(self) -> "OptimiseSettings":
        if self.method in ONE_ROUND and self.rounds > 1:
            raise ValueError(f"a round learns from samples of the one before, and {ONE_ROUND[self.method]}: leave optimise.rounds out")
        return self


@dataclass(frozen=True)
class Work:
    """What the stage works on: a run up to `bon`, the settings, `reward` (the one that selects), and the folder it builds in."""

    run: Run
    settings: OptimiseSettings
    sampling: SamplingSettings
    reward: str
    chat_template: str
    folder: Path
    report_to: str = "none"

    def round(self, number: int) -> Path:
        """Where a round's policy, pools and log are built."""
        return self.folder / "rounds" / str(number)

    def start(self, number: int, name: str) -> Path:
        """The policy that a round's training starts from: a policy of the run by its name, or `before`, that of the round before (pi_SFT in
        the first)."""
        return (
            self.round(number - 1) / "policy"
            if name == "before" and number > 1
            else self.run.path("policies", name.replace("before", "sft"))
        )

    def draw(self, number: int, name: str, wanted: Sequence[tuple[Any, int]]) -> list[Sample]:
        """Samples of a round's policy, in `NAME.parquet` beside it. Its weights are here and no endpoint knows it, so they are drawn here."""
        pool = self.round(number) / f"{name}.parquet"
        about: dict[str, Any] = {"chat_template": self.chat_template, "seed": self.run.seed, "name": f"aligned-{number}"}
        draw_pool(self.round(number) / "policy", wanted, self.sampling.model_copy(update={"engine": "transformers"}), folder=pool, **about)
        return read_pool(pool)


def own_answers(work: Work, number: int) -> list[Sample]:
    """The answers of the policy before this round to the train prompts."""
    samples = stored_samples(work.run, "sft", "train")
    if number == 1:
        return samples
    asked = {s.prompt.prompt_id: s.prompt for s in samples}.values()
    return work.draw(number - 1, "train", [(p, work.sampling.train_generations) for p in asked])


def scored(work: Work, samples: Sequence[Sample]) -> np.ndarray:
    """Their scores under the reward that selects. Shape [len(samples)]."""
    prompts, texts = [s.prompt.content for s in samples], [scored_text(s) for s in samples]
    return score_all({work.reward: work.run.path("rewards", work.reward)}, prompts, texts)[work.reward]


def won_answers(work: Work, number: int) -> list[Sample]:
    """Best-of-n on the train prompts: the winners by the selecting reward among the answers of the policy before this round."""
    samples = own_answers(work, number)
    return winners(samples, scored(work, samples), work.settings.winners)


def ranked_answers(work: Work, number: int) -> list[Contrast]:
    """The best of each train prompt's answers over the worst, by the selecting reward."""
    samples = own_answers(work, number)
    return best_and_worst(samples, scored(work, samples))


def first_answers(work: Work, number: int) -> list[Sample]:
    """pi_SFT's answers to the train prompts: where a policy that draws its own starts."""
    return own_answers(work, 1)


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
    "dpo": Method(
        train_dpo, "sft", ranked_answers, "answers ranked by the reward `{reward}`", lambda settings, _: dpo_config(settings.preference)
    ),
    "rloo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "rloo"), scoring),
    "grpo": Method(train_on_policy, "sft", first_answers, DRAWN, partial(drawing, "grpo"), scoring),
}


def own_config(settings: OptimiseSettings, sampling: SamplingSettings) -> Config | None:
    """The method's own training arguments; None where TrainingArguments will do. Raises ConfigError where TRL is missing."""
    config = METHODS[settings.method].config
    return config(settings, sampling) if config else None


def align(work: Work, version: str) -> dict[str, Any]:
    """Make the candidates, choose, and write policies/aligned, pools/aligned.parquet and optimise/choice.json below the work's folder.

    Returns what choice.json holds. Without a judge nothing could be shown, so nothing is trained and pi_SFT is published.
    """
    rows = [row for row in read_table(work.run.path("best_of_n/candidates.parquet")) if row["split"] == "dev"]
    rewarded = "{reward}" in METHODS[work.settings.method].source
    shown, about = stored_demonstrations(work.run, "dev"), {"method": work.settings.method, "reward": work.reward if rewarded else None}
    if not rows or rows[0]["judge"] is None:
        choice = choice_of([], {}, f"{len(shown)} held-out demonstrations are too few for a judge ({FEWEST} are needed)")
    else:
        sft = Judged([Sample.from_row(row) for row in rows], np.array([row["judge"] for row in rows]))
        choice = _rounds(work, sft, shown)
    choice = {**about, **choice, "demonstrations": len(shown)}
    _publish(work, choice, version)
    return choice


def _rounds(work: Work, sft: Judged, shown: Sequence[Demonstration]) -> dict[str, Any]:
    """Rounds until the settings' number is reached, an alarm goes off or there is nothing to learn from, and the choice among them."""
    method = METHODS[work.settings.method]
    wanted = [
        (p, work.settings.generations)
        for p in {s.prompt.prompt_id: s.prompt for s in stored_samples(work.run, "sft", "dev", "test")}.values()
    ]
    base = sft.measures(work.settings.generations)
    found: list[Candidate] = []
    kept = "no train prompt has a finished answer to learn from"
    for number in range(1, work.settings.rounds + 1):
        place = work.round(number)
        if not (place / "log.json").exists():
            if not (rows := method.rows(work, number)):
                break
            options: dict[str, Any] = {"chat_template": work.chat_template, "seed": work.run.seed, "report_to": work.report_to}
            options |= {"folder": place / "policy", "checkpoints": place / "checkpoints"}
            options |= {"config": config} if (config := own_config(work.settings, work.sampling)) else {}
            options |= method.options(work)
            write_json(place / "log.json", method.train(work.start(number, method.start), rows, shown, work.settings, **options))
        answers = [s for s in work.draw(number, "pool", wanted) if s.prompt.split == "dev"]
        found.append(_weighed(work, number, answers, sft, base, shown, [c.gains_P for c in found]))
        if alarms := found[-1].about["alarms"]:
            say(f"optimise: {alarms[0]['name']}, so no further round is made")
            break
    few = [s for s in sft.samples if s.index < work.settings.generations]
    nats = [answer_log_probs(work.run.path("policies", name), few, chat_template=work.chat_template) for name in ("sft", "init")]
    return choice_of(found, {**base, "kl_initial": kl(Judged(few, np.zeros(len(few))), nats[0], nats[1])}, kept)


def _weighed(
    work: Work,
    number: int,
    answers: Sequence[Sample],
    sft: Judged,
    base: dict[str, float],
    shown: Sequence[Demonstration],
    earlier: Sequence[np.ndarray],
) -> Candidate:
    """A round's policy as a candidate: judged, with the KL it cost, and alarms."""
    template = work.chat_template
    logits, _, auc = judge_pool(
        work.run.path("policies/init"), answers, stored_samples(work.run, "init", "dev"), shown, chat_template=template
    )
    assert logits is not None  # pi_SFT's answers were judged by the same demonstrations
    judged = Judged(answers, logits)
    policies = (work.round(number) / "policy", *(work.run.path("policies", name) for name in ("sft", "init")))
    own, *others = (answer_log_probs(folder, answers, chat_template=template) for folder in policies)
    gains, measures = judged_gains(judged, sft), judged.measures(work.settings.generations)
    say(f"optimise: round {number}: judged gain over SFT {gains.mean():+.2f} sd on {len(gains)} dev prompts")
    about = {**{f"kl_{name}": kl(judged, own, other) for name, other in zip(("sft", "initial"), others, strict=True)}, **measures}
    log = read_json(work.round(number) / "log.json")
    return Candidate(
        f"round-{number}", gains, {**about, "judge_auc": auc, "alarms": alarms_of(measures, base, gains, earlier), "training": log}
    )


def _publish(work: Work, choice: dict[str, Any], version: str) -> None:
    """The chosen policy with its card and its pool; pi_SFT's own where it is kept."""
    name = choice["published"]
    place = work.round(int(name.removeprefix("round-"))) if name != SFT else None
    sources = (place / "policy", place / "pool.parquet") if place else (work.run.path("policies/sft"), work.run.path("pools/sft.parquet"))
    for source, target in zip(sources, ("policies/aligned", "pools/aligned.parquet"), strict=True):
        remove(work.folder / target)  # what a killed attempt may have left
        shutil.copytree(source, work.folder / target)
    what = f"The SFT policy of the run, unchanged: {choice['why']}."
    if name != SFT:
        own = choice["candidates"][name]
        costs = {key: own[f"kl_{key}"]["mean"] for key in ("sft", "initial")}
        learned = METHODS[choice["method"]].source.format(**choice)
        what = TUNED.format(**choice, **own["gain"], **costs, name=name.replace("-", " "), source=learned)
    template = work.chat_template if "{" not in work.chat_template else "its tokenizer's own"
    (work.folder / "policies/aligned/README.md").write_text(CARD.format(what=what, version=version, template=template), encoding="utf-8")
    write_json(work.folder / "optimise/choice.json", choice)

"""The stage `optimise`: rounds of a method make candidates for the aligned policy, and the safety net publishes one of them or pi_SFT.

Each round starts from the same policy again (spin: from the round before); what changes from round to round is whose answers it learns
from: those of pi_SFT in the first, those of the round before in the others. Where the reward is refreshed (optimise/rounds.py), each round
goes on from the one before.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from irlign.data.chat import template_in_words
from irlign.data.splits import stored_demonstrations
from irlign.errors import DataError, GuardError, ModelError, interruption, out_of_memory
from irlign.files import read_json, read_table, remove, write_json
from irlign.launch import launch
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.heldout import judge_pool, prompts_shown
from irlign.optimise.label_free import too_few
from irlign.optimise.methods import METHODS, own_config, source_of
from irlign.optimise.rounds import keep_rewards, refresh
from irlign.optimise.safety_net import Candidate, Judged, alarms_of, below_range, choice_of, gains_over, in_words, kl
from irlign.optimise.scoring import scores_of
from irlign.optimise.work import POLICY, SEEDS_APART, Made, Work
from irlign.policy.likelihood import answer_log_probs
from irlign.progress import say
from irlign.records import SCORE, Demonstration, Sample
from irlign.sampling.pools import publish_card, stored_samples, stored_statistics

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [alignment-from-demonstrations, inverse-reinforcement-learning]
---
# {name}: a policy that needs no reward at inference

{what} Made by irlign {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForCausalLM, AutoTokenizer))
```
Prompts are read in {template}. `{stage}/choice.json` of its run says what was tried and how it was weighed.
"""
TUNED = """Trained by `{method}` ({name}) from {source}. A judge of held-out demonstrations, which had no part in it, puts its answers {mean:+.2f} standard deviations above those of the SFT policy (at least {low:+.2f}) on {prompts} dev prompts, and `{selector}`, the reward that selects, {rewarded:+.2f}. KL to the SFT
policy: {sft:.1f} nats an answer, to the initial policy {initial:.1f}."""


def align(work: Work, version: str) -> dict[str, Any]:
    """Make the candidates, choose, and write policies/NAME, pools/NAME.parquet and STAGE/choice.json below the work's folder, where NAME is
    `aligned` and STAGE `optimise` but for what the work says.

    Returns what choice.json holds. Without a judge nothing could be shown, so nothing is trained and pi_SFT is published.
    """
    rows = read_table(work.run.path("best_of_n/candidates.parquet"), split="dev")
    shown, reward = stored_demonstrations(work.run, "dev"), work.reward if work.settings.rewarded else None
    if not rows or rows[0]["judge"] is None:
        choice = choice_of([], {}, too_few(prompts_shown(shown)))
    else:
        sft = judged_sft(rows, work.reward) if work.drawn_alike else judged_by_both(work, _sft_drawn_here(work), shown, 0, "weighed")[0]
        choice = _rounds(work, sft, shown, version)
    choice = {"method": work.settings.method, "reward": reward, "selector": work.reward, **choice, "demonstrations": len(shown)}
    _publish(work, choice, version)
    return choice


def _rounds(work: Work, sft: Judged, shown: Sequence[Demonstration], version: str) -> dict[str, Any]:
    """Rounds until the settings' number is reached, an alarm goes off, there is nothing to learn from or a later one cannot be made, and the choice among
    them. Raises what the first one raises."""
    base = measures_of_sft(work, sft)
    found: list[Candidate] = []
    kept = f"{work.settings.method} finds nothing to learn from on the train prompts (answers that are cut, empty or alike have no part)"
    ended = None
    for number in range(1, work.settings.rounds + 1):
        try:
            if not (work.round(number) / "log.json").exists() and not improve(work, number, shown, version):
                break
        except (DataError, GuardError, ModelError) as error:
            # the last two say nothing of the round: the next attempt goes on
            if number == 1 or interruption(error) or out_of_memory(error):
                raise
            ended = f"round {number} could not be made ({error.what})"
            say(f"optimise: {ended}, so what came before it is weighed")
            break
        for made in work.made(number):
            answers = [s for s in _answers(work, made) if s.prompt.split == "dev"]
            found.append(weighed(work, made, answers, sft, base, shown, found))
        if alarms := found[-1].about["alarms"]:
            say(f"optimise: {alarms[0]['name']}{', so no further round is made' if number < work.settings.rounds else ''}")
            break
    return choice_of(found, base, kept, ended)


def _sft_drawn_here(work: Work) -> list[Sample]:
    """pi_SFT's answers to the dev prompts, as many as of a candidate and by the same engine: it is policies that are compared, not engines."""
    asked = {s.prompt.prompt_id: s.prompt for s in stored_samples(work.run, "sft", "dev")}
    return work.draw(0, "dev", [(prompt, work.settings.generations) for prompt in asked.values()])


def _answers(work: Work, made: Made, whole: bool = False) -> list[Sample]:
    """A policy's answers to the dev and test prompts; to the dev prompts alone of one that its training went on from, unless they are to be `whole`."""
    splits = ("dev", "test") if made.last or whole else ("dev",)
    asked = {s.prompt.prompt_id: s.prompt for s in stored_samples(work.run, "sft", *splits)}
    wanted = [(prompt, work.settings.generations) for prompt in asked.values()]
    return work.draw(made.round, made.pool("pool" if made.last or whole else "dev"), wanted, made.folder)


def improve(work: Work, number: int, shown: Sequence[Demonstration], version: str) -> bool:
    """Train the policy of a round, its reward before it where that is refreshed; log.json in the round's folder says that it is there.
    Returns whether there was anything to learn from."""
    method, place = METHODS[work.settings.method], work.round(number)
    again = work.settings.refresh != "none" and work.settings.rewarded and number > 1
    new = {"reward": refresh(work, number, version)} if again else {}
    if not (rows := method.rows(work, number)):
        return False
    options: dict[str, Any] = {"chat_template": work.chat_template, "report_to": work.report_to}
    options |= {"seed": work.run.seed + SEEDS_APART * (number - 1)}
    options |= {"folder": place / "policy", "checkpoints": place / "checkpoints"}
    if not work.processes.sharded:  # else a process has a part of the model only
        options |= {"kept": {f"{POLICY}-{share:g}": share for share in work.settings.kept}}
    options |= {"config": config} if (config := own_config(work.settings, work.sampling)) else {}
    options |= method.options(work, number)
    log = launch(work.processes, method.train, work.start(number, method.start), rows, shown, work.settings, **options)
    write_json(place / "log.json", {**log, **new, "tokens": log["tokens"] + new.get("reward", {}).get("tokens", 0)})
    return True


def judged_sft(rows: Sequence[Mapping[str, Any]], reward: str) -> Judged:
    """pi_SFT's answers from rows of candidates.parquet, as the judge and the reward of this name have scored them there."""
    logits, rewards = (np.array([row[column] for row in rows]) for column in ("judge", f"{SCORE}{reward}"))
    return Judged([Sample.from_row(row) for row in rows], logits, rewards)


def measures_of_sft(work: Work, sft: Judged) -> dict[str, Any]:
    """What candidates are compared with, and how far pi_SFT has moved from pi_0."""
    few = [s for s in sft.samples if s.index < work.weighed]
    own, initial = (answer_log_probs(work.run.path("policies", name), few, chat_template=work.chat_template) for name in ("sft", "init"))
    return {
        **sft.measures(work.weighed),
        "below_range": below_range(sft, sft),
        "distinct_3_picked": sft.phrases_picked(),
        "kl_initial": kl(few, own, initial),
    }


def judged_by_both(
    work: Work, answers: Sequence[Sample], shown: Sequence[Demonstration], number: int, name: str
) -> tuple[Judged, float | None]:
    """A policy's dev answers as the judge and the reward that selects see them, and the judge's AUC; `name` is where a round keeps the scores."""
    logits, _, auc = judge_pool(
        work.run.path("policies/init"), answers, stored_samples(work.run, "init", "dev"), shown, chat_template=work.chat_template
    )
    assert logits is not None  # pi_SFT's stored answers were judged by the same demonstrations
    rewards = {work.reward: work.run.path("rewards", work.reward)}
    scores = scores_of(rewards, *scored_texts(answers), work.sampling, work.round(number) / name)
    return Judged(answers, logits, scores[work.reward]), auc


def weighed(
    work: Work,
    made: Made,
    answers: Sequence[Sample],
    sft: Judged,
    base: dict[str, Any],
    shown: Sequence[Demonstration],
    earlier: Sequence[Candidate],
) -> Candidate:
    """A policy that a round has made as a candidate: judged, with the KL it cost, and alarms."""
    place, template = work.round(made.round), work.chat_template
    judged, auc = judged_by_both(work, answers, shown, made.round, made.pool("weighed"))
    policies = (place / made.folder, *(work.run.path("policies", name) for name in ("sft", "init")))
    own, *others = (answer_log_probs(folder, answers, chat_template=template) for folder in policies)
    gains, rewarded = gains_over(sft, judged)
    said = f"gain over SFT {gains.mean():+.2f} sd by the judge, {rewarded.mean():+.2f} by the reward, on {len(gains)} dev prompts"
    say(f"optimise: {in_words(made.name)}: {said}")
    about: dict[str, Any] = {
        **{f"kl_{name}": kl(answers, own, other) for name, other in zip(("sft", "initial"), others, strict=True)},
        **judged.measures(work.weighed),
        "below_range": below_range(sft, judged),
    }
    log, drawn = read_json(place / "log.json"), sum(s.tokens for s in answers)
    if made.last:  # what the training cost is counted once
        drawn += work.drawn(made.round) + log.get("drawn", 0)
    about |= {"drawn": drawn, "judge_auc": auc, "after": made.share, "alarms": alarms_of(about, base, gains, earlier, work.weighed)}
    about["training"], before = (log, None) if made.last else (None, f"round-{made.round}")
    return Candidate(made.name, gains, rewarded, about, before)


def _publish(work: Work, choice: dict[str, Any], version: str) -> None:
    """The chosen policy with its card and its pool; pi_SFT's own where it is kept."""
    name = choice["published"]
    made = {one.name: one for number in range(1, work.settings.rounds + 1) for one in work.made(number)}.get(name)
    sources = (work.run.path("policies/sft"), work.run.path("pools/sft.parquet"))
    if made:
        _answers(work, made, whole=True)
        sources = (work.round(made.round) / made.folder, work.round(made.round) / f"{made.pool()}.parquet")
    policy, pool = work.folder / "policies" / work.name, work.folder / f"pools/{work.name}.parquet"
    for source, target in zip(sources, (policy, pool), strict=True):
        remove(target)  # what a killed attempt may have left
        shutil.copytree(source, target)
    what = f"The SFT policy of the run, unchanged: {choice['why']}."
    if made:
        own = choice["candidates"][name]
        costs = {key: own[f"kl_{key}"]["mean"] for key in ("sft", "initial")}
        learned = source_of(work.settings).format(reward=work.scorer(made.round).name)
        what = TUNED.format(**choice, **own["gain"], rewarded=own["reward_gain"]["mean"], **costs, name=in_words(name), source=learned)
    about = {"name": work.name, "stage": work.stage, "version": version, "template": template_in_words(work.chat_template)}
    card = CARD.format(what=what, **about)
    (policy / "README.md").write_text(card, encoding="utf-8")
    if made:
        publish_card(pool, work.name, stored_statistics(pool), work.sampling)
    if work.settings.refresh != "none" and work.settings.rewarded:
        keep_rewards(work, [n for n in range(2, work.settings.rounds + 1) if f"round-{n}" in choice["candidates"]])
    write_json(work.folder / work.stage / "choice.json", choice)

"""The stage `optimise`: rounds of a method make candidates for the aligned policy, and the safety net publishes one of them or pi_SFT.

Each round starts from the same policy again (spin: from the round before); what changes from round to round is whose answers it learns
from: those of pi_SFT in the first, those of the round before in the others.
"""

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from irlign.data.chat import template_in_words
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, read_table, remove, write_json
from irlign.launch import launch
from irlign.optimise.label_free import FEWEST, judge_pool
from irlign.optimise.methods import METHODS, Work, own_config
from irlign.optimise.safety_net import SFT, Candidate, Judged, alarms_of, choice_of, judged_gains, kl
from irlign.policy.likelihood import answer_log_probs
from irlign.progress import say
from irlign.records import Demonstration, Sample
from irlign.sampling.pools import publish_card, stored_samples, stored_statistics

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
Prompts are read in {template}. `optimise/choice.json` of its run says what was tried and how it was weighed.
"""
TUNED = """Trained by `{method}` ({name}) from {source}. A judge of held-out demonstrations, which had no part in it, puts its answers {mean:+.2f} standard deviations above those of the SFT policy (at least {low:+.2f}) on {prompts} dev prompts. KL to the SFT
policy: {sft:.1f} nats an answer, to the initial policy {initial:.1f}."""


def align(work: Work, version: str) -> dict[str, Any]:
    """Make the candidates, choose, and write policies/aligned, pools/aligned.parquet and optimise/choice.json below the work's folder.

    Returns what choice.json holds. Without a judge nothing could be shown, so nothing is trained and pi_SFT is published.
    """
    rows = read_table(work.run.path("best_of_n/candidates.parquet"), split="dev")
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
            given = (work.start(number, method.start), rows, shown, work.settings)
            write_json(place / "log.json", launch(work.processes, method.train, *given, **options))
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
    card = CARD.format(what=what, version=version, template=template_in_words(work.chat_template))
    (work.folder / "policies/aligned/README.md").write_text(card, encoding="utf-8")
    if place:
        pool = work.folder / "pools/aligned.parquet"
        publish_card(pool, "aligned", stored_statistics(pool), work.sampling)
    write_json(work.folder / "optimise/choice.json", choice)

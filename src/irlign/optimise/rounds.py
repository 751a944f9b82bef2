"""Adversarial rounds: before a round the reward is trained anew against the policy that the round starts from, and then improves it.

A frozen reward has seen the answers of pi_0 and pi_SFT only; a policy trained toward it leaves them, and what the reward says there is
chance. Refreshed, it is a discriminator of the policy as it is now (GAN, arXiv 1406.2661; GAIL, arXiv 1606.03476; for text
arXiv 2511.10643). With replay the answers of pi_0 and of earlier rounds stay on its worse side, so that no policy is met again.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, write_json
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.work import SEEDS_APART, Work, drawn_answers
from irlign.progress import say
from irlign.records import Sample
from irlign.reward.contrasts import Answer, answers_of, contrast_pairs, guard_leak, leak_controls
from irlign.reward.learn import train_reward_of, trained_tokens
from irlign.reward.load import score_all
from irlign.reward.publish import LIKELIHOOD, held_to_likelihood, publish_held, publish_reward
from irlign.sampling.pools import read_pool, stored_samples

LOG = "log.json"  # in a round's folder of rewards once they are there


def past_policies(refresh: str, replay: bool, number: int) -> list[int]:
    """The earlier policies whose answers a round's reward takes for worse: of rounds before the current one, 0 is pi_SFT; none without
    `replay`, and never pi_SFT where its answers are the better ones."""
    return list(range(1 if refresh == "current-sft" else 0, number - 1)) if replay else []


def refresh(work: Work, number: int, version: str) -> dict[str, Any]:
    """The reward of a round, from the second on, in `work.scorer(number)`: trained with the settings of the run's own reward on the answers
    of the train prompts, and held to what pi_SFT finds likely where that is.

    Returns what log.json says of it; one that is there already is kept. Raises GuardError where length or the ending tells the sides apart.
    """
    place = work.scorer(number).parent
    if not (place / LOG).exists():
        write_json(place / LOG, _train(work, number, place, version))
    return read_json(place / LOG)


def _train(work: Work, number: int, place: Path, version: str) -> dict[str, Any]:
    name, settings = work.settings.refresh, work.refreshed
    match = settings.ending == "match"
    pairs, left_out, controls = contrast_pairs({name: sides_of(work, number, "train")}, match=match)
    dev, _, _ = contrast_pairs({name: sides_of(work, number, "dev")}, match=match, needed=False)
    guard_leak(leak_controls(pairs[name]), settings.max_leak_accuracy, len(pairs[name]))
    own = settings.backbone in ("sft", "init")
    log = train_reward_of(
        settings,
        work.run.path("policies", settings.backbone) if own else settings.backbone,
        pairs,
        dev,
        folder=place / name,
        checkpoints=place.parent / "reward-checkpoints",
        chat_template=work.chat_template,
        seed=work.run.seed + SEEDS_APART * (number - 1),
        report_to=work.report_to,
        processes=work.processes,
    )
    publish_reward(place / name, {**log, "ending": settings.ending, "controls": controls, "left_out": left_out}, version)
    if work.likelihood:
        _hold(work, number)
    told = f"{log['dev']['accuracy']:.0%} of unseen pairs told apart" if log["dev"] else "no unseen pairs"
    say(f"optimise: round {number}: reward {name} trained anew on {log['pairs']['train']} pairs, {told}")
    found = {"name": work.scorer(number).name, "tokens": trained_tokens(log.get("training"))}
    return {**found, "pairs": log["pairs"], "dev": log["dev"], "controls": controls, "left_out": left_out}


def sides_of(work: Work, number: int, split: str) -> tuple[list[Answer], list[Answer]]:
    """The better and the worse answers that the reward of a round learns from."""
    refreshed = work.settings.refresh
    past = [s for n in past_policies(refreshed, work.settings.replay, number) for s in _answers(work, n, split)]
    init, current = stored_samples(work.run, "init", split), _answers(work, number - 1, split)
    if refreshed == "init-current":
        init = [*init, *past]
        better, worse = answers_of(refreshed, init=init, current=current)
    else:
        worse_ones = [*current, *(init if work.settings.replay else []), *past]
        shown = stored_demonstrations(work.run, split) if refreshed == "current-demo" else []
        better, worse = answers_of(refreshed, sft=stored_samples(work.run, "sft", split), current=worse_ones, demonstrations=shown)
    return better, worse


def _answers(work: Work, number: int, split: str) -> list[Sample]:
    """The answers of a round's policy (0: pi_SFT) to the prompts of a split; to train prompts as many as pi_0 has given."""
    if number == 0:
        return stored_samples(work.run, "sft", split)
    if split == "train":
        return [s for s in drawn_answers(work, number + 1) if s.index < work.sampling.train_generations]
    return [s for s in read_pool(work.round(number) / "pool.parquet") if s.prompt.split == split]


def _hold(work: Work, number: int) -> None:
    """Beside the reward, the same held to what pi_SFT finds likely, on the scales of the current policy's answers to the train prompts."""
    target, current = work.scorer(number), _answers(work, number - 1, "train")
    learned, likelihood = target.parent / work.settings.refresh, work.run.path("rewards", LIKELIHOOD)
    scores = score_all({"learned": learned, LIKELIHOOD: likelihood}, *scored_texts(current))
    _, scales = held_to_likelihood(scores["learned"], scores[LIKELIHOOD], [s.prompt.prompt_id for s in current], work.likelihood)
    publish_held(target.parent, target.name, learned, scales, work.likelihood, str(likelihood))


def keep_rewards(work: Work, rounds: Sequence[int]) -> None:
    """The refreshed rewards of these rounds below `STAGE/rounds`, where they are published: what they name of the run, they then name
    relative to their own folder, so that the run can be moved."""
    root = json.dumps(str(work.run.root), ensure_ascii=False)[:-1] + "/"  # with its opening quote: only what is a whole path
    for number in rounds:
        source, kept = work.scorer(number).parent, f"{work.stage}/rounds/{number}/reward"
        shutil.rmtree(work.folder / kept, ignore_errors=True)  # what a killed attempt may have left
        shutil.copytree(source, work.folder / kept)
        for file in (work.folder / kept).rglob("reward.json"):
            up = "../" * len(file.parent.relative_to(work.folder).parts)
            file.write_text(file.read_text(encoding="utf-8").replace(root, f'"{up}'), encoding="utf-8")

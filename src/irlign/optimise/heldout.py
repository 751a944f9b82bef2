"""The judge of the choice of n: of another kind than the reward that selects, on demonstrations that nothing has seen.

It tells the dev demonstrations, which neither SFT nor the reward was trained on, from samples of pi_0 on the same prompts and
from demonstrations of other prompts: a ridge-regularised logistic head over frozen features of pi_0. The demonstrations of
other prompts are written as well and in the same style, so that neither length nor style tells the sides apart, and what an
answer has to do with its prompt does. It is cross-fitted over prompts, so it never judges an answer to a prompt it was fitted
on. How n is chosen by what it says: optimise/label_free.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from irlign.data.batches import blocks
from irlign.optimise.best_of_n import scored_text
from irlign.policy.load import load_policy
from irlign.records import Demonstration, Prompt, Sample
from irlign.reward.contrasts import ended
from irlign.reward.features import LogisticHead, features_of, load_encoder
from irlign.statistics import auc

FOLDS, RIDGE = 5, 1e-4
FEWEST = 20  # prompts with a demonstration: fewer make no judge
SAMPLES = 16  # at most so many of a prompt's samples train the judge
EXCHANGED = 4  # so many demonstrations of other prompts stand on the worse side of each prompt


@dataclass(frozen=True)
class Answers:
    """The answers of one source: the prompt of each and its features, shape [rows, F]."""

    prompt_ids: Sequence[str]
    features: np.ndarray

    def of(self, wanted: set[str]) -> np.ndarray:
        """The features of the answers to the wanted prompts, at most SAMPLES of each."""
        seen: dict[str, int] = {}
        keep = []
        for row, prompt_id in enumerate(self.prompt_ids):
            seen[prompt_id] = seen.get(prompt_id, 0) + 1
            if prompt_id in wanted and seen[prompt_id] <= SAMPLES:
                keep.append(row)
        return self.features[keep]


class Judge:
    """Tells demonstrations from worse answers; heads are fitted when they are first needed. The worse sides weigh alike, and together as much
    as the better. `fold` is the fold of each prompt, where not those of the demonstrated ones."""

    def __init__(self, demonstrations: Answers, worse: Sequence[Answers], fold: Mapping[str, int] | None = None):
        self.demonstrations, self.worse, self.fold = demonstrations, worse, fold or folds(demonstrations.prompt_ids)
        self.heads: dict[int, LogisticHead] = {}

    def __call__(self, answers: Answers) -> np.ndarray:
        """The logit of each answer, higher is more like a demonstration. Shape [len(answers.prompt_ids)].

        Answers to a prompt with a demonstration are judged by a head that was fitted on the other folds of prompts, all others
        by a head fitted on all of them.
        """
        scores = np.zeros(len(answers.prompt_ids))
        rows = np.array([self.fold.get(prompt_id, FOLDS) for prompt_id in answers.prompt_ids])
        for k in np.unique(rows):
            scores[rows == k] = self._head(int(k))(answers.features[rows == k])
        return scores

    def _head(self, k: int) -> LogisticHead:
        if k not in self.heads:
            known = {prompt_id for prompt_id, place in self.fold.items() if place != k}
            self.heads[k] = _fit(self.demonstrations.of(known), [side.of(known) for side in self.worse])
        return self.heads[k]


def judge(answers: Answers, demonstrations: Answers, worse: Sequence[Answers], fold: Mapping[str, int] | None = None) -> np.ndarray:
    """The logits of a judge that is needed once. Shape [len(answers.prompt_ids)]."""
    return Judge(demonstrations, worse, fold)(answers)


def folds(prompt_ids: Sequence[str]) -> dict[str, int]:
    """The fold of each prompt, by hash."""
    return {prompt_id: place % FOLDS for place, prompt_id in enumerate(sorted(set(prompt_ids), key=lambda p: crc32(p.encode())))}


def _fit(demonstrations: np.ndarray, worse: Sequence[np.ndarray]) -> LogisticHead:
    sides = [(demonstrations, 1.0, 1), *((side, 1 / len(worse), 0) for side in worse)]
    weight_B = np.concatenate([np.full(len(x), share / max(1, len(x))) for x, share, _ in sides])
    better_B = np.concatenate([np.full(len(x), side) for x, _, side in sides])
    return LogisticHead(np.concatenate([x for x, _, _ in sides]), better_B, weight_B, RIDGE)


def exchanged(demonstrations: Sequence[Demonstration]) -> list[tuple[Prompt, str]]:
    """Each prompt with the demonstrations of up to EXCHANGED other prompts of its fold: what a fold holds out, it holds out whole."""
    fold = folds([d.prompt.prompt_id for d in demonstrations])
    rows = []
    for k in range(FOLDS):
        own = [d for d in demonstrations if fold[d.prompt.prompt_id] == k]
        shifts = [shift for shift in range(1, len(own))][:EXCHANGED]
        rows += [(d.prompt, own[(i + shift) % len(own)]) for shift in shifts for i, d in enumerate(own)]
    return [(prompt, ended(other.completion, True)) for prompt, other in rows if other.prompt.prompt_id != prompt.prompt_id]


class Verdicts(NamedTuple):
    """Of every sample in a pool the judge's `logits` and its `style`, shape [rows], and the judge's `auc`; all None without a judge."""

    logits: np.ndarray | None
    style: np.ndarray | None
    auc: float | None


def judge_pool(
    policy: Path, pool: Sequence[Sample], initial: Sequence[Sample], demonstrations: Sequence[Demonstration], *, chat_template: str
) -> Verdicts:
    """The judge of every sample in the pool, by features of `policy` (any checkpoint where no policy has weights); None with
    demonstrations of fewer than FEWEST prompts.

    `auc` says how well it tells unseen demonstrations from both worse sides (the mean of the two AUCs on the dev prompts). `style` is the logit
    of a head that tells demonstrations of other prompts from pi_0's samples, cross-fitted alike: how an answer is written, whatever was asked.
    """
    if prompts_shown(demonstrations) < FEWEST:
        return Verdicts(None, None, None)
    about: dict[str, Any] = {
        "chat_template": chat_template,
        "policy_loader": cache(load_policy),
        "encoder_loader": cache(load_encoder),
    }  # loaded once
    _, shown, *worse = sides_of(policy, [], initial, demonstrations, **about)
    better, style = Judge(shown, worse), Judge(worse[1], worse[:1])
    told = float(np.mean([auc(better(shown), better(side)) for side in worse]))
    verdicts_2_B = np.zeros((2, len(pool)))
    for of in blocks(len(pool)):  # features of all answers together would not fit
        drawn, *_ = sides_of(policy, pool[of], [], [], **about)
        verdicts_2_B[:, of] = better(drawn), style(drawn)
    return Verdicts(verdicts_2_B[0], verdicts_2_B[1], told)


def sides_of(
    policy: Path,
    pool: Sequence[Sample],
    initial: Sequence[Sample],
    demonstrations: Sequence[Demonstration],
    *,
    chat_template: str,
    **loaders: Any,
) -> list[Answers]:
    """By frozen features of `policy`: the pool, the demonstrations, pi_0's samples, and demonstrations of other prompts. `loaders` as
    `features_of` takes them."""
    groups: list[list[tuple[Prompt, str]]] = [
        [(s.prompt, scored_text(s)) for s in pool],
        [(d.prompt, ended(d.completion, True)) for d in demonstrations],
        [(s.prompt, scored_text(s)) for s in initial],
        exchanged(demonstrations),
    ]
    rows = [row for group in groups for row in group]
    features = features_of(
        policy, [p.content for p, _ in rows], [text for _, text in rows], chat_template=chat_template, name="judge", **loaders
    )
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return [Answers([p.prompt_id for p, _ in g], x) for g, x in zip(groups, np.split(features, ends), strict=True)]


def prompts_shown(demonstrations: Sequence[Demonstration]) -> int:
    """The prompts that the judge learns from: several demonstrations of one prompt count once."""
    return len({d.prompt.prompt_id for d in demonstrations})

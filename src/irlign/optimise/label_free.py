"""The choice of n without labels: a judge of another kind than the reward that selects, on demonstrations that nothing has seen.

The judge tells the dev demonstrations, which neither SFT nor the reward was trained on, from samples of pi_0 on the same
prompts and from demonstrations of other prompts: a ridge-regularised logistic head over frozen features of pi_0. The
demonstrations of other prompts are written as well and in the same style, so that neither length nor style tells the sides
apart, and what an answer has to do with its prompt does. It is cross-fitted over prompts, so it never judges an answer to a
prompt it was fitted on. Best-of-n under the selecting reward, measured by this judge, turns down where the golden reward
does (docs/measured.md). Of the n that are shown to be better than n = 1 one is taken, boldly where the answers that the
reward picks are shown to be likelier under pi_SFT than its average answer, with care where they may be some that it hardly
ever gives; n = 1, plain SFT, where none is shown (docs/studies/stopping.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from scipy.stats import norm

from irlign.data.batches import blocks
from irlign.errors import ConfigError
from irlign.optimise.best_of_n import scored_text
from irlign.policy.load import load_policy
from irlign.records import SCORE, Demonstration, Prompt, Sample, mean_logprobs
from irlign.reward.contrasts import ended
from irlign.reward.features import LogisticHead, features_of, load_encoder
from irlign.statistics import auc, best_of_n, powers_of_two

FOLDS, RIDGE, ALPHA = 5, 1e-4, 0.05
FEWEST = 20  # prompts with a demonstration: fewer make no judge
SAMPLES = 16  # at most so many of a prompt's samples train the judge
EXCHANGED = 4  # so many demonstrations of other prompts stand on the worse side of each prompt
JUDGE = {
    "worse": ["initial", "exchanged"],
    "folds": FOLDS,
    "ridge": RIDGE,
    "fewest": FEWEST,
    "samples": SAMPLES,
    "exchanged": EXCHANGED,
    "style": True,
    "rule": "best bound, or larger where likelier all the way and not beaten",
}


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


class Curve(NamedTuple):
    """Best-of-n under one reward as the judge sees it: the points `n`, n = 1 first; each prompt's `gains` over n = 1, in standard deviations
    of the judge's logit, shape [P, n]; and `likelier`, whether what is picked is shown to be likelier under pi_SFT, a token, than at n = 1
    (5 %, all n together), shape [n]: nowhere where no likelihood is known."""

    n: list[int]
    gains: np.ndarray
    likelier: np.ndarray


def judged_curve(
    prompt_ids: Sequence[str], selecting: np.ndarray, judged: np.ndarray, finished: np.ndarray, likelihood: np.ndarray | None
) -> Curve:
    """The curve of `selecting`, from the reward, the judge's logit, and log pi_SFT a token of each answer."""
    rows: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        rows.setdefault(prompt_id, []).append(row)
    n = powers_of_two(min(len(of) for of in rows.values()))  # n = 1 first

    def gains(values: np.ndarray) -> np.ndarray:
        curve = np.array([[best_of_n(selecting[of], values[of], k, finished[of]) for k in n] for of in rows.values()])
        return curve - curve[:, :1]

    likelier = np.zeros(len(n), dtype=bool) if likelihood is None else shown(gains(likelihood))
    return Curve(n, gains(judged / (float(np.std(judged)) or 1.0)), likelier)


def choose(curves: Mapping[str, Curve]) -> tuple[str, int]:
    """The reward and the n that selection uses: each reward at its own n, the one with the best lower bound there. The first reward and
    n = 1 where no gain is shown."""
    chosen = {name: choose_n(of, sum(len(c.n) - 1 for c in curves.values())) for name, of in curves.items()}
    best = max(curves, key=lambda name: lower_bounds(curves[name].gains)[curves[name].n.index(chosen[name])])
    return best, chosen[best]


def choose_n(curve: Curve, looks: int | None = None) -> int:
    """An n whose gain is shown to be above 0, at 5 % for all `looks` together (Bonferroni; by default all n but the first), or n = 1.

    Of those the one with the best lower bound, or a larger one up to which picks are likelier under pi_SFT all the way, and that no smaller n
    is shown to beat (5 %): the noise of the judged gain grows with n, so that a curve that still rises loses its bound; but where picks
    leave what pi_SFT knows, and with it what the judge has seen, that noise counts against them. `irlign arena stopping` compares this
    with other rules.
    """
    shown_n = shown(curve.gains, looks)
    chosen = careful = int(np.where(shown_n, lower_bounds(curve.gains), 0.0).argmax())
    for k in range(careful + 1, len(curve.n)):
        if not curve.likelier[k]:
            break
        if shown_n[k] and not beaten(curve, k):
            chosen = k
    return curve.n[chosen]


def beaten(curve: Curve, k: int) -> bool:
    """Whether any smaller n is shown to gain more than the one at place k, at 5 % each."""
    return bool(shown(curve.gains[:, :k] - curve.gains[:, [k]], 1).any())


def shown(gains_P_n: np.ndarray, looks: int | None = None) -> np.ndarray:
    """Which means are shown to be above 0, at 5 % for so many looks together (Bonferroni; by default all n but the first). Shape [n]."""
    return lower_bounds(gains_P_n, ALPHA / max(1, looks or gains_P_n.shape[1] - 1)) > 0


def lower_bounds(values_P_n: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """One-sided lower bounds of the means over prompts at level alpha, normal. Shape [n]."""
    return values_P_n.mean(0) - norm.ppf(1 - alpha) * values_P_n.std(0, ddof=1) / np.sqrt(len(values_P_n))


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


def choice_of(
    rows: Sequence[Mapping[str, Any]],
    rewards: Sequence[str],
    given: int | None,
    *,
    demonstrations: Sequence[Demonstration],
    judge_auc: float | None,
    kept: str = "SFT",
    no_judge: str = "",
) -> dict[str, Any]:
    """choice.json, from the candidates: the `reward` and the `n` that selection uses and `why`, `given` (best_of_n.n), `label_free` (the n
    that the judge would take, or null), the judge's `curves` on dev (`{reward: {n: {"mean", "low", "likelier"}}}`, gains over n = 1 in
    standard deviations), its `auc`, and what it rests on. Without a judge the first of the rewards selects. `kept` is what n = 1 stands for,
    `no_judge` why there is no judge where that is not for want of demonstrations.
    """
    dev = [row for row in rows if row["split"] == "dev" and row["judge"] is not None]
    about: dict[str, Any] = {"auc": judge_auc, "demonstrations": len(demonstrations), "given": given}
    if not dev:
        why = no_judge or too_few(prompts_shown(demonstrations))
        about |= {"reward": rewards[0], "label_free": None, "curves": None, "prompts": 0}
        shown = "given by best_of_n.n; no judge says whether it is better"
        return {**about, "n": given or 1, "why": shown if given else f"{why}, so {kept} is kept"}
    judged, finished = np.array([row["judge"] for row in dev]), np.array([row["finish_reason"] != "length" for row in dev])
    ids, likelihood = [row["prompt_id"] for row in dev], mean_logprobs([Sample.from_row(row) for row in dev])
    scores = {reward: np.array([row[f"{SCORE}{reward}"] for row in dev]) for reward in rewards}
    curves = {reward: judged_curve(ids, of, judged, finished, likelihood) for reward, of in scores.items()}
    reward, chosen = choose(curves)
    why = f"given by best_of_n.n; the judge would take {chosen}" if given else _why(curves[reward], chosen, kept)
    return {
        **about,
        "reward": reward,
        "label_free": chosen,
        "curves": {name: _curve_json(curve) for name, curve in curves.items()},
        "prompts": len(curves[reward].gains),
        "n": given or chosen,
        "why": why,
    }


def _why(curve: Curve, chosen: int, kept: str) -> str:
    if chosen == 1:
        return f"no larger n is shown to be better, at 5% for all that was looked at, so {kept} is kept"
    if curve.likelier[curve.n.index(chosen)]:
        return f"shown to be better than {kept}, and no smaller n is shown to beat it"
    return f"the best lower bound among the n that are shown to be better than {kept}; its picks are not shown to be likelier than {kept}'s average"


def _curve_json(curve: Curve) -> dict[str, dict[str, Any]]:
    points = zip(curve.n, curve.gains.mean(0), lower_bounds(curve.gains), curve.likelier, strict=True)
    return {str(n): {"mean": float(mean), "low": float(low), "likelier": bool(likelier)} for n, mean, low, likelier in points}


def prompts_shown(demonstrations: Sequence[Demonstration]) -> int:
    """The prompts that the judge learns from: several demonstrations of one prompt count once."""
    return len({d.prompt.prompt_id for d in demonstrations})


def too_few(prompts: int) -> str:
    """Why there is no judge, with so many dev prompts that have a demonstration."""
    have = "1 dev prompt with a demonstration is" if prompts == 1 else f"{prompts} dev prompts with a demonstration are"
    return f"{have} too few for a judge ({FEWEST} are needed)"


def without_judge(prompts: int) -> str:
    """What a run with so many dev prompts with a demonstration must come to, said before any compute; empty where they make a judge."""
    if prompts >= FEWEST:
        return ""
    return f"{too_few(prompts)}, so plain SFT is kept (an n of your own is taken unjudged). Raise data.dev_fraction, or bring more prompts"


def guard_n(choice: Mapping[str, Any], force: bool) -> None:
    """Raises ConfigError where `best_of_n.n` is above what the judge would take, unless forced: selection there is not shown to be safe."""
    if choice["given"] and choice["label_free"] is not None and choice["given"] > choice["label_free"] and not force:
        curve = choice["curves"][choice["reward"]]
        gains = ", ".join(f"{n}: {of['mean']:+.2f} (at least {of['low']:+.2f})" for n, of in curve.items() if n != "1")
        raise ConfigError(
            f"n = {choice['given']} is more than the judge of held-out demonstrations would take, {choice['label_free']}; its gains: {gains}",
            where="best_of_n.n",
            do="leave it out, lower it, or say --force",
        )

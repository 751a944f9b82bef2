"""The choice of n without labels, by what a judge of held-out demonstrations says (optimise/heldout.py).

Best-of-n under the selecting reward, measured by this judge, turns down where the golden reward does (docs/measured.md). Of the
n that are shown to be better than n = 1 one is taken, boldly where the answers that the reward picks are shown to be likelier
under pi_SFT than its average answer, with care where they may be some that it hardly ever gives; n = 1, plain SFT, where none
is shown (docs/studies/stopping.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from irlign.errors import ConfigError
from irlign.optimise.heldout import EXCHANGED, FEWEST, FOLDS, RIDGE, SAMPLES, prompts_shown
from irlign.records import SCORE, Demonstration, Sample, mean_logprobs
from irlign.statistics import best_of_n, powers_of_two

ALPHA = 0.05
JUDGE = {
    "worse": ["initial", "exchanged"],
    "folds": FOLDS,
    "ridge": RIDGE,
    "fewest": FEWEST,
    "samples": SAMPLES,
    "exchanged": EXCHANGED,
    "style": True,
    "rule": "best bound, or larger where likelier all the way and not beaten",
    "bounds": "student",
}


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
    """One-sided lower bounds of the means over prompts at level alpha, by Student's t: prompts may be FEWEST. Shape [n]."""
    prompts = len(values_P_n)
    return values_P_n.mean(0) - t.ppf(1 - alpha, prompts - 1) * values_P_n.std(0, ddof=1) / np.sqrt(prompts)


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

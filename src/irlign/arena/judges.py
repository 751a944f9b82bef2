"""Ways to choose n without labels, side by side: judges of other kinds and other rules, as methods of the arena.

Each row is Best-of-n by one reward with n chosen in one way, so that the table's regret says how near that way comes to the best n.
What `irlign run` uses is `judge` (optimise/label_free.py `choose_n`). `irlign arena stopping` compares them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from irlign.arena.cell import Cell, golden_of
from irlign.arena.methods import INIT_DEMO, INIT_SFT, SFT_DEMO, Method, Pick, Scores, held, learned, likelihood, together
from irlign.evaluate.golden import score_golden
from irlign.evaluate.overoptimisation import fit_gao
from irlign.optimise.heldout import Answers, folds, judge, sides_of
from irlign.optimise.label_free import Curve, beaten, choose_n, lower_bounds, shown
from irlign.statistics import best_of_n_weights, kl_bound, powers_of_two, rank_keys

ONE_ERROR = 0.158655  # the level whose bound is one standard error below the mean
REFITS = 24
Judge = Callable[[Cell], np.ndarray]  # a value of each dev row of the pool, higher is better
Rule = Callable[[Curve], int]  # the judged curve to one n


@lru_cache(maxsize=2)
def _sides(cell: Cell, policy: str) -> list[Answers]:
    """The pool's dev answers, dev demonstrations, pi_0's answers and exchanged demonstrations, by frozen features of `policy`."""
    pool = [s for s, own in zip(cell.pool, cell.is_dev, strict=True) if own]
    shown, initial, template = cell.demonstrations("dev"), cell.samples("init", "dev"), cell.recipe.data.chat_template
    return sides_of(cell.run.path("policies", policy), pool, initial, shown, chat_template=template)


def heldout(*worse: str, features: str = "init") -> Judge:
    """Dev demonstrations against these worse sides, by a head on frozen features of a policy, cross-fitted over prompts."""

    @lru_cache(maxsize=1)
    def judged(cell: Cell) -> np.ndarray:
        pool, shown, initial, other = _sides(cell, features)
        sides = {"initial": initial, "exchanged": other, "sft": pool}
        return judge(pool, shown, [sides[name] for name in worse])

    return judged


def by(scores: Scores) -> Judge:
    """Another reward as the judge."""
    return lambda cell: scores(cell)[cell.is_dev]


@lru_cache(maxsize=1)
def refitted(cell: Cell) -> np.ndarray:
    """The mean of REFITS judges, each fitted to the dev prompts drawn with replacement (bagging): does the choice hang on the fit?"""
    pool, *sides = _sides(cell, "init")
    fold, rng = folds(sides[0].prompt_ids), np.random.default_rng(cell.run.seed)
    prompts = sorted(fold)

    def fit() -> np.ndarray:
        times = Counter(prompts[i] for i in rng.integers(0, len(prompts), len(prompts)))
        better, *worse = (_repeated(side, times) for side in sides)
        return judge(pool, better, worse, fold)  # the folds of all: exchanged demonstrations are held out with their own prompts

    return np.mean([fit() for _ in range(REFITS)], axis=0)


def _repeated(answers: Answers, times: Counter[str]) -> Answers:
    """The answers to each prompt so many times."""
    rows = np.repeat(np.arange(len(answers.prompt_ids)), [times[prompt] for prompt in answers.prompt_ids])
    return Answers([answers.prompt_ids[row] for row in rows.tolist()], answers.features[rows])


@lru_cache(maxsize=1)
def true_reward(cell: Cell) -> np.ndarray:
    """The true reward itself on the dev prompts: what so few prompts leave of a judge that makes no mistake."""
    dev = [sample for sample, own in zip(cell.pool, cell.is_dev, strict=True) if own]
    return score_golden(golden_of(cell.recipe), [s.prompt.content for s in dev], [s.completion for s in dev], "golden")


def highest(curve: Curve) -> int:
    """The highest mean, among the gains that are shown for all n together."""
    return curve.n[int(np.where(shown(curve.gains), curve.gains.mean(0), 0.0).argmax())]


def lower_bound(curve: Curve) -> int:
    """The best one-sided 95 % lower bound, among the gains that are shown for all n together."""
    return curve.n[int(np.where(shown(curve.gains), lower_bounds(curve.gains), 0.0).argmax())]


def one_error(curve: Curve) -> int:
    """The best mean less one standard error, among the gains that are shown for all n together."""
    return curve.n[int(np.where(shown(curve.gains), lower_bounds(curve.gains, ONE_ERROR), 0.0).argmax())]


def simplest(curve: Curve) -> int:
    """The smallest shown n whose gain lies within one standard error of the highest (the one-standard-error rule, paired)."""
    shown_n, gains = shown(curve.gains), curve.gains
    best = int(np.where(shown_n, gains.mean(0), 0.0).argmax())
    near = [k for k in range(1, best + 1) if shown_n[k] and lower_bounds(gains[:, [best]] - gains[:, [k]], ONE_ERROR)[0] <= 0]
    return curve.n[near[0]] if near else 1


def not_beaten(curve: Curve, where: np.ndarray | None = None) -> int:
    """The largest n that is shown to be better than n = 1 and that no smaller n is shown to beat, of those `where` says, however likely its
    picks."""
    among = shown(curve.gains) & (True if where is None else where)
    return curve.n[max((int(k) for k in np.flatnonzero(among) if not beaten(curve, int(k))), default=0)]


def likelier_not_beaten(curve: Curve) -> int:
    """The best lower bound, or a larger n not beaten whose picks are likelier, whatever lies between."""
    return max(lower_bound(curve), not_beaten(curve, curve.likelier))


def gains_no_less(curve: Curve) -> int:
    """The same, where its mean is not below that of the best lower bound."""
    mean_n = curve.gains.mean(0)
    return max(lower_bound(curve), not_beaten(curve, curve.likelier & (mean_n >= mean_n[curve.n.index(lower_bound(curve))])))


def gao(curve: Curve) -> int:
    """The largest n not beyond the peak of Gao's law fitted to the judged curve; 1 unless that gain is shown."""
    fit = fit_gao(curve.gains, curve.n, np.array([kl_bound(k) for k in curve.n]), resamples=100)
    at = [k for k in curve.n if fit is not None and k <= fit.peak_n * (1 + 1e-9)][-1:] or [1]
    return at[0] if shown(curve.gains)[curve.n.index(at[0])] else 1


def chosen_by(judge_of: Judge, rule: Rule = highest) -> Callable[[Cell, np.ndarray], int]:
    return lambda cell, scores: rule(cell.judged_curve(scores, judge_of(cell)))


def two_sample(cell: Cell, scores: np.ndarray) -> int:
    """The n whose picks on dev are nearest to the dev demonstrations by the energy distance of their frozen features."""
    pool, shown, _, _ = _sides(cell, "init")
    scale = shown.features.std(0) + 1e-6
    x, y = pool.features / scale, shown.features / scale
    to_shown, among = cdist(x, y).mean(1), cdist(x, x)
    rows: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(pool.prompt_ids):
        rows.setdefault(prompt_id, []).append(row)
    n, own, done = powers_of_two(min(map(len, rows.values()))), scores[cell.is_dev], cell.finished[cell.is_dev]
    distances = []
    for k in n:
        weight = np.zeros(len(x))
        for of in rows.values():
            weight[of] = best_of_n_weights(rank_keys(own[of], done[of]), k) / len(rows)
        distances.append(2 * weight @ to_shown - weight @ among @ weight)
    return n[int(np.argmin(distances))]


JUDGE = by(Cell.judged)
WAYS: Mapping[str, Callable[[Cell, np.ndarray], int]] = {
    "judge": chosen_by(JUDGE, choose_n),
    "judge (highest mean)": chosen_by(JUDGE),
    "judge (lower bound)": chosen_by(JUDGE, lower_bound),
    "judge (mean less one error)": chosen_by(JUDGE, one_error),
    "judge (smallest within one error)": chosen_by(JUDGE, simplest),
    "judge (largest not beaten)": chosen_by(JUDGE, not_beaten),
    "judge (likelier, not beaten)": chosen_by(JUDGE, likelier_not_beaten),
    "judge (likelier, gains no less)": chosen_by(JUDGE, gains_no_less),
    "judge (Gao's law)": chosen_by(JUDGE, gao),
    "judge without exchanged": chosen_by(heldout("initial")),
    "judge without pi_0": chosen_by(heldout("exchanged")),
    "judge with pi_SFT's samples": chosen_by(heldout("initial", "exchanged", "sft")),
    "judge on pi_SFT's features": chosen_by(heldout("initial", "exchanged", features="sft")),
    "judge refitted": chosen_by(refitted, choose_n),
    "the other contrasts": chosen_by(by(together(INIT_DEMO, SFT_DEMO))),
    "another seed of its kind": chosen_by(by(learned("init-sft-1", member=1))),
    "energy distance": two_sample,
    "the true reward on dev (labels)": chosen_by(true_reward, choose_n),
    "always the largest": lambda cell, scores: int(np.bincount(np.unique(cell.prompt_ids, return_inverse=True)[1]).min()),
}
SELECTORS: Mapping[str, Scores] = {
    "init-sft+likelihood": held(INIT_SFT),
    "likelihood": likelihood,
    "init-sft": INIT_SFT,
    "init-demo": INIT_DEMO,
    "sft-demo": SFT_DEMO,
    "three contrasts": together(INIT_SFT, INIT_DEMO, SFT_DEMO),
}


def _method(selector: Scores, way: Callable[[Cell, np.ndarray], int]) -> Method:
    def method(cell: Cell) -> Pick:
        scores = selector(cell)
        return Pick("sft", "stopping", scores, way(cell, scores), ("sft", "sample"))

    return method


BY = " by "  # between a reward and the way its n was chosen
STOPPING: Mapping[str, Method] = {
    f"{reward}{BY}{way}": _method(selector, n_of) for way, n_of in WAYS.items() for reward, selector in SELECTORS.items()
}


def stopping_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows of the leaderboard as a table of ways against rewards: the regret, and in how many runs the choice was worse than SFT."""
    of = {tuple(row["method"].split(BY, 1)): row for row in rows if BY in row["method"]}
    rewards = list(dict.fromkeys(reward for reward, _ in of))
    yield f"| n chosen by | {' | '.join(rewards)} |"
    yield "|" + "---|" * (len(rewards) + 1)
    for way in dict.fromkeys(way for _, way in of):
        yield f"| {way} | {' | '.join(_words(of.get((reward, way))) for reward in rewards)} |"


def _words(row: Mapping[str, Any] | None) -> str:
    if row is None or row["regret"] is None:
        return "–"
    left, (low, high) = row["regret"]["mean"], row["regret"]["ci95"]
    share = f"{left:.0%} [{low:.0%}, {high:.0%}]".replace("inf%", "∞")
    return share + (f", worse {row['worse']}/{row['runs']}" if row["worse"] else "")

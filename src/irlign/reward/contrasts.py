"""Contrasts: which answers are better than which, brought to one ending and one length before a reward sees them.

A base model never ends its answer and pi_SFT does; left alone, a reward learns "it ended" and nothing else. So every
answer that was cut at the limit is shortened to its last whole sentence, all answers get the same terminator (EOS, from
`data/chat.py`), and within each pair the longer answer is cut at the sentence end nearest the other's length.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from irlign.data.sentences import last_whole_sentence, sentences
from irlign.errors import DataError, GuardError
from irlign.records import Contrast, Demonstration, Preference, Prompt, Sample

ContrastName = Literal["init-sft", "init-demo", "sft-demo", "preference"]
CONTRASTS: dict[str, tuple[str, str]] = {  # better, worse
    "init-sft": ("sft", "init"),
    "init-demo": ("demonstrations", "init"),
    "sft-demo": ("demonstrations", "sft"),
    "preference": ("chosen", "rejected"),
}
RefreshName = Literal["current-demo", "current-sft", "init-current"]
REFRESHED: dict[str, tuple[str, str]] = {  # between rounds: `current` is the policy of the round before
    "current-demo": ("demonstrations", "current"),
    "current-sft": ("sft", "current"),
    "init-current": ("current", "init"),
}


def ended(text: str, finished: bool) -> str:
    """The answer under the one ending rule: a finished one as it is, a cut one up to its last whole sentence (or as it
    is, where it has none); no space at the end."""
    return (text if finished else last_whole_sentence(text) or text).rstrip()


def match_length(text: str, target: int) -> str:
    """`text` cut at the sentence end whose length in characters is nearest `target`; never the empty text."""
    ends = [int(end) for end in np.cumsum([len(piece) for piece in sentences(text)]) if text[:end].strip()]
    return text[: min(ends, key=lambda end: abs(end - target))].rstrip() if ends else text


Answer = tuple[Prompt, str, bool]  # a prompt, an answer as it was drawn, whether it finished


def answers_of(
    contrast: str,
    *,
    sft: Sequence[Sample] = (),
    init: Sequence[Sample] = (),
    current: Sequence[Sample] = (),
    demonstrations: Sequence[Demonstration] = (),
    preferences: Sequence[Preference] = (),
) -> tuple[list[Answer], list[Answer]]:
    """The better and the worse answers of a contrast, as they were drawn."""
    sources = {
        "sft": [(s.prompt, s.completion, s.finished) for s in sft],
        "init": [(s.prompt, s.completion, s.finished) for s in init],
        "current": [(s.prompt, s.completion, s.finished) for s in current],
        "demonstrations": [(d.prompt, d.completion, True) for d in demonstrations],
        "chosen": [(p.prompt, p.chosen, True) for p in preferences],
        "rejected": [(p.prompt, p.rejected, True) for p in preferences],
    }
    better, worse = (CONTRASTS | REFRESHED)[contrast]
    return sources[better], sources[worse]


def build_contrasts(better: Sequence[Answer], worse: Sequence[Answer], *, match: bool = True) -> tuple[list[Contrast], dict[str, int]]:
    """Pairs (better, worse) of one prompt each. Within a prompt both sides are sorted by length and paired in order, the
    shorter side repeated; with `match` the pair then gets one length. Beside them, what was left out: prompts with answers
    on one side only, pairs with an empty answer, pairs of equal answers.
    """
    one_sided = {p.prompt_id for p, _, _ in better} ^ {p.prompt_id for p, _, _ in worse}
    pairs = _pair(*([(p, ended(text, finished)) for p, text, finished in side] for side in (better, worse)))
    if match:
        pairs = [_matched(pair) for pair in pairs]
    full = [pair for pair in pairs if pair.better.strip() and pair.worse.strip()]
    different = [pair for pair in full if pair.better != pair.worse]
    left_out = {"one_sided_prompts": len(one_sided), "empty_pairs": len(pairs) - len(full), "equal_pairs": len(full) - len(different)}
    return different, left_out


def _pair(better: Sequence[tuple[Prompt, str]], worse: Sequence[tuple[Prompt, str]]) -> list[Contrast]:
    by_prompt: dict[str, tuple[Prompt, list[str], list[str]]] = {}
    for side, answers in ((1, better), (2, worse)):
        for prompt, text in answers:
            by_prompt.setdefault(prompt.prompt_id, (prompt, [], []))[side].append(text)  # type: ignore[union-attr]
    pairs = []
    for prompt, good, bad in by_prompt.values():
        if good and bad:
            good, bad = sorted(good, key=len), sorted(bad, key=len)
            count = max(len(good), len(bad))
            pairs += [Contrast(prompt, good[i * len(good) // count], bad[i * len(bad) // count]) for i in range(count)]
    return pairs


def _matched(pair: Contrast) -> Contrast:
    if len(pair.better) > len(pair.worse):
        return Contrast(pair.prompt, match_length(pair.better, len(pair.worse)), pair.worse)
    return Contrast(pair.prompt, pair.better, match_length(pair.worse, len(pair.better)))


def contrast_pairs(
    answers: Mapping[str, tuple[Sequence[Answer], Sequence[Answer]]], *, match: bool, needed: bool = True
) -> tuple[dict[str, list[Contrast]], dict[str, int], dict[str, float]]:
    """The pairs of each contrast; beside them what was left out, and what length and ending alone reach, over all of them together.

    `answers` holds the better and the worse side by contrast. Raises DataError where a contrast has no pair and one is `needed`;
    otherwise nothing is controlled.
    """
    pairs: dict[str, list[Contrast]] = {}
    left_out: Counter[str] = Counter()
    for contrast, (better, worse) in answers.items():
        pairs[contrast], missing = build_contrasts(better, worse, match=match)
        left_out.update(missing)
        if needed:
            require_pairs(pairs[contrast])
    if not needed:
        return pairs, dict(left_out), {}
    sides = ([answer for both in answers.values() for answer in both[side]] for side in (0, 1))
    return pairs, dict(left_out), {**leak_controls([pair for of in pairs.values() for pair in of]), **raw_controls(*sides)}


def weighted(pairs: Mapping[str, Sequence[Contrast]], weights: Mapping[str, float]) -> list[Contrast]:
    """The pairs of several contrasts in one list, each with its contrast's weight over the mean weight of all rows, so that a
    learning rate means the same for every mixture; contrasts without a weight are left out."""
    chosen = [(pair, weight) for contrast, weight in weights.items() if weight > 0 for pair in pairs.get(contrast, ())]
    mean = sum(weight for _, weight in chosen) / max(1, len(chosen))
    return [replace(pair, weight=weight / mean) for pair, weight in chosen]


def threshold_accuracy(better: Sequence[float], worse: Sequence[float]) -> float:
    """What one number alone reaches: the balanced accuracy of the best threshold on it, in either direction, 0.5 to 1.

    It equals (1 + D) / 2 with D the two-sample Kolmogorov-Smirnov distance.
    """
    high, low = np.sort(np.asarray(better, dtype=float)), np.sort(np.asarray(worse, dtype=float))
    at = np.concatenate([high, low])
    gap = np.searchsorted(high, at, side="right") / len(high) - np.searchsorted(low, at, side="right") / len(low)
    return float((1 + np.abs(gap).max()) / 2)


def leak_controls(pairs: Sequence[Contrast]) -> dict[str, float]:
    """What the length in characters and the last character alone reach on the pairs a reward is about to see."""
    return {
        "length_accuracy": threshold_accuracy([len(p.better) for p in pairs], [len(p.worse) for p in pairs]),
        "ending_accuracy": threshold_accuracy([_whole(p.better) for p in pairs], [_whole(p.worse) for p in pairs]),
    }


def raw_controls(better: Sequence[Answer], worse: Sequence[Answer]) -> dict[str, float]:
    """The same before anything was brought to one ending: what "finished" and the raw length would have given away."""
    return {
        "finished_accuracy_raw": threshold_accuracy([done for _, _, done in better], [done for _, _, done in worse]),
        "length_accuracy_raw": threshold_accuracy([len(text) for _, text, _ in better], [len(text) for _, text, _ in worse]),
    }


def describe_pairs(pairs: Mapping[str, Sequence[Contrast]], left_out: Mapping[str, int], controls: Mapping[str, float]) -> list[str]:
    """How many pairs there are, what was left out, and what length and the ending alone tell of them, in words."""
    missing = ", ".join(f"{n} {what}".replace("_", " ") for what, n in left_out.items())
    return [
        f"{sum(map(len, pairs.values()))} pairs, left out: {missing}",
        f"length alone tells {controls['length_accuracy']:.0%} of them apart ({controls['length_accuracy_raw']:.0%} as drawn), the ending "
        f"{controls['ending_accuracy']:.0%} (finished or not, as drawn: {controls['finished_accuracy_raw']:.0%})",
    ]


def require_pairs(pairs: Sequence[Contrast]) -> None:
    """Raises DataError where there is nothing to learn from."""
    if not pairs:
        raise DataError(
            "no prompt has two different, non-empty answers to contrast",
            where="reward",
            do="check that both pools hold samples of the train prompts (sampling.train_generations)",
        )


def guard_leak(controls: dict[str, Any], limit: float, pairs: int) -> None:
    """Error when length or the ending alone separates better from worse more often than `limit`.

    Few pairs are separated by chance: the limit is raised by half the Kolmogorov-Smirnov distance that two samples of
    this size from one law exceed once in 20 times, `1.36 sqrt(2 / pairs)`.
    """
    allowed = limit + 0.68 * (2 / pairs) ** 0.5
    for name in ("length_accuracy", "ending_accuracy"):
        if controls[name] > allowed:
            what = name.split("_")[0]
            raise GuardError(
                f"the {what} of an answer alone tells better from worse in {controls[name]:.0%} of the pairs "
                f"(limit {allowed:.0%}): the reward would learn {what} and nothing else",
                where="reward",
                do="keep reward.ending=match, or give answers of like length; reward.max_leak_accuracy=1 goes on all the same",
            )


def _whole(text: str) -> bool:
    return text.rstrip()[-1:] in ".!?\"')]}"

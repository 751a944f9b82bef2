"""Whether a policy may take pi_SFT's place: what two witnesses say of it, the KL it cost, alarms, the choice.

A policy that was trained toward a reward has learned the reward's mistakes too, and the reward cannot see them; one that was trained
toward demonstrations may have learned what the judge of them likes, and the judge cannot see it. So candidates are weighed by both, by the
judge of optimise/heldout.py and by the reward that selects, on the dev prompts, paired with pi_SFT's answers, and pi_SFT stays where they
do not both show one to be better. Pure functions of numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from irlign.optimise.label_free import ALPHA, lower_bounds
from irlign.records import Sample
from irlign.statistics import distinct_n, estimate, kl_bound

LONGER, FEWER = 1.5, 0.5  # alarms: answers so many times as long as pi_SFT's, distinct answers or trigrams so many times as frequent
COMMON, OFTENER = 0.25, 2  # alarm: one answer for more than this share of all, and so many times as often as pi_SFT's commonest
TAIL = 0.01  # of pi_SFT's answers lie beyond either end of the range in which the reward counts
UNENDED = 0.2  # alarm: so much less of its answers end within the limit
WORSE = 0.05  # alarms: so much more of its answers say nothing, or lie below that range
FAR = 64  # alarm: further from pi_SFT than the best of so many answers, and than pi_SFT from pi_0
SFT = "sft"
RULE = "judge and reward within SFT's range, the first round or one shown to beat it; alarms of endings, silence, bad answers and phrases"  # of the choice, for the stage's record: another one is another choice


@dataclass(frozen=True)
class Judged:
    """The dev answers of one policy, the judge's logit of each, and its reward, the one that selects. Shape [rows]."""

    samples: Sequence[Sample]
    logits: np.ndarray
    rewards: np.ndarray

    def measures(self, generations: int) -> dict[str, float]:
        """`tokens` of an answer, the shares `finished` and `empty`, and of the first `generations` of a prompt `distinct_answers`, the share within it that differ,
        `commonest_answer`, the share of all prompts' that are one and the same, and `distinct_3`, of the word trigrams in one answer a prompt the share that differ."""
        texts: dict[str, list[str]] = {}
        turns: dict[int, list[str]] = {}
        for sample in self.samples:
            if sample.index < generations:
                texts.setdefault(sample.prompt.prompt_id, []).append(sample.completion)
                turns.setdefault(sample.index, []).append(sample.completion)
        return {
            "tokens": float(np.mean([s.tokens for s in self.samples])),
            "finished": float(np.mean([s.finished for s in self.samples])),
            "empty": float(np.mean([not s.completion.strip() for s in self.samples])),
            "distinct_answers": float(np.mean([len(set(of)) / len(of) for of in texts.values()])),
            "commonest_answer": max(Counter(everything := [text for of in texts.values() for text in of]).values()) / len(everything),
            "distinct_3": float(np.mean([distinct_n(of, 3) or 1.0 for of in turns.values()])),  # without a trigram nothing repeats
        }

    def phrases_picked(self) -> float:
        """`distinct_3` of the answer that the reward picks for each prompt, finished ones first: how much of the variety selection itself gives up."""
        best: dict[str, tuple[bool, float, str]] = {}
        for sample, reward in zip(self.samples, self.rewards.tolist(), strict=True):
            prompt, mine = sample.prompt.prompt_id, (sample.finished, reward, sample.completion)
            best[prompt] = max(best.get(prompt, mine), mine)
        return distinct_n([text for *_, text in best.values()], 3) or 1.0


@dataclass(frozen=True)
class Candidate:
    """A policy that may be published: the gains of its answers over pi_SFT's at each dev prompt by the judge and by the reward (shape [P]), what choice.json
    says of it, and, of one that its training went past, the name of the one that it ended with."""

    name: str
    gains_P: np.ndarray
    rewarded_P: np.ndarray
    about: Mapping[str, Any]
    before: str | None = None


def in_words(name: str) -> str:
    """A candidate's name as people read it: `round 1 at 50%`."""
    return name.replace("-", " ")


def _means(samples: Sequence[Sample], values: np.ndarray) -> dict[str, float]:
    """The mean of the values over each prompt's answers."""
    found: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        found.setdefault(sample.prompt.prompt_id, []).append(float(value))
    return {prompt_id: float(np.mean(of)) for prompt_id, of in found.items()}


def reward_range(sft: Judged) -> tuple[float, float]:
    """Where the rewards of all but TAIL of pi_SFT's answers at either end lie, those that say nothing left out; without ends where they are all the same."""
    said = [reward for sample, reward in zip(sft.samples, sft.rewards.tolist(), strict=True) if sample.completion.strip()]
    low, high = np.quantile(said, [TAIL, 1 - TAIL]) if said else (0.0, 0.0)
    return (float(low), float(high)) if low < high else (-np.inf, np.inf)


def below_range(sft: Judged, judged: Judged) -> float:
    """The share of a policy's answers whose reward is lower than that range."""
    return float(np.mean(judged.rewards < reward_range(sft)[0]))


def gains_over(sft: Judged, candidate: Judged) -> tuple[np.ndarray, np.ndarray]:
    """The mean gains of a candidate's answers over pi_SFT's at each prompt, by the judge and by the reward, in standard deviations of
    either over pi_SFT's answers. Each of shape [P].

    A reward counts within `reward_range`: beyond it, one answer in hundreds would outweigh the others. pi_SFT's log-probability a token of an answer
    that says nothing can lie 60 standard deviations below its mean. How many lie below is `below_range`, which an alarm watches.
    """
    ends = reward_range(sft)

    def gains(own_B: np.ndarray, base_B: np.ndarray) -> np.ndarray:
        own, base = _means(candidate.samples, own_B), _means(sft.samples, base_B)
        return np.array([own[prompt_id] - base[prompt_id] for prompt_id in base]) / (float(np.std(base_B)) or 1.0)

    return gains(candidate.logits, sft.logits), gains(candidate.rewards.clip(*ends), sft.rewards.clip(*ends))


def kl(answers: Sequence[Sample], own_B: np.ndarray, other_B: np.ndarray) -> dict[str, Any]:
    """KL(policy || other) in nats an answer, `E_{y ~ policy}[log policy(y|x) - log other(y|x)]`, estimated from the policy's own answers:
    the mean over prompts with its interval. Of the law as sampled only at temperature 1 without filters."""
    return estimate(list(_means(answers, own_B - other_B).values())).to_json()


def few(distinct: float, generations: int) -> float:
    """The share of distinct answers below which they are few, where pi_SFT's is `distinct`: FEWER of it, or, of one or two answers, which cannot come to
    that, as far down from it to the least there can be."""
    least = 1 / generations
    return FEWER * distinct if least < FEWER else least + FEWER * (distinct - least)


def alarms_of(
    measures: Mapping[str, Any], sft: Mapping[str, Any], gains_P: np.ndarray, earlier: Sequence[Candidate], generations: int
) -> list[dict[str, str]]:
    """What should stop further rounds, each `{"name", "seen", "do"}`: answers that grow, answers that no longer end, answers that say nothing, more bad answers, answers that repeat, one answer, or
    the same phrases, to many prompts, a policy that has moved far from pi_SFT, and a judged gain that is shown (one-sided, 5 %) to lie below that of pi_SFT or of an earlier candidate that the
    reward shows to gain. `generations` is the number of a prompt's answers that `distinct_answers` is a share of.

    Both witnesses read an answer that was cut as if it had ended, and where pi_SFT's are long none can be LONGER within the limit: so the second alarm.
    The phrases are compared with those of the answers that the reward picks among pi_SFT's: where it drops idle words, so does Best-of-n. Answers repeat where less than FEWER of pi_SFT's share differ and `kl_sft` (its whole interval) is beyond what the best of FAR answers costs at
    most: up to there a prompt's answers grow alike in Best-of-n too, and where one answer is right that is what there is to learn. Far is `kl_sft`
    beyond that and beyond `kl_initial` of pi_SFT: the judge has seen no such answers, and what training finds out there pleases it for nothing.
    """
    found = []
    confirmed = [of.gains_P for of in earlier if lower_bounds(of.rewarded_P[:, None])[0] > 0]
    if measures["tokens"] > LONGER * sft["tokens"]:
        seen = f"{measures['tokens']:.0f} tokens an answer, and SFT's have {sft['tokens']:.0f}"
        found.append(("the aligned policy's answers have grown", seen, "read the samples: the reward may pay for length"))
    if measures["finished"] < sft["finished"] - UNENDED:
        seen = f"{measures['finished']:.0%} of its answers end within the limit, and {sft['finished']:.0%} of SFT's"
        found.append(("the aligned policy no longer ends its answers", seen, "train fewer steps, or raise sampling.max_new_tokens"))
    if measures["empty"] > sft["empty"] + WORSE:
        seen = f"{measures['empty']:.0%} of its answers are empty, and {sft['empty']:.0%} of SFT's"
        found.append(("the aligned policy says nothing", seen, "read the samples; train fewer steps, or lower optimise.learning_rate"))
    if measures["below_range"] > sft["below_range"] + WORSE:
        seen = f"{measures['below_range']:.0%} of its answers have a lower reward than all but the worst of SFT's, and {sft['below_range']:.0%} of SFT's"
        found.append(
            ("the aligned policy gives more bad answers", seen, "read the samples; train fewer steps, or lower optimise.learning_rate")
        )
    moved, sft_moved, most = measures["kl_sft"], sft["kl_initial"], kl_bound(FAR)
    if measures["distinct_answers"] < few(sft["distinct_answers"], generations) and moved["ci95"][0] > most:
        seen = f"{measures['distinct_answers']:.0%} of a prompt's answers differ, and {sft['distinct_answers']:.0%} of SFT's"
        found.append(
            ("the aligned policy's answers repeat", seen, "lower optimise.num_train_epochs or learning_rate, or raise optimise.winners")
        )
    if measures["commonest_answer"] > max(COMMON, OFTENER * sft["commonest_answer"]):
        seen = f"{measures['commonest_answer']:.0%} of all answers are the same, and {sft['commonest_answer']:.0%} of SFT's"
        found.append(("the aligned policy gives one answer to many prompts", seen, "read the samples: the reward may pay for a phrase"))
    if measures["distinct_3"] < FEWER * sft["distinct_3_picked"]:
        seen = f"of the word trigrams in one answer a prompt {measures['distinct_3']:.0%} differ, {sft['distinct_3']:.0%} of SFT's and {sft['distinct_3_picked']:.0%} of the best of those"
        found.append(
            ("the aligned policy says the same to many prompts", seen, "read the samples: reward and judge may both be pleased by a phrase")
        )
    if moved["ci95"][0] > max(most, sft_moved["ci95"][1]):
        seen = f"{moved['mean']:.1f} nats an answer; SFT moved {sft_moved['mean']:.1f} from the initial policy, and the best of {FAR} answers at most {most:.1f}"
        do = "lower optimise.learning_rate or num_train_epochs, or hold it harder where the method has a beta"
        found.append(("the aligned policy has moved far from SFT", seen, do))
    best = max([np.zeros_like(gains_P), *confirmed], key=lambda of: float(of.mean()))
    if lower_bounds((best - gains_P)[:, None])[0] > 0:
        before = f", and was {best.mean():+.2f} before" if best.any() else ""
        seen = f"the gain over SFT is {gains_P.mean():+.2f} sd{before}"
        found.append(("by the judge, the aligned policy turns down", seen, "train fewer steps, or fewer rounds"))
    return [{"name": name, "seen": seen, "do": do} for name, seen, do in found]


def choose(candidates: Sequence[Candidate]) -> tuple[str, np.ndarray]:
    """The candidate to publish, and each one's lower bounds by the judge and by the reward, shape [C, 2], one-sided at 5 % for all candidates together
    (Bonferroni). Fit is one that both bounds show to gain and no alarm speaks against: a policy whose answers grow, say, may please the judge as it
    pleases the reward (docs/studies/frozen_reward.md). Of the fit the first round is published, a later one where the judge shows it to beat
    that, and pi_SFT where none is fit. Within a round it is the policy that the training ended with; one that it went past stands in where that may not
    be published (an alarm is raised too where it is shown to lie below): where the judge tells them apart no better than chance, the reward has had longer."""
    if not candidates:
        return SFT, np.zeros((0, 2))
    alpha = ALPHA / len(candidates)
    by = (np.stack(gains, axis=1) for gains in ([c.gains_P for c in candidates], [c.rewarded_P for c in candidates]))
    low_C_2 = np.stack([lower_bounds(gains_P_C, alpha) for gains_P_C in by], axis=1)
    fit = {c.name: c for c, lows in zip(candidates, low_C_2, strict=True) if lows.min() > 0 and not c.about.get("alarms")}
    best: Candidate | None = None
    for one in (c for c in fit.values() if c.before not in fit):
        if best is None or lower_bounds((one.gains_P - best.gains_P)[:, None], alpha)[0] > 0:
            best = one
    return best.name if best else SFT, low_C_2


def _refused(judged_better: Candidate) -> str:
    """Why a candidate that the judge shows to gain is not published."""
    alarms = judged_better.about.get("alarms")
    but = f"raises an alarm ({alarms[0]['name']})" if alarms else "the reward does not show it to be"
    return f"{in_words(judged_better.name)} is judged better and {but}"


def choice_of(candidates: Sequence[Candidate], sft: Mapping[str, Any], kept: str | None = None, ended: str | None = None) -> dict[str, Any]:
    """What choice.json says of the choice: `published` (the candidate's name, or `sft`), `why`, and `candidates`, pi_SFT first.

    `kept` says why there is no candidate, where there is none; `ended` what went wrong in a round that then made none.
    """
    published, low_C_2 = choose(candidates)
    count = f"{len(candidates)} candidates" if len(candidates) > 1 else "the one candidate"
    why = f"the judge does not show {count} to beat SFT, at 5% for all together"
    better = [c for c, (low, _) in zip(candidates, low_C_2, strict=True) if low > 0]
    if published != SFT:
        why = f"by the judge and by the reward its gain over SFT is above 0 at 5% for {count}"
        if last := next(c.before for c in candidates if c.name == published):
            why += f", and {in_words(last)}, with which its training ended, may not be published"
    elif better:
        why = "; ".join(map(_refused, better))
    why = f"{why if candidates else kept}{f'; {ended}' if ended else ''}{', so SFT is kept' if published == SFT else ''}"
    found: dict[str, Any] = {SFT: dict(sft)} if sft else {}
    for candidate, lows in zip(candidates, low_C_2.tolist(), strict=True):
        means = (float(gains_P.mean()) for gains_P in (candidate.gains_P, candidate.rewarded_P))
        gains = ({"mean": mean, "low": low} for mean, low in zip(means, lows, strict=True))
        found[candidate.name] = {**dict(zip(("gain", "reward_gain"), gains, strict=True)), **candidate.about}
    prompts = len(candidates[0].gains_P) if candidates else 0
    return {"published": published, "why": why, "prompts": prompts, "candidates": found}

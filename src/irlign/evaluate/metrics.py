"""Stored answers and their scores become evaluation/results.json: means over test prompts, intervals, tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from irlign import statistics
from irlign.config import Settings
from irlign.evaluate.calibration import calibration
from irlign.evaluate.group import Group
from irlign.evaluate.judge import JudgeSettings
from irlign.evaluate.lm_eval import LMEvalSettings
from irlign.evaluate.overoptimisation import FAR, deviation, fit_gao, pick_alarms
from irlign.reward.controls import CONTROLS


class EvaluationSettings(Settings):
    """Evidence on the test prompts."""

    golden_reward: str | None = Field(
        None,
        description="what answers are truly worth: module:function, a sequence-classification checkpoint, or null (a world has its own)",
    )
    other_golden_rewards: list[str] = Field(
        default_factory=list, description="further ones beside it, of the same kinds: is a gain one reward's opinion?"
    )
    reward_bench: list[str] = Field(
        default_factory=list,
        description="files of preference pairs in RewardBench's columns (prompt, chosen, rejected, subset) to try the reward on",
    )
    lm_eval: LMEvalSettings | None = Field(
        None, description="tasks of lm-evaluation-harness for the initial, the SFT and the aligned policy; null = none is asked"
    )
    judge: JudgeSettings | None = Field(
        None, description="a model at an endpoint that compares test answers in pairs; null = none is asked"
    )
    resamples: int = Field(10_000, ge=100, description="bootstrap and permutation resamples")


class Evaluation:
    """Everything measured on one run's test prompts. `selector` names the reward that Best-of-N selected by, `learned` the trained
    one in it (None: the same), `chosen` the n that was used (None: the whole pool), `used` the answers of the pool that selection looked at
    (None: the first `chosen` of each prompt).

    `pool` is pi_SFT's pool with N answers for each prompt, `initial` pi_0's, `demonstrations` may be empty, `aligned` is missing where no
    policy was optimised. Best-of-n values are the exact expectations over subsets of the pool (method.md section 4), so n = 1 is the mean
    of pi_SFT. With `sft` the pool holds candidates from elsewhere, and pi_SFT's own samples stand beside it; `base` names what n = 1 is.
    """

    def __init__(
        self,
        initial: Group,
        pool: Group,
        demonstrations: Group,
        selector: str,
        settings: EvaluationSettings,
        seed: int,
        chosen: int | None = None,
        learned: str | None = None,
        aligned: Group | None = None,
        sft: Group | None = None,
        used: np.ndarray | None = None,
    ):
        drawn = {"sft": pool} if sft is None else {"sft": sft, "candidates": pool}
        self.base = list(drawn)[-1]
        self.groups = {"initial": initial, **drawn, **({"aligned": aligned} if aligned else {}), "demonstrations": demonstrations}
        self.pool, self.selector, self.learned = pool, selector, learned or selector
        self.resamples, self.seed = settings.resamples, seed
        self.prompts = list(pool.by_prompt(pool.finished))
        self.largest = min(len(of) for of in pool.by_prompt(pool.finished).values())
        self.chosen = min(chosen or self.largest, self.largest)
        self.n = sorted({*statistics.powers_of_two(self.largest), self.chosen})
        self.used = self._first() if used is None else np.asarray(used, dtype=bool)

    def estimate(self, values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
        """E of one value for each prompt, or None without values."""
        return statistics.estimate(values, resamples=self.resamples, seed=self.seed).to_json() if len(values) else None

    def curve(self, selecting: np.ndarray, measured: Sequence[float] | np.ndarray, points: Sequence[int] | None = None) -> np.ndarray:
        """Expected `measured` of the pick among n by `selecting`, shape [P, n]; a finished answer always comes first."""
        return self._curve(self.pool, selecting, measured, points or self.n)

    def _curve(self, group: Group, selecting: np.ndarray, measured: Sequence[float] | np.ndarray, points: Sequence[int]) -> np.ndarray:
        keys, values, done = (group.by_prompt(v) for v in (selecting, measured, group.finished))
        return np.array([[statistics.best_of_n(keys[p], values[p], n, done[p]) for n in points] for p in self.prompts])

    def curve_json(self, curve_P_n: np.ndarray) -> dict[str, Any]:
        return {str(n): self.estimate(curve_P_n[:, i]) for i, n in enumerate(self.n)}

    def on_aligned(self) -> dict[str, Any] | None:
        """Golden means of Best-of-n on top of the aligned policy, by the reward that selects, n up to its answers; None without one."""
        group = self.groups.get("aligned")
        if group is None or group.golden is None:
            return None
        points = statistics.powers_of_two(min(len(of) for of in group.by_prompt(group.finished).values()))
        curve_P_n = self._curve(group, group.rewards[self.selector], group.golden, points)
        return {str(n): self.estimate(curve_P_n[:, i]) for i, n in enumerate(points)}

    def per_prompt(self, measure: str) -> dict[str, list[float]]:
        """For each source its mean over answers at each test prompt, `measure` being "golden" or the selector's name."""
        found = {}
        for name, group in self.groups.items():
            values = group.golden if measure == "golden" else group.rewards.get(measure)
            found[name] = list(group.means(values).values()) if values is not None else []
        return found

    def golden(self, name: str) -> dict[str, Any]:
        """Golden means of every source, and the Best-of-n curve under every reward, beside the oracle's and that of the aligned policy."""
        assert self.pool.golden is not None
        curves = {reward: self.curve_json(self.curve(scores, self.pool.golden)) for reward, scores in self.pool.rewards.items()}
        oracle = self.curve_json(self.curve(self.pool.golden, self.pool.golden))
        means = {source: self.estimate(values) for source, values in self.per_prompt("golden").items()}
        best = {"best_of_n": curves[self.selector], "aligned_best_of_n": self.on_aligned()}
        return {"name": name, "aligned": None, **means, **best, "rewards": curves, "oracle": oracle}

    def heldout(self) -> dict[str, Any]:
        """What can be said without a golden reward: separation, ends, lengths, diversity, what the reward follows."""
        scores = self.pool.rewards[self.selector]
        words = {name: np.array([len(t.split()) for t in g.texts]) for name, g in self.groups.items()}
        repeated = {name: np.array([statistics.repetition(t) for t in g.texts]) for name, g in self.groups.items()}
        return {
            "reward_auc": self._auc(self.learned),
            "length_auc": self._auc("length"),
            "calibration": calibration(*self._sides(self.learned), resamples=self.resamples, seed=self.seed),
            "rewards": {
                **self._sources(lambda name: self.groups[name].rewards.get(self.selector, ())),
                "best_of_n": self.curve_json(self.curve(scores, scores)),
            },
            "finished": self._with_best(lambda name: self.groups[name].finished, demonstrations=False),
            "completion_length": self._with_best(lambda name: words[name]),
            "repetition": self._with_best(lambda name: repeated[name]),
            "distinct_2": self._distinct(),
            "length_correlation": self._correlation(scores, words[self.base]),
            "repetition_correlation": self._correlation(scores, repeated[self.base]),
            **{
                f"{name}_correlation": self._correlation(scores, self.pool.rewards[name]) if name in self.pool.rewards else None
                for name in ("style", "judge")
            },
            "distinct_answers": self.estimate([len(set(of)) / len(of) for of in self._pool_texts().values()]),
            "outlier_picks": self.estimate(self._outliers()),
        }

    def _pool_texts(self) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        for prompt_id, text in zip(self.pool.prompt_ids, self.pool.texts, strict=True):
            texts.setdefault(prompt_id, []).append(text)
        return texts

    def _outliers(self) -> list[float]:
        """For each prompt whether its pick lies two standard deviations below its pool in log-probability a token; nothing where that
        is not known."""
        return [float(by < -FAR) for by in self._deviations(self.pool.likelihood).values()]

    def _deviations(self, values: np.ndarray | None) -> dict[str, float]:
        """How far each prompt's pick lies from its pool in these values of the pool's rows; nothing where there are none."""
        if values is None:
            return {}
        pools, picks = self.pool.by_prompt(values), self.best()
        return {p: deviation(float(values[picks[p]]), pools[p]) for p in self.prompts}

    def _pick_alarms(self) -> dict[str, list[str]]:
        """What looks wrong with each prompt's pick."""
        words, picks = self._deviations(np.array([len(t.split()) for t in self.pool.texts], dtype=float)), self.best()
        likely = self._deviations(self.pool.likelihood)
        return {
            p: pick_alarms(bool(self.pool.finished[i]), words[p], likely.get(p), statistics.repetition(self.pool.texts[i]))
            for p, i in picks.items()
        }

    def _sources(self, values: Any) -> dict[str, Any]:
        return {
            name: self.estimate(list(group.means(v).values())) if len(v := values(name)) else None for name, group in self.groups.items()
        }

    def _with_best(self, values: Any, demonstrations: bool = True) -> dict[str, Any]:
        """A quantity of each source and, as `best_of_n`, of the pick among the chosen n."""
        found = self._sources(values) | ({} if demonstrations else {"demonstrations": None})
        best = self.curve(self.pool.rewards[self.selector], np.asarray(values(self.base), dtype=float))[:, self.n.index(self.chosen)]
        return {**found, "best_of_n": self.estimate(best)}

    def _auc(self, reward: str) -> dict[str, Any] | None:
        """How often the reward puts an answer of pi_SFT above one of pi_0, over prompts that have both."""
        better, worse = self._sides(reward)
        return self.estimate([statistics.auc(better[p], worse[p]) for p in better if p in worse])

    def _sides(self, reward: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The reward of each prompt's answers of pi_SFT, and of pi_0."""
        sft, initial = (g.by_prompt(g.rewards[reward]) for g in (self.groups["sft"], self.groups["initial"]))
        return sft, initial

    def _correlation(self, scores: np.ndarray, other: np.ndarray) -> dict[str, Any] | None:
        """Spearman within each prompt's pool, averaged over the prompts where both vary."""
        a, b = self.pool.by_prompt(scores), self.pool.by_prompt(other)
        found = [statistics.spearman(a[p], b[p]) for p in self.prompts]
        return self.estimate([value for value in found if value is not None])

    def _first(self) -> np.ndarray:
        """Which rows are among the first `chosen` of their prompt. Shape [rows]."""
        seen, found = dict[str, int](), np.zeros(len(self.pool.prompt_ids), dtype=bool)
        for i, p in enumerate(self.pool.prompt_ids):
            seen[p] = seen.get(p, 0) + 1
            found[i] = seen[p] <= self.chosen
        return found

    def best(self) -> dict[str, int]:
        """The row of the pick among each prompt's `used` answers: finished first, then the reward, then the first drawn."""
        scores = self.pool.rewards[self.selector]
        picks: dict[str, int] = {}
        for i in np.flatnonzero(self.used).tolist():
            p, rank = self.pool.prompt_ids[i], (bool(self.pool.finished[i]), scores[i])
            if p not in picks or rank > (bool(self.pool.finished[picks[p]]), scores[picks[p]]):
                picks[p] = i
        return picks

    def _distinct(self) -> dict[str, Any]:
        """Distinct-2 over one answer for each prompt, so that all sources are counted alike; no interval."""
        chosen = {name: [group.texts[i] for i in group.first().values()] for name, group in self.groups.items()}
        chosen["best_of_n"] = [self.pool.texts[i] for i in self.best().values()]
        return {
            name: {"mean": statistics.distinct_n(texts), "ci95": None, "prompts": len(texts)} if texts else None
            for name, texts in chosen.items()
        }

    def rows(self, prompts: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row for each test prompt: an answer of every source, its reward and golden value, what looks wrong with the pick (`alarms`), and
        the mean values behind every figure as `MEASURE/SOURCE` and `MEASURE/best_of_n`. `prompts` gives each prompt as text, by id.
        """
        columns: dict[str, list[float | None]] = {}
        for measure, scores in (("golden", self.pool.golden), ("reward", self.pool.rewards[self.selector])):
            if scores is None:
                continue
            for name, group in self.groups.items():
                values = group.golden if measure == "golden" else group.rewards.get(self.selector)
                means = group.means(values) if values is not None else {}
                columns[f"{measure}/{name}"] = [means.get(p) for p in self.prompts]
            curve = self.curve(self.pool.rewards[self.selector], scores)
            columns |= {f"{measure}/best_of_{n}": curve[:, i].tolist() for i, n in enumerate(self.n)}
        found: list[dict[str, Any]] = [
            {"prompt_id": p, "prompt": prompts[p], **{key: of[i] for key, of in columns.items()}} for i, p in enumerate(self.prompts)
        ]
        suspect = self._pick_alarms()
        picks = {**{name: group.first() for name, group in self.groups.items()}, "best_of_n": self.best()}
        for row in found:
            row["alarms"] = "; ".join(suspect[row["prompt_id"]])
            for name, pick in picks.items():
                group, i = self.groups.get(name, self.pool), pick.get(row["prompt_id"])
                row[f"answer/{name}"] = None if i is None else group.texts[i]
                row[f"answer_reward/{name}"] = None if i is None else float(group.rewards[self.selector][i])
                row[f"answer_golden/{name}"] = None if i is None or group.golden is None else float(group.golden[i])
        return found

    def tests(self, measure: str) -> list[dict[str, Any]]:
        """Paired comparisons over the test prompts. The trained reward cannot judge its own picks, so without a golden
        reward only pi_SFT against pi_0 is tested. `best_of_oracle_n` takes, for each half of the prompts, the n that is best on
        the other half; `best_of_<best n>` takes the top of the curve itself and is optimistic for it.
        """
        pairs = [self._paired("sft", "initial", measure)]
        if measure == "golden":
            assert self.pool.golden is not None
            if (group := self.groups.get("aligned")) is not None and group.golden is not None:
                pairs += [self._paired("aligned", "sft", measure), self._paired("aligned", "initial", measure)]
            curve = self.curve(self.pool.rewards[self.selector], self.pool.golden)
            one, best, last, base = curve[:, 0], int(curve.mean(0).argmax()), f"best_of_{self.largest}", self.base
            pairs += [(last, base, curve[:, -1], one), ("best_of_oracle_n", base, statistics.oracle_n(curve, self.seed), one)]
            if 1 < self.chosen < self.largest:
                pairs.append((f"best_of_{self.chosen}", base, curve[:, self.n.index(self.chosen)], one))
            if 0 < best < len(self.n) - 1:
                top = f"best_of_{self.n[best]}"
                pairs += [(top, base, curve[:, best], one)] if self.n[best] != self.chosen else []
                pairs.append((last, top, curve[:, -1], curve[:, best]))
            for other in self.pool.rewards:
                if other not in (self.selector, "judge", "style", *CONTROLS):
                    its = self.curve(self.pool.rewards[other], self.pool.golden)[:, -1]
                    pairs.append((last, f"{last}/{other}", curve[:, -1], its))
        options: dict[str, Any] = {"resamples": self.resamples, "seed": self.seed}
        return [{**statistics.paired_test(a, b, x, y, **options).to_json(), "measure": measure} for a, b, x, y in pairs]

    def _paired(self, a: str, b: str, measure: str) -> tuple[str, str, np.ndarray, np.ndarray]:
        """Both names, and the mean of each source at the prompts that both have. Two arrays of shape [P]."""
        found = []
        for name in (a, b):
            group = self.groups[name]
            values = group.golden if measure == "golden" else group.rewards[measure]
            assert values is not None
            found.append(group.means(values))
        return a, b, *(np.array([of[p] for p in found[0] if p in found[1]]) for of in found)  # type: ignore[return-value]

    def curve_info(self, golden: Mapping[str, Any] | None) -> dict[str, Any]:
        """n, the KL in nats (its bound, and estimated from the pools), and with a golden reward the n at the top of its curve and
        Gao's law fitted to it.
        """
        kl_n, best, gao = self.kl(), None, None
        if golden:
            assert self.pool.golden is not None
            best = max(self.n, key=lambda n: golden["best_of_n"][str(n)]["mean"])
            curve_P_n = self.curve(self.pool.rewards[self.selector], self.pool.golden)
            gao = fit_gao(curve_P_n, self.n, kl_n, resamples=self.resamples, seed=self.seed)
        bound = [statistics.kl_bound(n) for n in self.n]
        return {"n": self.n, "kl_bound": bound, "kl": kl_n.tolist(), "best_n": best, "gao": gao.to_json() if gao else None}

    def judged(self) -> dict[str, Any] | None:
        """What the label-free judge says of Best-of-n on the test prompts, where nothing was chosen: gains over n = 1 in standard
        deviations of its logit; None without a judge.
        """
        if "judge" not in self.pool.rewards:
            return None
        judged = self.pool.rewards["judge"]
        curve_P_n = self.curve(self.pool.rewards[self.selector], judged / (float(np.std(judged)) or 1.0))
        return self.curve_json(curve_P_n - curve_P_n[:, :1])

    def kl(self) -> np.ndarray:
        """KL(Best-of-n || pi_SFT) in nats by the selecting reward, the mean over prompts. Shape [n]."""
        keys, done = (self.pool.by_prompt(v) for v in (self.pool.rewards[self.selector], self.pool.finished))
        texts = self._pool_texts()
        ranks = {p: statistics.rank_keys(keys[p], done[p]) for p in self.prompts}
        return np.array([np.mean([statistics.best_of_n_kl(texts[p], ranks[p], n) for p in self.prompts]) for n in self.n])

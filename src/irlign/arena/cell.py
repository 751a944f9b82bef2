"""A cell of the arena: one world (or one's own recipe), one setting of its dials and one seed, as a run directory up to its pools.

Rewards are trained when a method first asks for them and stored, so a cell that was interrupted, or is asked for further
methods, goes on. The golden reward is out of reach here, but for `preferences`, the labelled reference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from irlign import pipeline
from irlign.data.splits import stored_demonstrations
from irlign.errors import ConfigError
from irlign.evaluate.golden import Golden, load_golden
from irlign.files import read_json, read_table, write_table
from irlign.optimise.best_of_n import scored_text, scored_texts
from irlign.optimise.heldout import judge_pool
from irlign.optimise.label_free import JUDGE, Curve, judged_curve
from irlign.recipe import Recipe, as_recipe
from irlign.records import Demonstration, Preference, Prompt, Sample, mean_logprobs
from irlign.reward.contrasts import answers_of, contrast_pairs
from irlign.reward.learn import train_reward_of, trained_tokens
from irlign.reward.load import load_reward
from irlign.reward.log_ratio import LogRatio
from irlign.reward.train import RewardSettings
from irlign.runs import Run, request_seed
from irlign.sampling.pools import stored_samples

BASE: dict[str, Any] = {  # the recipe of every cell; a setting overrides it
    "pretrain": {"learning_rate": 4e-3, "num_train_epochs": 3},
    "sft": {"learning_rate": 3e-4, "num_train_epochs": 4, "per_device_train_batch_size": 16},
    "sampling": {"num_generations": 32, "train_generations": 4, "initial_generations": 4, "max_new_tokens": 96, "max_cut_share": 1.0},
    "reward": {"learning_rate": 5e-4, "num_train_epochs": 2, "per_device_train_batch_size": 16},
}
QUICK: dict[str, Any] = {  # over it, for a look at whether everything runs
    "world": {"corpus_lines": 3000, "demonstrations": 100, "dev_prompts": 30, "test_prompts": 40},
    "sampling": {"num_generations": 8, "train_generations": 2},
}
BOTH = ("init", "sft")  # the policies that have pools
Setting = Mapping[str, Any]  # dotted recipe keys and their values, such as {"world.heterogeneity": 0}; "as" is a name for the whole


@dataclass(frozen=True)
class Place:
    """Which cell: a setting (its `world.name` among the keys, or over the recipe in the file `config`) and a seed, below a root folder."""

    root: str
    setting: tuple[tuple[str, Any], ...]
    seed: int
    quick: bool = False
    config: str | None = None

    @property
    def name(self) -> str:
        """The setting in words, `dialogue, heterogeneity 0`; of one's own recipe the model and the data."""
        if self.config:
            recipe = self._settings()
            return ", ".join(Path(name).stem for name in (recipe.model_name_or_path, recipe.dataset_name) if name) or Path(self.config).stem
        if "as" in dict(self.setting):
            return f"{dict(self.setting)['world.name']}, {dict(self.setting)['as']}"
        words = [f"{key.removeprefix('world.').replace('_', ' ')} {value}" for key, value in self.setting if key != "world.name"]
        return ", ".join([str(dict(self.setting)["world.name"]), *words])

    @property
    def folder(self) -> Path:
        """Named by what differs from the base recipe, so that studies whose settings meet share a cell."""
        if self.config:
            return Path(self.root) / self.name.replace(", ", "-") / f"seed-{self.seed}"
        base = Place(self.root, (("world.name", dict(self.setting)["world.name"]),), self.seed, self.quick)
        own, its = self._settings().model_dump(), base._settings().model_dump()
        changed = tuple((key, value) for key, value in self.setting if key in ("as", "world.name") or _at(own, key) != _at(its, key))
        return Path(self.root) / replace(self, setting=changed).name.replace(", ", "-").replace(" ", "_") / f"seed-{self.seed}"

    def recipe(self) -> Recipe:
        """The resolved recipe of the cell. Raises ConfigError on an unknown key or value."""
        return self._settings().model_copy(update={"output_dir": str(self.folder)})

    def _settings(self) -> Recipe:
        if self.config:
            return as_recipe(self.config, [f"{key}={value}" for key, value in self.setting]).model_copy(update={"seed": self.seed})
        values: dict[str, Any] = {section: dict(of) for section, of in BASE.items()}
        for section, of in (QUICK if self.quick else {}).items():
            values[section] = {**values.get(section, {}), **of}
        values |= {"seed": self.seed}
        for key, value in self.setting:
            if key == "as":
                continue
            section, _, name = key.rpartition(".")
            values[section] = {**values.get(section, {}), name: value} if section else value
        return as_recipe(values)


def golden_of(recipe: Recipe) -> Golden:
    """The true reward of a cell. Raises ConfigError where a recipe has none."""
    if recipe.evaluation.golden_reward:
        return load_golden(recipe.evaluation.golden_reward)
    if recipe.world is None:
        raise ConfigError("the arena compares by a golden reward, and the recipe has none", where="evaluation.golden_reward")
    return recipe.world.golden


def _at(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


class Cell:
    """What a method sees: stored answers of the policies and rewards of them, row for row with `pool`."""

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, run
        for stage in (pipeline.init, pipeline.data, pipeline.sft, pipeline.sample):
            stage(recipe, run)

    @cached_property
    def pool(self) -> list[Sample]:
        """pi_SFT's answers to the dev and test prompts."""
        return self.samples("sft", "dev", "test")

    @cached_property
    def is_dev(self) -> np.ndarray:
        """Which rows of the pool answer dev prompts. Shape [rows]."""
        return np.array([sample.prompt.split == "dev" for sample in self.pool])

    @cached_property
    def prompt_ids(self) -> list[str]:
        return [sample.prompt.prompt_id for sample in self.pool]

    @cached_property
    def finished(self) -> np.ndarray:
        return np.array([sample.finished for sample in self.pool])

    @cached_property
    def texts(self) -> tuple[list[Any], list[str]]:
        """Prompts and answers of the pool as a reward sees them."""
        return scored_texts(self.pool)

    def samples(self, policy: str, *splits: str) -> list[Sample]:
        return stored_samples(self.run, policy, *splits)

    def demonstrations(self, split: str) -> list[Demonstration]:
        return stored_demonstrations(self.run, split)

    def learned(self, name: str, changes: Mapping[str, Any], *, noise: float = 0.0, member: int = 0) -> np.ndarray:
        """The scores of a reward trained with these changes to the recipe's reward settings, in `rewards/NAME`. Shape [rows].

        `noise` is the share of flipped labels where the contrast is `preference`; another `member` is another seed.
        """
        settings = RewardSettings.model_validate({**self.recipe.reward.model_dump(), **changes})

        def build(folder: Path) -> dict[str, Any]:
            train, dev = (self._pairs(settings, split, noise) for split in ("train", "dev"))
            target = folder / "rewards" / name
            options: dict[str, Any] = {"chat_template": self.recipe.data.chat_template}
            options["encoder"] = str(self.run.path("policies", settings.backbone))
            places: dict[str, Any] = {"folder": target, "checkpoints": folder / "checkpoints", "seed": self.run.seed + 1009 * member}
            log = train_reward_of(settings, self.run.path("policies", settings.backbone), train, dev, **places, **options)
            self._write_scores(folder, name, load_reward(target).score(*self.texts))
            return {"pairs": sum(map(len, train.values())), "tokens": trained_tokens(log.get("training"))}

        return self._scores(
            name, build, {"reward": settings, "noise": noise, "member": member}, [f"rewards/{name}", f"scores/{name}.parquet"]
        )

    def fine_tuned(self, name: str, changes: Mapping[str, Any]) -> str:
        """Another SFT policy, with changes to the recipe's SFT settings; see `tuned`."""
        from irlign.policy.sft import train_sft

        sides = self.demonstrations("train"), self.demonstrations("dev")
        settings = self.recipe.sft.model_copy(update=dict(changes))
        return self.tuned(name, partial(train_sft, self.run.path("policies/init"), *sides, settings), {"sft": settings})

    def tuned(self, name: str, train: Callable[..., dict[str, Any]], settings: Any) -> str:
        """Another policy, which `train` puts into the folder it is given, and a pool of its answers to the test prompts; its name. `settings`
        are all that the policy depends on beside the cell."""
        sampling, template, seed = self.recipe.sampling, self.recipe.data.chat_template, self.run.seed

        def build(folder: Path) -> dict[str, Any]:
            from irlign.sampling.pools import draw_pool

            policy, pool = folder / "policies" / name, folder / f"pools/{name}.parquet"
            log = train(folder=policy, checkpoints=folder / "checkpoints", chat_template=template, seed=seed, report_to="none")
            wanted = [(d.prompt, sampling.initial_generations) for d in self.demonstrations("test")]
            drawn = draw_pool(policy, wanted, sampling, chat_template=template, folder=pool, seed=seed, name=name)
            return {**drawn, "tokens": log["tokens"]}

        self._do(f"policy-{name}", build, settings, [f"policies/{name}", f"pools/{name}.parquet"])
        return name

    def _pairs(self, settings: RewardSettings, split: str, noise: float) -> dict[str, Any]:
        sides: dict[str, Any] = {policy: self.samples(policy, split) for policy in ("init", "sft")}
        sides |= {"demonstrations": self.demonstrations(split), "preferences": ()}
        if "preference" in settings.weights:
            sides["preferences"] = self.preferences(split, noise)
        answers = {contrast: answers_of(contrast, **sides) for contrast in settings.weights}
        return contrast_pairs(answers, match=settings.ending == "match", needed=split == "train")[0]

    def preferences(self, split: str, noise: float, *, whole: bool = False) -> list[Preference]:
        """The labelled reference: pairs of pi_SFT's and pi_0's answers to one prompt, ordered by the golden reward, a share `noise`
        of the labels flipped. As many pairs as a contrast of the two pools gives, fewer where answers that were cut are left out (`whole`).
        Only the rows that say `labels` see it."""
        golden = golden_of(self.recipe)
        by_prompt: dict[str, tuple[Prompt, list[str]]] = {}
        for sample in (s for policy in ("sft", "init") for s in self.samples(policy, split) if s.finished or not whole):
            by_prompt.setdefault(sample.prompt.prompt_id, (sample.prompt, []))[1].append(scored_text(sample))
        found = []
        for prompt, texts in by_prompt.values():
            rng = np.random.default_rng(request_seed(self.run.seed, "preferences", prompt.prompt_id, 0) % 2**63)
            order = rng.permutation(len(texts))
            worth = golden([prompt.content] * len(texts), texts)
            for a, b in zip(order[::2], order[1::2], strict=False):
                if worth[a] != worth[b]:
                    high, low = (a, b) if (worth[a] > worth[b]) != (rng.random() < noise) else (b, a)
                    found.append(Preference(prompt, texts[high], texts[low]))
        return found

    def likelihoods(self) -> dict[str, np.ndarray]:
        """`sft` and `init`: log pi(y|x) of the pool in nats; `tokens`. Each of shape [rows]."""

        def build(folder: Path) -> dict[str, Any]:
            pair = LogRatio(self.run.path("policies/sft"), self.run.path("policies/init"), self.recipe.data.chat_template)
            nats, tokens = pair.likelihoods(*self.texts)
            rows = [{"sft": a, "init": b, "tokens": float(t)} for a, b, t in zip(*nats, tokens[0], strict=True)]
            write_table(folder / "scores/likelihoods.parquet", rows)
            return {"rows": len(rows)}

        self._do("likelihoods", build, {}, ["scores/likelihoods.parquet"])
        rows = read_table(self.run.path("scores/likelihoods.parquet"))
        return {key: np.array([row[key] for row in rows]) for key in ("sft", "init", "tokens")}

    def judged(self) -> np.ndarray:
        """The logit of the label-free judge, from the dev demonstrations (optimise/heldout.py). Shape [rows]."""

        def build(folder: Path) -> dict[str, Any]:
            options = {"chat_template": self.recipe.data.chat_template}
            judged, _, auc = judge_pool(
                self.run.path("policies/init"), self.pool, self.samples("init", "dev"), self.demonstrations("dev"), **options
            )
            self._write_scores(folder, "judge", np.zeros(len(self.pool)) if judged is None else judged)
            return {"auc": auc}

        return self._scores("judge", build, {"judge": JUDGE}, ["scores/judge.parquet"])

    def judged_curve(self, scores: np.ndarray, judged: np.ndarray | None = None) -> Curve:
        """Best-of-n by `scores`, shape [rows], as the label-free judge sees it on dev, or another with its values of the dev rows."""
        dev = self.is_dev
        samples = [s for s, own in zip(self.pool, dev, strict=True) if own]
        values = self.judged()[dev] if judged is None else judged
        return judged_curve([s.prompt.prompt_id for s in samples], scores[dev], values, self.finished[dev], mean_logprobs(samples))

    def _write_scores(self, folder: Path, name: str, scores: np.ndarray) -> None:
        write_table(folder / f"scores/{name}.parquet", [{"score": float(value)} for value in scores])

    def _scores(self, name: str, build: Any, settings: Any, outputs: Sequence[str]) -> np.ndarray:
        self._do(f"reward-{name}", build, settings, outputs)
        return np.array([row["score"] for row in read_table(self.run.path(f"scores/{name}.parquet"))])

    def _do(self, stage: str, build: Any, settings: Any, outputs: Sequence[str]) -> None:
        paths = ("pools/init.parquet", "pools/sft.parquet", "data/train.parquet", "data/dev.parquet", "policies/init", "policies/sft")
        self.run.do(stage, build, settings=settings, inputs={path: path for path in paths}, outputs=outputs)

    def kl(self) -> float:
        """KL(pi_SFT || pi_0) in nats an answer, estimated from pi_SFT's answers to the test prompts."""
        of = self.likelihoods()
        return float((of["sft"] - of["init"])[~self.is_dev].mean())

    def accuracy(self, stages: Sequence[str]) -> float | None:
        """On how many unseen pairs the trained rewards among the stages put the better answer first, their mean; None where there is none."""
        names = [stage.removeprefix("reward-") for stage in stages if self.run.path(f"rewards/{stage.removeprefix('reward-')}").is_dir()]
        told = [read_json(self.run.path("rewards", name, "reward.json"))["dev"] for name in names]
        return float(np.mean([of["accuracy"] for of in told])) if told and all(told) else None

    def seconds(self, stages: Sequence[str]) -> float:
        """What the named stages took, on one thread of this machine."""
        return float(sum(self.run.stages[stage]["seconds"] for stage in stages))

    def trained(self, stages: Sequence[str]) -> int | None:
        """Tokens that the named stages trained on; None where one has not counted them."""
        counts = [self.run.stages[stage]["notes"].get("tokens") for stage in stages]
        return None if None in counts else sum(counts)

    def memory(self, stages: Sequence[str]) -> float:
        """The most memory that a process held by the end of the named stages, in MiB."""
        return float(max((self.run.stages[stage]["peak_memory_mib"] or 0 for stage in stages), default=0))

    def tokens(self, split: str, policies: Sequence[str] = BOTH) -> int:
        """Tokens drawn for the pools of these policies on the prompts of a split."""
        return sum(sample.tokens for policy in policies for sample in self.samples(policy, split))

"""The method on one page: a recipe, one function for each stage, and `run`, which calls them in order.

    init -> data -> sft -> sample -> reward -> bon -> eval -> report

Stages meet only through files of the run directory (docs/run_directory.md). A finished stage whose settings and inputs
have not changed is skipped; a changed one runs again, and so does what follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from irlign.config import Settings, dump_recipe, load_recipe, parse_seeds
from irlign.data.demonstrations import DataSettings
from irlign.errors import ConfigError, DataError
from irlign.evaluate.metrics import EvaluationSettings
from irlign.optimise.best_of_n import SCORE, BestOfNSettings
from irlign.policy.pretrain import PretrainSettings
from irlign.policy.sft import SFTSettings
from irlign.progress import say
from irlign.records import SPLITS, Demonstration, Prompt, Sample
from irlign.reward.train import RewardSettings
from irlign.runs import Run, read_json, read_table, write_json, write_table
from irlign.sampling.engine import SamplingSettings
from irlign.worlds.dialogue import DialogueWorld

WORLDS = {"dialogue": DialogueWorld}


class Recipe(Settings):
    """Everything that a run depends on. Give a model and a dataset, or a world that makes its own."""

    model_name_or_path: str | None = Field(None, description="pi_0: a folder or a Hub id of a causal language model")
    sft_model_name_or_path: str | None = Field(None, description="an SFT model you already have; SFT is then skipped")
    dataset_name: str | None = Field(None, description="demonstrations: a .jsonl, .json, .csv or .parquet file, or a Hub id")
    eval_dataset_name: str | None = Field(None, description="held-out demonstrations or prompts: they become the test split")
    prompt_dataset_name: str | None = Field(None, description="further prompts without answers, for the pools of the reward")
    preference_dataset_name: str | None = Field(None, description="chosen/rejected pairs, for reward.contrast=preference")
    world: DialogueWorld | None = Field(None, description="a seeded world with a known true reward; a model or dataset switches it off")
    output_dir: str = Field("runs/run", description="the run directory")
    seed: int = Field(0, ge=0, description="the one seed of the run")
    seeds: list[int] | None = Field(None, description="several runs, 0..4 or 0,3,5: OUT/seed-K and one table over them")
    report_to: str = Field("none", description="trackers for training: none, tensorboard, wandb, ...")
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings, description="how a world's pi_0 is made")
    data: DataSettings = Field(default_factory=DataSettings, description="reading, splitting and formatting the text")
    sft: SFTSettings = Field(default_factory=SFTSettings, description="supervised fine-tuning")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="drawing the pools")
    reward: RewardSettings = Field(default_factory=RewardSettings, description="the inverse-RL reward model")
    best_of_n: BestOfNSettings = Field(default_factory=BestOfNSettings, description="selection")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="evidence")

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return None if value is None else parse_seeds(value)

    @field_validator("world", mode="before")
    @classmethod
    def _world(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        name = value.get("name", "dialogue") if isinstance(value, Mapping) else "dialogue"
        if name not in WORLDS:
            raise ValueError(f"no world {name!r}; known: {', '.join(WORLDS)}")
        return value

    @model_validator(mode="after")
    def _model_or_world(self) -> "Recipe":
        if self.model_name_or_path or self.dataset_name:
            self.world = None
        if self.world is None and not (self.model_name_or_path and self.dataset_name):
            missing = "dataset_name" if self.model_name_or_path else "model_name_or_path"
            raise ValueError(f"{missing} is missing: give model_name_or_path and dataset_name, or world=dialogue for the embedded default")
        if self.reward.contrast == "preference" and not self.preference_dataset_name:
            raise ValueError("reward.contrast=preference needs preference_dataset_name, a file of chosen and rejected answers")
        if self.best_of_n.n is not None and self.best_of_n.n > self.sampling.num_generations:
            raise ValueError(f"best_of_n.n={self.best_of_n.n} is more than sampling.num_generations={self.sampling.num_generations}")
        return self


def init(recipe: Recipe, run: Run) -> None:
    """pi_0 in policies/init: pretrained on the world's corpus (stage `pretrain`), or the given checkpoint (stage `init`)."""
    if recipe.world is not None:
        from irlign.policy.pretrain import pretrain

        world = recipe.world
        run.do(
            "pretrain",
            lambda folder: pretrain(world, run.seed, folder / "policies/init", recipe.pretrain),
            settings={"world": world, "pretrain": recipe.pretrain},
            outputs=["policies/init"],
        )
    else:
        _publish_checkpoint(recipe, run, "init", str(recipe.model_name_or_path), "policies/init")


def _publish_checkpoint(recipe: Recipe, run: Run, stage: str, source: str, target: str) -> None:
    """A given checkpoint, checked and saved as the run's own, so that the run can be moved and stays what it was."""

    def build(folder: Path) -> dict[str, Any]:
        from irlign.data.chat import Format
        from irlign.policy.load import load_policy, save_policy

        policy = load_policy(source, stage)
        Format(policy.tokenizer, recipe.data.chat_template)
        save_policy(policy, folder / target)
        return {"source": source}

    run.do(stage, build, settings={"chat_template": recipe.data.chat_template}, inputs={"checkpoint": source}, outputs=[target])


def data(recipe: Recipe, run: Run) -> None:
    """Demonstrations split by prompt: train for SFT and reward, dev for every choice, test for evaluation only."""

    def build(folder: Path) -> dict[str, Any]:
        splits, notes = _load_splits(recipe, run.path("policies/init"), run.seed)
        for split in SPLITS:
            write_table(folder / f"data/{split}.parquet", [d.to_row() for d in splits[split]])
        counts = {split: len(splits[split]) for split in SPLITS}
        say("data: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + _dropped(notes))
        return {**notes, "prompts": {s: len({d.prompt.prompt_id for d in splits[s]}) for s in SPLITS}, "rows": counts}

    names = ("dataset_name", "eval_dataset_name", "prompt_dataset_name")
    run.do(
        "data",
        build,
        settings={"data": recipe.data, "world": recipe.world, "max_new_tokens": recipe.sampling.max_new_tokens},
        inputs={"policies/init": "policies/init", **{n: getattr(recipe, n) for n in names if getattr(recipe, n)}},
        outputs=[f"data/{split}.parquet" for split in SPLITS],
    )


def sft(recipe: Recipe, run: Run) -> None:
    """pi_SFT in policies/sft: forward KL on the train demonstrations, or the SFT model the user already has."""
    if recipe.sft_model_name_or_path:
        return _publish_checkpoint(recipe, run, "sft", recipe.sft_model_name_or_path, "policies/sft")

    def build(folder: Path) -> dict[str, Any]:
        from irlign.policy.sft import train_sft

        train, dev = (_demonstrations(run, split) for split in ("train", "dev"))
        return train_sft(
            run.path("policies/init"),
            train,
            dev,
            recipe.sft,
            chat_template=recipe.data.chat_template,
            folder=folder / "policies/sft",
            checkpoints=folder / "checkpoints",
            seed=run.seed,
            report_to=recipe.report_to,
        )

    run.do(
        "sft",
        build,
        settings={"sft": recipe.sft, "chat_template": recipe.data.chat_template},
        inputs=_inside("policies/init", "data/train.parquet", "data/dev.parquet"),
        outputs=["policies/sft"],
    )
    return None


def sample(recipe: Recipe, run: Run) -> None:
    """Pools of pi_0 and pi_SFT, by the same engine: train prompts for the reward, dev and test prompts for evaluation."""
    settings = recipe.sampling

    def build(folder: Path) -> dict[str, Any]:
        from irlign.sampling.pools import draw_pool, guard_finished

        statistics = {}
        for name, held_out in (("init", settings.initial_generations), ("sft", settings.num_generations)):
            wanted = [(p, settings.train_generations if p.split == "train" else held_out) for p in _prompts(run)]
            statistics[name] = draw_pool(
                run.path("policies", name),
                wanted,
                settings,
                chat_template=recipe.data.chat_template,
                folder=folder / f"pools/{name}.parquet",
                seed=run.seed,
                name=name,
            )
            finished = 1 - statistics[name]["completions/clipped_ratio"]
            say(f"sample {name}: {statistics[name]['samples']} samples, {finished:.0%} finished, "
                f"{statistics[name]['completions/mean_length']:.1f} tokens each")  # fmt: skip
        guard_finished(statistics["sft"], settings)
        return statistics

    run.do(
        "sample",
        build,
        settings={"sampling": settings, "chat_template": recipe.data.chat_template},
        inputs=_inside("policies/init", "policies/sft", *(f"data/{s}.parquet" for s in SPLITS)),
        outputs=["pools/init.parquet", "pools/sft.parquet"],
    )


def reward(recipe: Recipe, run: Run) -> None:
    """The inverse-RL reward model in rewards/CONTRAST (method.md section 3), and log-ratio, the baseline without training."""
    settings = recipe.reward
    backbone = settings.backbone if settings.backbone not in ("sft", "init") else f"policies/{settings.backbone}"
    inputs = {
        **_inside("pools/init.parquet", "pools/sft.parquet", "data/train.parquet", "data/dev.parquet", "policies/init", "policies/sft"),
        "backbone": backbone,
        **({"preference_dataset_name": recipe.preference_dataset_name} if recipe.preference_dataset_name else {}),
    }

    def build(folder: Path) -> dict[str, Any]:
        from irlign.reward.contrasts import guard_leak, leak_controls, raw_controls
        from irlign.reward.train import train_reward

        pools = {name: _pool(run, name, ("train", "dev")) for name in ("init", "sft")}
        pairs = {split: _contrasts(recipe, run, pools, split) for split in ("train", "dev")}
        controls = {
            **leak_controls(pairs["train"]),
            **raw_controls([s for s in pools["sft"] if s.prompt.split == "train"], [s for s in pools["init"] if s.prompt.split == "train"]),
        }
        say(f"reward: {len(pairs['train'])} pairs; alone, length tells {controls['length_accuracy']:.0%} apart "
            f"({controls['length_accuracy_raw']:.0%} before matching), finished {controls['finished_accuracy_raw']:.0%} before")  # fmt: skip
        guard_leak(controls, settings.max_leak_accuracy)
        target = folder / "rewards" / settings.contrast
        source = run.path(backbone) if backbone.startswith("policies/") else Path(backbone)
        log = train_reward(
            source,
            pairs["train"],
            pairs["dev"],
            settings,
            chat_template=recipe.data.chat_template,
            folder=target,
            checkpoints=folder / "checkpoints",
            seed=run.seed,
            report_to=recipe.report_to,
        )
        common = {"chat_template": recipe.data.chat_template, "seed": run.seed}
        hashes = run.input_hashes(inputs)
        write_json(
            target / "reward.json",
            {"kind": "classifier", "name": settings.contrast, "contrast": settings.contrast, "loss": settings.loss,
             "ending": settings.ending, "controls": controls, **common, **log, "inputs": hashes},
        )  # fmt: skip
        _card(target, recipe, log, controls)
        if settings.log_ratio:
            policies = {side: {"path": f"../../policies/{side}", "sha256": hashes[f"policies/{side}"]["sha256"]} for side in ("sft", "init")}
            (folder / "rewards/log-ratio").mkdir(parents=True, exist_ok=True)
            write_json(
                folder / "rewards/log-ratio/reward.json",
                {"kind": "log-ratio", "name": "log-ratio", "contrast": "init-sft", "loss": None, **common, "inputs": policies},
            )
        return {**controls, "pairs": log["pairs"], "dev": log["dev"]}

    names = [settings.contrast, *(["log-ratio"] if settings.log_ratio else [])]
    run.do(
        "reward",
        build,
        settings={"reward": settings, "chat_template": recipe.data.chat_template, "preferences": recipe.preference_dataset_name},
        inputs=inputs,
        outputs=[f"rewards/{name}" for name in names],
    )


def bon(recipe: Recipe, run: Run) -> None:
    """Best-of-N: every reward scores pi_SFT's pool on dev and test prompts; the trained reward selects."""
    names = [recipe.reward.contrast, *(["log-ratio"] if recipe.reward.log_ratio else [])]

    def build(folder: Path) -> dict[str, Any]:
        import numpy as np

        from irlign.optimise.best_of_n import candidate_rows, scored_text, select, write_selected
        from irlign.reward.load import load_reward

        pool = _pool(run, "sft", ("dev", "test"))
        prompts, texts = [s.prompt.content for s in pool], [scored_text(s) for s in pool]
        scores = {name: load_reward(run.path("rewards", name)).score(prompts, texts) for name in names}
        rows = candidate_rows(pool, {**scores, "length": np.array([len(t) for t in texts], dtype=float)})
        selected = select(rows, recipe.reward.contrast, recipe.best_of_n.n or recipe.sampling.num_generations)
        write_table(folder / "best_of_n/candidates.parquet", rows)
        write_selected(folder / "best_of_n/selected.jsonl", selected)
        return {"candidates": len(rows), "selected": len(selected)}

    run.do(
        "bon",
        build,
        settings={"best_of_n": recipe.best_of_n, "selects": recipe.reward.contrast},
        inputs=_inside("pools/sft.parquet", *(f"rewards/{name}" for name in names)),
        outputs=["best_of_n"],
    )


def evaluate(recipe: Recipe, run: Run) -> None:
    """Evidence on the test prompts: golden reward where there is one, held-out measures, intervals and tests."""
    raise NotImplementedError


def report(recipe: Recipe, run: Run) -> None:
    """report.html: the answer first, then what it rests on."""

    def build(folder: Path) -> None:
        from irlign.report import write_report

        write_report(run.root, folder / "report.html")

    run.do("report", build, inputs=_inside("evaluation", "best_of_n", "data/test.parquet"), outputs=["report.html"])


STAGES: dict[str, Callable[[Recipe, Run], None]] = {
    "init": init,
    "data": data,
    "sft": sft,
    "sample": sample,
    "reward": reward,
    "bon": bon,
    "eval": evaluate,
    "report": report,
}

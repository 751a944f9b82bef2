"""A recipe: the settings of every stage under one roof. Each section's model stands in the file that uses it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from irlign.config import Settings, load_recipe, parse_seeds
from irlign.data.demonstrations import DataSettings
from irlign.errors import RunError
from irlign.evaluate.metrics import EvaluationSettings
from irlign.launch import ProcessSettings
from irlign.optimise.best_of_n import BestOfNSettings
from irlign.optimise.settings import OptimiseSettings
from irlign.policy.pretrain import PretrainSettings
from irlign.policy.sft import SFTSettings
from irlign.reward.publish import LIKELIHOOD, LOG_RATIOS
from irlign.reward.train import RewardSettings
from irlign.runs import RECIPE
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.given import PoolSettings
from irlign.worlds.arithmetic import ArithmeticWorld
from irlign.worlds.dialogue import DialogueWorld
from irlign.worlds.errands import ErrandsWorld
from irlign.worlds.world import World

WORLDS: dict[str, type[World]] = {"dialogue": DialogueWorld, "arithmetic": ArithmeticWorld, "errands": ErrandsWorld}


class Recipe(Settings):
    """Everything that a run depends on. Give a model and a dataset, stored samples (pools), or a world that makes its own."""

    model_name_or_path: str | None = Field(None, description="pi_0: a folder or a Hub id of a causal language model")
    sft_model_name_or_path: str | None = Field(None, description="an SFT model you already have; SFT is then skipped")
    dataset_name: str | None = Field(None, description="demonstrations: a .jsonl, .json, .csv or .parquet file, or a Hub id")
    eval_dataset_name: str | None = Field(None, description="held-out demonstrations or prompts: they become the test split")
    prompt_dataset_name: str | None = Field(None, description="further prompts without answers, for the pools of the reward")
    preference_dataset_name: str | None = Field(None, description="chosen/rejected pairs, for reward.contrast=preference")
    world: DialogueWorld | ArithmeticWorld | ErrandsWorld | None = Field(
        None, discriminator="name", description="a seeded world with a known true reward; a model or dataset switches it off"
    )
    pools: PoolSettings | None = Field(None, description="stored samples in the place of policies: nothing then needs a policy's weights")
    output_dir: str = Field("runs/run", description="the run directory")
    seed: int = Field(0, ge=0, description="the one seed of the run")
    seeds: list[int] | None = Field(None, description="several runs, 0..4 or 0,3,5: OUT/seed-K and one table over them")
    report_to: str = Field("none", description="trackers for training: none, tensorboard, wandb, ...")
    processes: ProcessSettings = Field(default_factory=ProcessSettings, description="training in several processes, through accelerate")
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings, description="how a world's pi_0 is made")
    data: DataSettings = Field(default_factory=DataSettings, description="reading, splitting and formatting the text")
    sft: SFTSettings = Field(default_factory=SFTSettings, description="supervised fine-tuning")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="drawing the pools")
    reward: RewardSettings = Field(default_factory=RewardSettings, description="the inverse-RL reward model")
    best_of_n: BestOfNSettings = Field(default_factory=BestOfNSettings, description="selection")
    optimise: OptimiseSettings = Field(default_factory=OptimiseSettings, description="a policy that needs no reward at inference")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="evidence")

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return None if value is None else parse_seeds(value)

    @field_validator("world", mode="before")
    @classmethod
    def _world(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        value = {"name": "dialogue", **value} if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and value["name"] not in WORLDS:
            raise ValueError(f"no world {value['name']!r}; known: {', '.join(WORLDS)}")
        return value

    @model_validator(mode="after")
    def _model_or_world(self) -> "Recipe":
        if self.pools:
            return self._without_weights()
        if self.model_name_or_path or self.dataset_name:
            self.world = None
        if self.world is None and not (self.model_name_or_path and self.dataset_name):
            missing = "dataset_name" if self.model_name_or_path else "model_name_or_path"
            raise ValueError(f"{missing} is missing: give model_name_or_path and dataset_name, or world=dialogue for the embedded default")
        if "preference" in self.reward.weights and not self.preference_dataset_name:
            raise ValueError("reward.contrast=preference needs preference_dataset_name, a file of chosen and rejected answers")
        if self.sft.keep_checkpoints and self.sft_model_name_or_path:
            raise ValueError("sft.keep_checkpoints keeps what SFT passes through, and sft_model_name_or_path leaves SFT out")
        if self.best_of_n.n is not None and self.best_of_n.n > self.sampling.num_generations:
            raise ValueError(f"best_of_n.n={self.best_of_n.n} is more than sampling.num_generations={self.sampling.num_generations}")
        most, budget = self.best_of_n.n or self.sampling.num_generations, self.best_of_n.budget
        if budget is not None and budget > most:
            raise ValueError(f"best_of_n.budget={budget:g} is a mean number of answers, and a prompt has {most} at most")
        self._logit_for_objective()
        return self

    def _logit_for_objective(self) -> None:
        """gail and fairl are functions of a logit: of log P(better) - log P(worse) itself, and not of something else that ranks like it."""
        o, r = self.optimise, self.reward
        shaped = o.method in ("rloo", "grpo") and o.rewarded and o.on_policy.objective != "reverse-kl"
        if shaped and (self.best_of_n.likelihood or r.loss != "logistic" or r.ensemble):
            raise ValueError(
                f"optimise.on_policy.objective={o.on_policy.objective} is a function of the logit that better is told from worse by: give "
                "best_of_n.likelihood=0, reward.loss=logistic and no reward.ensemble, or objective=reverse-kl"
            )

    def _without_weights(self) -> "Recipe":
        """With `pools`: what needs a policy's weights is off by default, and an error where it was asked for."""
        self.world = None
        needless = ("model_name_or_path", "sft_model_name_or_path", "eval_dataset_name", "prompt_dataset_name")
        if given := [key for key in needless if getattr(self, key)]:
            raise ValueError(f"pools holds the samples of both policies and their prompts, so leave out {', '.join(given)}")
        off = (("reward", "log_ratio", False), ("best_of_n", "likelihood", 0.0), ("optimise", "method", "none"))
        for section, key, value in off:
            settings = getattr(self, section)
            if key in settings.model_fields_set and getattr(settings, key) != value:
                word = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
                raise ValueError(
                    f"{section}.{key} needs a policy's weights, and pools gives samples only: {section}.{key}={word}, or leave it out"
                )
            setattr(self, section, settings.model_copy(update={key: value}))
        if self.reward.backbone in ("sft", "init"):
            raise ValueError(
                "pools needs reward.backbone: words, or the folder or Hub id of an encoder (or any language model) that reads the answers"
            )
        if self.sft.keep_checkpoints:
            raise ValueError("sft.keep_checkpoints keeps what SFT passes through, and with pools there is no SFT")
        if not self.dataset_name and (shown := [c for c in self.reward.weights if c.endswith("-demo")]):
            raise ValueError(f"reward.contrast={shown[0]} needs dataset_name, demonstrations for prompts of the pools")
        if "preference" in self.reward.weights and not self.preference_dataset_name:
            raise ValueError("reward.contrast=preference needs preference_dataset_name, a file of chosen and rejected answers")
        return self

    @property
    def selectors(self) -> list[str]:
        """The rewards that may select, the judge decides: the learned one, held to what pi_SFT finds likely where `best_of_n.likelihood`
        asks for it, and then that likelihood alone too."""
        return [f"{self.reward.name}+likelihood", LIKELIHOOD] if self.best_of_n.likelihood else [self.reward.name]

    @property
    def rewards(self) -> list[str]:
        """The rewards that the run makes: the learned one, then those without training."""
        without = [] if self.pools else [*LOG_RATIOS] if self.reward.log_ratio else [LIKELIHOOD]
        return [self.reward.name, *without]


def as_recipe(config: str | Path | Mapping[str, Any] | Recipe | None, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe from a file, a mapping or a recipe, with overrides applied. Raises ConfigError."""
    if isinstance(config, Recipe) and not overrides:
        return config
    values = config.model_dump(mode="json") if isinstance(config, Recipe) else config
    return load_recipe(Recipe, values, overrides)


def stored_recipe(overrides: Sequence[str]) -> Path | None:
    """recipe.yaml of the run directory that the overrides name, where it has one. Raises RunError where there is none and nothing
    else says what to run."""
    given = {key.lstrip("-").replace("-", "_"): value for key, _, value in (text.partition("=") for text in overrides)}
    folder = Path(given.get("output_dir", "")).expanduser()
    if "output_dir" not in given:
        return None
    if (folder / RECIPE).is_file():
        return folder / RECIPE
    if not any(key.split(".")[0] in ("model_name_or_path", "dataset_name", "world", "pools") for key in given):
        do = "give the output_dir of a run, or say what to run: --config RECIPE, or model_name_or_path and dataset_name"
        raise RunError(
            f"this is no run directory: it has no {RECIPE}" if folder.exists() else "no run directory is there", where=folder, do=do
        )
    return None

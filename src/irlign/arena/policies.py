"""Policies in the arena: what `irlign optimise METHOD` publishes in a cell, its safety net included, measured at one answer a prompt.

The stages are the pipeline's own, so a row is what `irlign run` ends with. The reward, and the judge's choice of what selects, are those
of the row `irlign run`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign import pipeline
from irlign.arena.cell import BOTH, Cell
from irlign.arena.methods import LIKELIHOODS, Method, Pick
from irlign.files import read_json
from irlign.optimise.settings import OptimiseSettings
from irlign.optimise.work import stage_of
from irlign.recipe import Recipe
from irlign.reward.publish import LIKELIHOOD, publish_log_ratios

OF = "policy: "  # begins a row's name
ALIGNED = "aligned"  # what a row of policies is
ON_POLICY = {"learning_rate": 3e-4, "num_train_epochs": 2, "per_device_train_batch_size": 64}
DISCRIMINATOR = {"learning_rate": 5e-4, "num_train_epochs": 2}
ONCE = {"rounds": 1, "refresh": "none"}
REFRESHED = {"rounds": 2, "refresh": "current-demo"}
# Over the defaults of `optimise`. distill's winners and passes were looked at on development seeds of two worlds, of the others the learning rate
# on one seed of one world (docs/optimise/side_by_side.md), and they draw and train unlike numbers of tokens. A row that names its `method` has the
# settings of that method's row, and these over them; distill-fewer learns from the answers that are stored.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "distill": {"answers": 32, "learning_rate": 1e-3, "num_train_epochs": 8},
    "weighted-sft": {"learning_rate": 3e-4, "num_train_epochs": 4},
    "dpo": {"answers": 32, "learning_rate": 1e-4, "num_train_epochs": 4},
    "spin": {"rounds": 2, "learning_rate": 1e-4, "num_train_epochs": 1},
    "ditto": {"rounds": 2, "learning_rate": 1e-4, "num_train_epochs": 1},
    "kto": {"learning_rate": 3e-5, "num_train_epochs": 3},
    "gsil": {"rounds": 2, "learning_rate": 3e-5, "num_train_epochs": 2},
    "rloo": {**ON_POLICY, "learning_rate": 1e-3},
    "grpo": ON_POLICY,
    "grpo-log-ratio": {"method": "grpo", **ONCE, "on_policy": {"dense": "log-ratio"}},
    "grpo-tokens": {"method": "grpo", **ONCE, "on_policy": {"dense": "discriminator"}, "discriminator": DISCRIMINATOR},
    "rlsr": ON_POLICY,
    "gad": {**ON_POLICY, "discriminator": DISCRIMINATOR},
    "distill-fewer": {"method": "distill", "answers": None, "num_train_epochs": 2},
    "distill-rounds": {"method": "distill", **REFRESHED},
    "rloo-rounds": {"method": "rloo", **REFRESHED},
}
# of the model and of how candidates are weighed, whatever the method
SHARED = {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "trainer", "generations"}


def with_method(recipe: Recipe, row: str) -> Recipe:
    """The recipe of a cell with the policy method of this row, and of the log-ratios only the one that may select. What the recipe itself sets in
    `optimise` holds for the method that it names; for others only what is SHARED: a learning rate is one method's own."""
    changes: Mapping[str, Any] = SETTINGS[row] if "method" in SETTINGS[row] else {"method": row}
    named = changes["method"] == recipe.optimise.method
    own = recipe.optimise.model_dump(exclude_unset=True, include=None if named else SHARED)
    layers = SETTINGS[changes["method"]], own, changes
    nested = {key: {k: v for layer in layers for k, v in layer.get(key, {}).items()} for key in ("on_policy", "discriminator")}
    settings = OptimiseSettings.model_validate({k: v for layer in (*layers, nested) for k, v in layer.items()})
    return recipe.model_copy(update={"optimise": settings, "reward": recipe.reward.model_copy(update={"log_ratio": False})})


def aligned(method: str) -> Method:
    """The policy that this method publishes, pi_SFT itself where the safety net keeps it."""

    def published(cell: Cell) -> Pick:
        recipe = with_method(cell.recipe, method)
        reward = recipe.reward.name
        cell.learned(reward, {})
        _publish_likelihood(cell)
        pipeline.bon(recipe, cell.run)
        pipeline.optimise(recipe, cell.run, method)
        choice = read_json(cell.run.path(stage_of(method), "choice.json"))
        rounds = [of for name, of in choice["candidates"].items() if name != "sft"]
        before = cell.trained(("sft", f"reward-{reward}") if choice["reward"] else ("sft",))
        return Pick(
            method,
            ALIGNED,
            stages=("sft", "sample", f"reward-{reward}", "bon", stage_of(method)),
            read=read_for(recipe.optimise),
            drawn=sum(of["drawn"] for of in rounds),
            learned=None if before is None else before + sum(of["training"]["tokens"] for of in rounds if of["training"]),
            kept=choice["published"] == "sft",
        )

    return published


def read_for(settings: OptimiseSettings) -> Sequence[str]:
    """The policies whose stored answers to the train prompts have a part in it: both where a reward or a discriminator of tokens learned from
    them, and pi_SFT's in all that learns from own answers or starts from them."""
    if settings.rewarded or settings.on_policy.dense == "discriminator":
        return BOTH
    return () if settings.method == "weighted-sft" else ("sft",)


def _publish_likelihood(cell: Cell) -> None:
    """rewards/likelihood, which the pipeline publishes with the learned reward, and the cell has as numbers only."""
    policies = {f"policies/{name}": f"policies/{name}" for name in ("sft", "init")}
    template = cell.recipe.data.chat_template

    def build(folder: Path) -> None:
        hashes = cell.run.input_hashes(policies)
        publish_log_ratios(folder / "rewards", [LIKELIHOOD], hashes, chat_template=template, seed=cell.run.seed)

    cell.run.do(LIKELIHOODS[:-1], build, settings={"chat_template": template}, inputs=policies, outputs=[f"rewards/{LIKELIHOOD}"])


POLICIES: Mapping[str, Method] = {f"{OF}{method}": aligned(method) for method in SETTINGS}

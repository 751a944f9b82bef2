"""Bad settings are found before any compute: what a recipe names is there, and everything that is passed on is accepted."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from irlign.endpoint import check_client
from irlign.errors import ConfigError
from irlign.evaluate.golden import is_function, load_golden
from irlign.evaluate.judge import SECTION
from irlign.evaluate.lm_eval import lm_eval_python
from irlign.evaluate.reward_bench import read_bench
from irlign.optimise.heldout import prompts_shown
from irlign.optimise.label_free import without_judge
from irlign.optimise.methods import own_config
from irlign.optimise.settings import ON_POLICY, OptimiseSettings
from irlign.policy.load import check_causal, has_token_head, load_config
from irlign.recipe import Recipe
from irlign.records import Demonstration
from irlign.sampling.engine import check_engine
from irlign.training import Config, TrainerSettings, training_arguments


def preflight(recipe: Recipe) -> None:
    """Raises ConfigError for an unknown engine, a Python without vLLM or an endpoint without a model for a policy, a judge without an
    address, a golden reward that cannot be imported, a Python without lm-evaluation-harness, a policy method whose library is missing, and a field or tracker that its training
    arguments refuse; DataError for a preference file that cannot be read; ModelError for a checkpoint that is no causal language model, one without past_key_values, or not there. Reads configurations, never weights.
    """
    if recipe.pools is None:
        check_engine(recipe.sampling, ["init", "sft", *recipe.sft.kept])
    for checkpoint in filter(None, (recipe.model_name_or_path if recipe.world is None else None, recipe.sft_model_name_or_path)):
        check_causal(checkpoint)
    if recipe.reward.backbone not in ("sft", "init", "words"):
        load_config(recipe.reward.backbone)
    if judge := recipe.evaluation.judge:
        check_client()
        judge.address(section=SECTION)
    for spec in filter(None, (recipe.evaluation.golden_reward, *recipe.evaluation.other_golden_rewards)):
        _golden(spec)
    _together(recipe)
    for file in recipe.evaluation.reward_bench:
        read_bench(file)
    if recipe.evaluation.other_golden_rewards and not (recipe.evaluation.golden_reward or recipe.world):
        what = "further golden rewards stand beside a first one, and there is none"
        raise ConfigError(what, where="evaluation.other_golden_rewards", do="give the first as evaluation.golden_reward")
    if asked := recipe.evaluation.lm_eval:
        if recipe.pools:
            what = "stored samples have no policies that lm-evaluation-harness could ask"
            raise ConfigError(what, where="evaluation.lm_eval", do="leave it out")
        lm_eval_python(asked)
    for section, settings in _trained(recipe).items():
        _accepted(recipe, section, settings)
    check_method(recipe)


def judge_note(recipe: Recipe, splits: Mapping[str, Sequence[Demonstration]]) -> list[str]:
    """That the dev demonstrations of one's own file are too few for a judge, where they are."""
    if recipe.world is not None or recipe.pools:
        return []
    line = without_judge(prompts_shown([d for d in splits["dev"] if d.completion]))
    return [line] if line else []


def check_stage(name: str, recipe: Recipe) -> None:
    """Raises ConfigError where a stage cannot run by itself: in several run directories, SFT without a policy, and a policy method as
    `check_method` says."""
    if recipe.seeds is not None:
        raise ConfigError("a single stage runs in one run directory", where="seeds", do="give output_dir=OUT/seed-K and no seeds")
    if recipe.pools and name == "sft":
        what = "pools gives samples only, so there is no policy to fine-tune"
        raise ConfigError(what, where="irlign sft", do="`irlign reward` learns from them")
    if name == "optimise":
        check_method(recipe)


def check_method(recipe: Recipe) -> None:
    """Raises ConfigError where the library of the policy method is missing or its training arguments refuse a field, its discriminator's too."""
    o = recipe.optimise
    if o.method != "none":
        if o.method in ON_POLICY:
            _whole_groups(o, recipe.processes.count)
            # TRL asks whether prompts fill a step of all processes, and sees one here
            rows = o.trainer.get("per_device_train_batch_size", o.per_device_train_batch_size)
            o = o.model_copy(update={"trainer": {**o.trainer, "per_device_train_batch_size": rows * recipe.processes.count}})
        _accepted(recipe, "optimise", o, own_config(o, recipe.sampling))
        if o.method == "dpo" and (o.answers or recipe.sampling.train_generations) < 2:
            what = "dpo learns from the best and the worst of a prompt's answers, and there is one"
            raise ConfigError(what, where="optimise.answers", do="give 2 or more; null takes sampling.train_generations")
    tokens, model = o.method == "grpo" and o.on_policy.dense == "discriminator", recipe.sft_model_name_or_path or recipe.model_name_or_path
    if o.method == "gad" or tokens:
        _accepted(recipe, "optimise.discriminator", o.discriminator)
    if tokens and model and not has_token_head(model):
        what = "transformers has no token classifier for models of this type, so none of its tokens can be told apart"
        raise ConfigError(what, where=f"optimise.on_policy.dense, {model}", do="use dense=log-ratio, or none")
    if o.method == "rlsr" and o.on_policy.encoder != "words":
        load_config(o.on_policy.encoder)


def _whole_groups(o: OptimiseSettings, processes: int) -> None:
    """Raises ConfigError where the answers that are drawn at once make no whole number of groups. What `trainer` says wins, as everywhere."""
    says = {**o.model_dump(), "num_generations": o.on_policy.num_generations, **o.trainer}
    drawn, group = says["per_device_train_batch_size"] * says["gradient_accumulation_steps"] * processes, says["num_generations"]
    if drawn % group and not {"generation_batch_size", "steps_per_generation"} & o.trainer.keys():
        what = f"a step of {drawn} answers is no whole number of groups of {group} answers to one prompt"
        do = "make optimise.per_device_train_batch_size (times gradient_accumulation_steps and processes) a multiple of it"
        raise ConfigError(what, where="optimise.on_policy.num_generations", do=do)


def _accepted(recipe: Recipe, section: str, settings: TrainerSettings, config: Config | None = None) -> None:
    if config or settings.trainer or recipe.report_to != "none" or settings.lr_scheduler_type != type(settings)().lr_scheduler_type:
        training_arguments(
            settings, Path(recipe.output_dir), seed=recipe.seed, bf16=False, report_to=recipe.report_to, config=config, section=section
        )


def _together(recipe: Recipe) -> None:
    """Several processes: their configuration, and what needs the whole model while it is trained."""
    recipe.processes.check()
    if not recipe.processes.sharded:
        return
    for name, settings in (("sft", recipe.sft), ("reward", recipe.reward), ("optimise", recipe.optimise)):
        if settings.use_peft:
            what = "an adapter is not merged into a model that is split over processes"
            raise ConfigError(what, where=f"{name}.use_peft", do="leave out processes.accelerate_config, or use_peft")
    for name, shares in (("sft", recipe.sft.keep_checkpoints), ("optimise", recipe.optimise.keep_checkpoints)):
        if shares:
            what = "earlier checkpoints are not kept of a model that is split over processes"
            raise ConfigError(what, where=f"{name}.keep_checkpoints", do="leave out processes.accelerate_config, or this")


def _golden(spec: str) -> None:
    if is_function(spec):
        load_golden(spec)
    elif not (Path(spec).expanduser() / "reward.json").is_file():
        load_config(os.path.expanduser(spec))


def _trained(recipe: Recipe) -> dict[str, TrainerSettings]:
    """The settings of every stage before the policy method that trains through transformers' Trainer, by their section."""
    found: dict[str, TrainerSettings] = {"pretrain": recipe.pretrain} if recipe.world is not None else {}
    found |= {} if recipe.sft_model_name_or_path or recipe.pools else {"sft": recipe.sft}
    return found if recipe.reward.kind == "features" else {**found, "reward": recipe.reward}

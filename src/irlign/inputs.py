"""What goes into a run: the demonstrations that a recipe names, split, under the format of its model, and what `irlign validate` says of them;
a given checkpoint; both sides of the contrasts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.black_box import validate_pools
from irlign.data.splits import stored_demonstrations, stored_prompts
from irlign.errors import DataError, OverlongError
from irlign.preflight import judge_note, preflight
from irlign.recipe import Recipe, as_recipe
from irlign.records import SPLITS, Demonstration
from irlign.reward.contrasts import Answer, answers_of
from irlign.runs import Run
from irlign.sampling.given import given_splits
from irlign.sampling.pools import stored_samples
from irlign.summary import stand_ins


def read_splits(recipe: Recipe, model: str) -> tuple[dict[str, list[Demonstration]], dict[str, Any]]:
    """The splits of the recipe's world or files under the tokenizer of `model`, and what each file lost."""
    if recipe.pools:
        return given_splits(recipe.pools, recipe.data, recipe.seed, recipe.dataset_name)
    if recipe.world is not None:
        return recipe.world.splits(recipe.seed), {f"world {recipe.world.name}": {"rows": recipe.world.demonstrations}}
    from irlign.data.splits import load_splits

    form, context = format_of(recipe, model)
    return load_splits(
        str(recipe.dataset_name),
        recipe.data,
        form,
        context=context,
        room=recipe.sampling.max_new_tokens,
        seed=recipe.seed,
        eval_dataset=recipe.eval_dataset_name,
        prompt_dataset=recipe.prompt_dataset_name,
    )


def format_of(recipe: Recipe, model: str | None) -> tuple[Any, int]:
    """The one format and the context in tokens, of a model or (None) of the world's model before it exists."""
    from irlign.data.chat import Format, context_length
    from irlign.policy.load import load_config, load_tokenizer
    from irlign.policy.pretrain import word_tokenizer

    if model is None and recipe.world is not None:
        context = recipe.pretrain.max_position_embeddings
        template = recipe.world.chat_template if recipe.data.chat_template == "auto" else recipe.data.chat_template
        return Format(word_tokenizer(recipe.world.vocabulary(), context), template), context
    tokenizer = load_tokenizer(str(model))
    tokenizer.name_or_path = recipe.model_name_or_path or str(model)  # errors name the model that was given, not the run's copy of it
    return Format(tokenizer, recipe.data.chat_template), context_length(load_config(str(model)))


def validate(config: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Sequence[str] = ()) -> tuple[str, DataError | None]:
    """What the data is, before any compute: rows, lengths, cuts, EOS, unknown tokens, overlap, a decoded row. Writes nothing.

    Returns the text, and the error that `data.on_overlong=error` would stop a run with: the text then shows the rest.
    """
    from irlign.data.checks import describe, masked_example, render

    recipe = as_recipe(config, overrides)
    preflight(recipe)
    if recipe.pools:
        return validate_pools(recipe, *read_splits(recipe, "")), None
    form, context = format_of(recipe, str(recipe.model_name_or_path) if recipe.world is None else None)
    problem = None
    try:
        splits, notes = read_splits(recipe, str(recipe.model_name_or_path))
    except OverlongError as error:
        problem = error
        dropping = recipe.data.model_copy(update={"on_overlong": "drop"})
        splits, notes = read_splits(recipe.model_copy(update={"data": dropping}), str(recipe.model_name_or_path))
    found = describe(splits, form, max_length=min(recipe.data.max_length or context, context))
    example = next(d for d in splits["train"] if d.completion)
    return "\n".join([*stand_ins(notes), *judge_note(recipe, splits), render(found, notes, masked_example(form, example))]), problem


def take_checkpoint(recipe: Recipe, run: Run, stage: str, source: str) -> None:
    """A given checkpoint, checked and saved as the run's own, so that the run can be moved and stays what it was."""

    def build(folder: Path) -> dict[str, Any]:
        from irlign.data.chat import Format
        from irlign.policy.load import load_policy, save_policy

        policy = load_policy(source, stage)
        Format(policy.tokenizer, recipe.data.chat_template)
        save_policy(policy, folder / "policies" / stage)
        return {"source": source}

    settings, inputs = {"chat_template": recipe.data.chat_template}, {"checkpoint": source}
    run.do(stage, build, settings=settings, inputs=inputs, outputs=[f"policies/{stage}"])


def contrast_answers(recipe: Recipe, run: Run, split: str) -> dict[str, tuple[list[Answer], list[Answer]]]:
    """Both sides of every contrast of the recipe on one split. Preferences are split by prompt like everything else."""
    from irlign.data.demonstrations import load_preferences, preferences_of

    preferences: list[Any] = []
    if recipe.preference_dataset_name and "preference" in recipe.reward.weights:
        held = {s: {p.prompt_id for p in stored_prompts(run) if p.split == s} for s in SPLITS}
        preferences = preferences_of(load_preferences(recipe.preference_dataset_name, recipe.data)[0], split, held, recipe.seed)
    sft, *worse = (stored_samples(run, name, split) for name in ("sft", "init", *recipe.sft.kept))
    init = [sample for pool in worse for sample in pool]
    demonstrations = stored_demonstrations(run, split)
    return {c: answers_of(c, sft=sft, init=init, demonstrations=demonstrations, preferences=preferences) for c in recipe.reward.weights}

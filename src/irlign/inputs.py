"""What goes into a run: the demonstrations that a recipe names, split, under the format of its model, and what `irlign validate` says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.black_box import validate_pools
from irlign.errors import DataError, OverlongError
from irlign.preflight import preflight
from irlign.recipe import Recipe, as_recipe
from irlign.records import Demonstration
from irlign.sampling.given import given_splits


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


def stand_ins(files: Mapping[str, Any]) -> list[str]:
    """What the reader of any result must know about where the answers came from."""
    words = "the `chosen` answers of a preference file stand in for expert demonstrations"
    return [f"{name}: {words}" for name, counts in files.items() if counts.get("answers", {}).get("chosen")]


def sources(recipe: Recipe) -> tuple[str, str]:
    """What pi_0 and the demonstrations are, for a card: a file or folder by its own name, not by where it lay."""
    if recipe.world:
        return f"a policy pretrained on the corpus of the {recipe.world.name} world", f"the {recipe.world.name} world"
    model, data = (str(name) for name in (recipe.model_name_or_path, recipe.dataset_name))
    return f"`{Path(model).name if Path(model).exists() else model}`", f"`{Path(data).name if Path(data).exists() else data}`"


def format_of(recipe: Recipe, model: str | None) -> tuple[Any, int]:
    """The one format and the context in tokens, of a model or (None) of the world's model before it exists."""
    from irlign.data.chat import Format, context_length
    from irlign.policy.load import load_config, load_tokenizer
    from irlign.policy.pretrain import word_tokenizer

    if model is None and recipe.world is not None:
        context = recipe.pretrain.max_position_embeddings
        template = recipe.world.chat_template if recipe.data.chat_template == "auto" else recipe.data.chat_template
        return Format(word_tokenizer(recipe.world.vocabulary(), context), template), context
    return Format(load_tokenizer(str(model)), recipe.data.chat_template), context_length(load_config(str(model)))


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
    return "\n".join([*stand_ins(notes), render(found, notes, masked_example(form, example))]), problem

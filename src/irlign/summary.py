"""What was run, in the words of cards and reports: names, sizes, counts, times."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irlign.black_box import black_box_notes, stand_for
from irlign.files import read_json
from irlign.recipe import Recipe
from irlign.runs import Run


def summary(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What was run, for the report: names, sizes, counts and the times of the stages so far."""
    notes = {stage: run.stages.get(stage, {}).get("notes", {}) for stage in ("data", "sample")}
    return {
        "output_dir": run.root.name,
        "seed": run.seed,
        "model": recipe.model_name_or_path or f"pretrained on the corpus of the {recipe.world.name if recipe.world else ''} world",
        "sft_model": recipe.sft_model_name_or_path,
        "dataset": recipe.dataset_name,
        "world": recipe.world.name if recipe.world else None,
        "contrast": recipe.reward.name,
        "selector": read_json(run.path("best_of_n/choice.json"))["reward"],
        "reward": f"{recipe.reward.about_contrast}; {recipe.reward.kind}",
        "loss": recipe.reward.loss,
        "num_generations": recipe.sampling.num_generations,
        **{key: notes["data"].get(key) for key in ("prompts", "rows", "files")},
        "notes": [*black_box_notes(recipe), *stand_ins(notes["data"].get("files", {}))],
        "pools": notes["sample"],
        "seconds": {name: e["seconds"] for name, e in run.stages.items() if e["status"] == "complete" and name not in ("eval", "report")},
        **stand_for(recipe),
    }


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

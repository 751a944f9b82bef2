"""The smallest recipe that goes through every stage: the dialogue world with a model of a few thousand parameters."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def small_recipe(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe as a mapping; guards that a model this small cannot pass are off."""
    recipe: dict[str, Any] = {
        "world": {"corpus_lines": 200, "demonstrations": 24, "dev_prompts": 20, "test_prompts": 8},
        "output_dir": str(output_dir),
        "pretrain": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_train_epochs": 1},
        "sft": {"learning_rate": 1e-3, "num_train_epochs": 1},
        "sampling": {
            "num_generations": 4,
            "train_generations": 2,
            "initial_generations": 2,
            "max_new_tokens": 24,
            "max_cut_share": 1.0,
            "part_prompts": 10,
        },
        "reward": {"learning_rate": 1e-3, "num_train_epochs": 1, "max_leak_accuracy": 1.0},
        "optimise": {"learning_rate": 1e-3, "num_train_epochs": 3, "generations": 2},
        "evaluation": {"resamples": 200},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and isinstance(recipe.get(key), dict) else value
    return recipe


def witnesses(patch: Any, logits: Iterable[float], reward: float = 99.0) -> None:
    """Stand-ins for what weighs candidates: one after the other they get these logits of the judge, and all the same reward."""
    import numpy as np

    from irlign.optimise import align

    coming = iter(logits)
    patch.setattr(align, "judge_pool", lambda policy, pool, *_, **__: (np.full(len(pool), next(coming)), None, 0.9))
    patch.setattr(align, "scores_of", lambda folders, prompts, *_: {name: np.full(len(prompts), reward) for name in folders})

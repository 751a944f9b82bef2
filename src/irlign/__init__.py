"""irlign: alignment of language models from demonstrations, through inverse reinforcement learning.

import irlign
results = irlign.run({"model_name_or_path": "my-model", "dataset_name": "demonstrations.jsonl", "output_dir": "runs/mine"})
reward = irlign.load_reward("runs/mine/rewards/init-sft")
reward.score(["How do I fix my bike?"], ["First, check the brakes."])
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_reward", "run"]

if TYPE_CHECKING:
    from irlign.pipeline import run
    from irlign.reward.load import load_reward


def __getattr__(name: str) -> Any:
    """`run` and `load_reward`, imported when they are first asked for, so that `import irlign` stays quick."""
    if name in ("run", "load_reward"):
        from irlign.progress import hush

        hush()
    if name == "run":
        from irlign.pipeline import run

        return run
    if name == "load_reward":
        from irlign.reward.load import load_reward

        return load_reward
    raise AttributeError(f"module 'irlign' has no attribute {name!r}")

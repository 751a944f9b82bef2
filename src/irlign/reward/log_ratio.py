"""The reward that needs no training: log pi_SFT(y|x) - log pi_0(y|x), the optimum that init-sft approximates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.chat import Format
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.progress import Progress
from irlign.records import PromptContent


class LogRatio:
    """`RewardModel` over two policies, one in memory at a time; in nats, EOS included (method.md section 3)."""

    def __init__(self, sft: Path, init: Path, chat_template: str, name: str = "log-ratio"):
        self.policies, self.chat_template, self.name = {"sft": sft, "init": init}, chat_template, name

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any]) -> "LogRatio":
        inputs = reward["inputs"]
        return cls(folder / inputs["sft"]["path"], folder / inputs["init"]["path"], reward["chat_template"], reward["name"])

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Shape [len(prompts)]."""
        total = {}
        with Progress(f"score {self.name}", 2 * len(prompts), "answers") as bar:
            for side, folder in self.policies.items():
                policy = load_policy(str(folder), side)
                rows = Format(policy.tokenizer, self.chat_template).encode(prompts, completions)
                total[side] = sequence_log_probs(policy, rows, bar)
                del policy  # before the other is loaded
        return total["sft"] - total["init"]

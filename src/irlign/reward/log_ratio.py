"""Rewards that need no training: log pi_SFT(y|x) - log pi_0(y|x), the optimum that init-sft approximates, whole or a token; and
log pi_SFT(y|x) a token alone, how likely pi_SFT itself finds an answer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.batches import blocks
from irlign.data.chat import Format
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import Policy, load_policy
from irlign.progress import Progress
from irlign.records import PromptContent


class LogRatio:
    """`RewardModel` over two policies, one in memory at a time; in nats, EOS included (method.md section 3).

    `per_token` divides each policy's log-probability by the answer's tokens as that policy reads it, EOS included: nats a token.
    `alone` leaves pi_0 out.
    """

    def __init__(self, sft: Path, init: Path, chat_template: str, name: str = "log-ratio", *, per_token: bool = False, alone: bool = False):
        self.policies, self.chat_template, self.name = {"sft": sft, "init": init}, chat_template, name
        self.per_token, self.alone = per_token, alone
        self.loader: Callable[[str, str], Policy] = load_policy

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any]) -> "LogRatio":
        sft, init = (folder / reward["inputs"][side]["path"] for side in ("sft", "init"))
        form = {"per_token": bool(reward.get("normalise")), "alone": bool(reward.get("alone"))}
        return cls(sft, init, reward["chat_template"], reward["name"], **form)

    @property
    def source(self) -> tuple[str, ...]:
        """What the likelihoods depend on: rewards of one source can share one pass."""
        return (*(str(folder.resolve()) for folder in self.policies.values()), self.chat_template)

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Shape [len(prompts)]."""
        return self.from_likelihoods(*self.likelihoods(prompts, completions))

    def from_likelihoods(self, nats_2_B: np.ndarray, tokens_2_B: np.ndarray) -> np.ndarray:
        """The reward from what `likelihoods` gives. Shape [B]."""
        values_2_B = nats_2_B / tokens_2_B if self.per_token else nats_2_B
        return values_2_B[0] if self.alone else values_2_B[0] - values_2_B[1]

    def likelihoods(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """log pi(y|x) in nats and the answer's tokens, under pi_SFT and pi_0. Both of shape [2, len(prompts)], or [1, ...] `alone`."""
        nats, tokens = [], []
        policies = {"sft": self.policies["sft"]} if self.alone else self.policies
        with Progress(f"score {self.name}", len(policies) * len(prompts), "answers") as bar:
            for side, folder in policies.items():
                policy = self.loader(str(folder), side)
                form = Format(policy.tokenizer, self.chat_template)
                nats.append(np.zeros(len(prompts)))
                tokens.append(np.zeros(len(prompts), dtype=int))
                for of in blocks(len(prompts)):
                    rows = form.encode(prompts[of], completions[of])
                    nats[-1][of] = sequence_log_probs(policy, rows, bar)
                    tokens[-1][of] = [len(row.within(policy.max_length).completion_ids) for row in rows]
                del policy  # before the other is loaded
        return np.array(nats), np.array(tokens)

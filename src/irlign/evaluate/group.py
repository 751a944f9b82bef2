"""The stored answers of one source with their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """The answers of one source for the test prompts, row for row with their scores; `golden` may be missing.

    `likelihood` is the log-probability a token under the policy that drew them, where one did.
    """

    prompt_ids: Sequence[str]
    texts: Sequence[str]
    finished: np.ndarray
    rewards: Mapping[str, np.ndarray]
    golden: np.ndarray | None = None
    likelihood: np.ndarray | None = None

    def by_prompt(self, values: Sequence[float] | np.ndarray) -> dict[str, np.ndarray]:
        """The values of each prompt's answers, prompts in the order of first appearance."""
        found: dict[str, list[float]] = {}
        for prompt_id, value in zip(self.prompt_ids, values, strict=True):
            found.setdefault(prompt_id, []).append(float(value))
        return {prompt_id: np.array(of) for prompt_id, of in found.items()}

    def first(self) -> dict[str, int]:
        """The row of each prompt's first answer."""
        return {p: i for i, p in reversed(list(enumerate(self.prompt_ids)))}

    def means(self, values: Sequence[float] | np.ndarray) -> dict[str, float]:
        """The mean of the values over each prompt's answers."""
        return {prompt_id: float(of.mean()) for prompt_id, of in self.by_prompt(values).items()}

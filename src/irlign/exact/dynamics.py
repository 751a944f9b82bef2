"""A two-party MDP with stochastic transitions: after each token of the policy a user or tool speaks.

Forward KL needs no roll-outs and its transition terms cancel, so SFT on the policy's own tokens stays exact. Reverse KL and
Jensen-Shannon need roll-outs: a wrong model of the environment changes what they ask for (the paper's break condition).
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TurnMDP:
    """`turns` times: the policy says one of `tokens` tokens, then the environment one of `replies`.

    A history is the alternating sequence so far. The policy's table has a row for each history before its turn, the
    environment's for each history after the policy spoke.
    """

    tokens: int
    replies: int
    turns: int

    def histories(self, *, environment: bool) -> list[tuple[int, ...]]:
        """The histories at which the policy (or the environment) speaks, in the order of the table's rows."""
        found = []
        for turn in range(self.turns):
            sizes = [self.tokens, self.replies] * turn + [self.tokens] * environment
            found += list(itertools.product(*map(range, sizes)))
        return found

    def trajectories(self) -> list[tuple[int, ...]]:
        """Every whole dialogue, policy and environment in turn."""
        return list(itertools.product(*map(range, [self.tokens, self.replies] * self.turns)))

    def log_probs(self, logits_H_A: "torch.Tensor", *, environment: bool) -> "torch.Tensor":
        """The log-probability of each token of the policy (or of the environment) in each dialogue. Shape [Y, turns]."""
        import torch

        rows = {history: row for row, history in enumerate(self.histories(environment=environment))}
        first = 1 if environment else 0
        places = [[(rows[y[:i]], y[i]) for i in range(first, 2 * self.turns, 2)] for y in self.trajectories()]
        states_Y_T, tokens_Y_T = torch.tensor(places).unbind(-1)
        return logits_H_A.log_softmax(-1)[states_Y_T, tokens_Y_T]

    def log_law(self, policy_H_A: "torch.Tensor", environment_H_A: "torch.Tensor") -> "torch.Tensor":
        """The log-probability of each dialogue. Shape [Y]; its exp sums to 1."""
        own, theirs = self.log_probs(policy_H_A, environment=False), self.log_probs(environment_H_A, environment=True)
        return own.sum(-1) + theirs.sum(-1)

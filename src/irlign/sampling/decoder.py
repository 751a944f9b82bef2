"""The decode loop: one batch across prompts, finished rows leave it, waiting rows take their places.

Answers of one prompt that start at different times have it computed again: only those that start together share it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from irlign.sampling.attention import attention
from irlign.sampling.draw import draw_tokens
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import State

LOOK_EVERY = 8  # steps between looks for finished rows: each costs a copy of the rows that stay
JOIN_SHARE = 0.25  # of the running rows must be able to join at once: each group of joiners is attended to by itself


@dataclass(frozen=True)
class Row:
    """One answer to draw: its prompt's tokens, its seed, the most tokens it may have; `watch` hears its text while it is drawn."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    watch: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Room:
    """What fits at once: `rows`, and `tokens` kept over all of them and their prompts; a row's logits count `row_tokens`."""

    rows: int
    tokens: int
    row_tokens: int = 0


class Decoder:
    """Draws rows to their ends. `stopped(rows, drawn ids)` says which of them are over for another reason than EOS; it is asked where there
    are stop strings or somebody watches."""

    def __init__(
        self,
        state: State,
        rows: Sequence[Row],
        settings: SamplingSettings,
        *,
        ends: Sequence[int],
        context: int,
        stopped: Callable[[list[Row], list[np.ndarray]], np.ndarray],
    ):
        self.state, self.rows, self.settings, self.context, self.stopped = state, rows, settings, context, stopped
        self.looked_at = bool(settings.stop) or any(row.watch for row in rows)
        self.device = state.model.device
        self.ends = torch.tensor(list(ends), device=self.device)
        steps = max(row.limit for row in rows) + LOOK_EVERY
        self.ids_R_T = torch.zeros(len(rows), steps, dtype=torch.long, device=self.device)
        self.logprobs_R_T = torch.zeros(len(rows), steps, dtype=torch.float64, device=self.device)
        self.lengths_R = np.zeros(len(rows), dtype=np.int64)
        uniforms_R_T = np.stack([np.random.Generator(np.random.Philox(key=row.seed)).random(steps) for row in rows])
        self.uniforms_R_T = torch.from_numpy(uniforms_R_T).to(self.device)
        self.starts_R = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        self.limits_R = torch.tensor([row.limit for row in rows], device=self.device)
        nothing = torch.zeros(0, dtype=torch.long, device=self.device)
        self.row_B, self.age_B, self.token_B, self.over_B = nothing, nothing, nothing, nothing.bool()  # of the running batch

    def run(self, room: Room) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids (EOS included) of every row, and their log-probabilities at temperature 1."""
        waiting = list(range(len(self.rows)))
        with torch.inference_mode(), attention(self.state.model, self.state.attention_name):
            while waiting or len(self.row_B):
                if waiting and (self.state.joins or not len(self.row_B)):
                    waiting = self._join(waiting, room)
                for _ in range(LOOK_EVERY):
                    if bool(self.over_B.all()):
                        break
                    position_B = (self.starts_R[self.row_B] + self.age_B - 1).clamp(max=self.context - 1)
                    self._draw(self.state.step(self.token_B, position_B))
                self._leave()
        return self._drawn()

    def _join(self, waiting: list[int], room: Room) -> list[int]:
        """Start as many of the waiting rows as fit, in order, and draw their first token. Returns those that still wait."""
        own, longest, distinct, count = self._held(room), 0, set[tuple[int, ...]](), 0
        for number in waiting[: room.rows - len(self.row_B)]:
            row = self.rows[number]
            own, longest = own + row.limit + room.row_tokens, max(longest, len(row.prompt))
            distinct.add(row.prompt)
            if (count or len(self.row_B)) and own + longest * (len(distinct) if self.state.joins else count + 1) > room.tokens:
                break
            count += 1
        if count < JOIN_SHARE * min(len(self.row_B), len(waiting)):
            return waiting
        prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(self.rows[i].prompt for i in waiting[:count]))}
        joining = sorted(waiting[:count], key=lambda i: prompts[self.rows[i].prompt])
        logits_B_V = self.state.add(list(prompts), np.array([prompts[self.rows[i].prompt] for i in joining]))
        new_B = torch.tensor(joining, device=self.device)
        before = len(self.row_B)
        self.row_B = torch.cat([self.row_B, new_B])
        self.age_B, self.token_B = (torch.cat([t, torch.zeros_like(new_B)]) for t in (self.age_B, self.token_B))
        self.over_B = torch.cat([self.over_B, torch.zeros_like(new_B, dtype=torch.bool)])
        self._draw(logits_B_V, slice(before, None))
        return waiting[count:]

    def _held(self, room: Room) -> int:
        """Tokens that the running rows and their prompts may come to hold."""
        return int(self.limits_R[self.row_B].sum()) + room.row_tokens * len(self.row_B) + self.state.prompt_tokens

    def _draw(self, logits_B_V: torch.Tensor, part: slice = slice(None)) -> None:
        """One token for each row of this part of the batch."""
        row_B, age_B = self.row_B[part], self.age_B[part]
        token_B, logprob_B = draw_tokens(logits_B_V.float(), self.uniforms_R_T[row_B, age_B], self.settings)
        self.ids_R_T[row_B, age_B], self.logprobs_R_T[row_B, age_B] = token_B, logprob_B.double()
        self.over_B[part] |= torch.isin(token_B, self.ends) | (age_B + 1 >= self.limits_R[row_B])
        self.token_B[part] = token_B
        self.age_B[part] += 1

    def _leave(self) -> None:
        """Rows that are over leave the batch."""
        over_B, row_B, age_B = (t.cpu().numpy() for t in (self.over_B, self.row_B, self.age_B))
        if self.looked_at:
            drawn = [self.ids_R_T[i, :n].cpu().numpy() for i, n in zip(row_B, age_B, strict=True)]
            over_B = over_B | self.stopped([self.rows[i] for i in row_B], drawn)
        self.lengths_R[row_B] = age_B
        kept_B = np.flatnonzero(~over_B)
        if len(kept_B) < len(over_B):
            self.state.keep(kept_B)
            kept = torch.from_numpy(kept_B).to(self.device)
            self.row_B, self.age_B, self.token_B, self.over_B = (t[kept] for t in (self.row_B, self.age_B, self.token_B, self.over_B))

    def _drawn(self) -> tuple[list[list[int]], list[np.ndarray]]:
        """Every row up to its first end token or its limit: some were drawn a few tokens further."""
        end_R_T = torch.isin(self.ids_R_T, self.ends).cpu().numpy()
        ids_R_T, logprobs_R_T = self.ids_R_T.cpu().numpy(), self.logprobs_R_T.cpu().numpy()
        ids, logprobs = [], []
        for i, row in enumerate(self.rows):
            count = min(int(self.lengths_R[i]), row.limit)
            first = np.flatnonzero(end_R_T[i, :count])
            count = int(first[0]) + 1 if len(first) else count
            ids.append(ids_R_T[i, :count].tolist())
            logprobs.append(logprobs_R_T[i, :count])
        return ids, logprobs

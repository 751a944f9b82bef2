"""The decode loop: one batch across prompts, finished rows leave it, waiting rows take their places.

It goes in turns of a few tokens. Between two turns rows may be added and dropped; a row that has ended is handed out at the end
of its turn, whatever else still runs. Answers of one prompt that start at different times have it computed again: only those that
start together share it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from irlign.sampling.attention import attention
from irlign.sampling.draw import draw_tokens
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import State

LOOK_EVERY = 8  # steps of a turn, between looks for finished rows: each costs a copy of the rows that stay


@dataclass(frozen=True, eq=False)
class Row:
    """One answer to draw, unlike any other: its prompt's tokens, its seed, the most tokens it may have; `watch` hears its text as it grows."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    watch: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Room:
    """What fits at once: `rows`, and `tokens` kept over all of them and their prompts; a row's logits count `row_tokens`."""

    rows: int
    tokens: int
    row_tokens: int = 0


@dataclass(frozen=True)
class Joining:
    """When waiting rows join those that run: `share` of these at once, since each group of joiners is attended to by itself, which costs
    time; the last that wait, if they are fewer, are held back for company for `patience` turns."""

    share: float
    patience: int


ALL_THERE = Joining(share=0.5, patience=0)
MORE_MAY_COME = Joining(share=0.25, patience=4)  # somebody waits for each of them


@dataclass(frozen=True)
class Batch:
    """What is known of the rows that run, all on the device: T is the most tokens of any, and those of the turn in which it ends."""

    start_B: torch.Tensor  # tokens of the prompt
    limit_B: torch.Tensor
    age_B: torch.Tensor  # tokens drawn so far
    token_B: torch.Tensor  # the last of them
    over_B: torch.Tensor
    uniforms_B_T: torch.Tensor
    ids_B_T: torch.Tensor
    logprobs_B_T: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "Batch":
        """Rows before their first token. A row's uniforms are the first of its seed's, however many are made."""
        uniforms_B_T = np.zeros((len(rows), max((row.limit for row in rows), default=0) + LOOK_EVERY))
        for row, own_T in zip(rows, uniforms_B_T, strict=True):
            np.random.Generator(np.random.Philox(key=row.seed)).random(out=own_T)
        start_B, limit_B = (
            torch.tensor(of, dtype=torch.long, device=device) for of in ([len(r.prompt) for r in rows], [r.limit for r in rows])
        )
        uniforms = torch.from_numpy(uniforms_B_T).to(device)
        zero_B = torch.zeros_like(start_B)
        own = (
            zero_B.clone(),
            zero_B.clone(),
            zero_B.bool(),
            uniforms,
            torch.zeros_like(uniforms, dtype=torch.long),
            torch.zeros_like(uniforms),
        )
        return cls(start_B, limit_B, *own)

    def kept(self, kept: torch.Tensor | slice) -> "Batch":
        """Only these rows; views of them where they are a slice."""
        return Batch(*(getattr(self, field.name)[kept] for field in fields(self)))

    def joined(self, other: "Batch") -> "Batch":
        """These rows and those after them."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        wide = [max(t.shape[-1] for t in pair) for pair in pairs]
        return Batch(*(torch.cat([_padded(t, width) if t.dim() > 1 else t for t in pair]) for pair, width in zip(pairs, wide, strict=True)))


def _padded(t_B_T: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(t_B_T, (0, width - t_B_T.shape[1]))


Ended = tuple[Row, list[int], np.ndarray]  # a row, its token ids (EOS included), their log-probabilities at temperature 1


class Decoder:
    """Draws rows to their ends. `stopped(rows, drawn ids)` says which of them are over for another reason than EOS; it is asked where there
    are stop strings or somebody watches."""

    def __init__(
        self,
        state: State,
        settings: SamplingSettings,
        *,
        ends: Sequence[int],
        context: int,
        stopped: Callable[[list[Row], list[np.ndarray]], np.ndarray],
        joining: Joining = ALL_THERE,
    ):
        self.state, self.settings, self.context, self.stopped, self.joining = state, settings, context, stopped, joining
        self.ends = torch.tensor(list(ends), device=state.model.device)
        self.waiting, self.running, self.held = list[Row](), list[Row](), 0
        self.batch = Batch.of([], self.ends.device)

    def add(self, rows: Sequence[Row]) -> None:
        """These begin, in order, as soon as there is room for them."""
        self.waiting += rows

    @torch.inference_mode()
    def drop(self, rows: Collection[Row]) -> None:
        """Nobody waits for these any more."""
        gone = set(rows)
        self.waiting = [row for row in self.waiting if row not in gone]
        self._keep(np.array([row not in gone for row in self.running], dtype=bool))

    def turn(self, room: Room) -> list[Ended]:
        """Some tokens of every row that fits; the rows that have ended."""
        with torch.inference_mode(), attention(self.state.model, self.state.attention_name):
            if self.waiting and (self.state.joins or not self.running):
                self._join(room)
            for _ in range(LOOK_EVERY):
                if bool(self.batch.over_B.all()):
                    break
                position_B = (self.batch.start_B + self.batch.age_B - 1).clamp(max=self.context - 1)
                self._draw(self.state.step(self.batch.token_B, position_B))
            return self._leave()

    def _join(self, room: Room) -> None:
        """Start as many of the waiting rows as fit, in order, and draw their first token; or hold them back, where they are few."""
        own, longest, distinct, count = self._taken(room), 0, set[tuple[int, ...]](), 0
        for row in self.waiting[: room.rows - len(self.running)]:
            own, longest = own + row.limit + room.row_tokens, max(longest, len(row.prompt))
            distinct.add(row.prompt)
            if (count or self.running) and own + longest * (len(distinct) if self.state.joins else count + 1) > room.tokens:
                break
            count += 1
        share, patience = self.joining.share, self.joining.patience
        few = count < share * len(self.running)
        if few and (count < share * len(self.waiting) or self.held < patience):
            self.held += 1
            return
        self.held = 0
        prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(row.prompt for row in self.waiting[:count]))}
        joining = sorted(self.waiting[:count], key=lambda row: prompts[row.prompt])
        logits_B_V = self.state.add(list(prompts), np.array([prompts[row.prompt] for row in joining]))
        before = len(self.running)
        self.waiting, self.running = self.waiting[count:], self.running + joining
        self.batch = self.batch.joined(Batch.of(joining, self.ends.device))
        self._draw(logits_B_V, before)

    def _taken(self, room: Room) -> int:
        """Tokens that the running rows and their prompts may come to hold."""
        return sum(row.limit + room.row_tokens for row in self.running) + self.state.prompt_tokens

    def _draw(self, logits_B_V: torch.Tensor, first: int = 0) -> None:
        """One token for each row from the first one on."""
        part = self.batch.kept(slice(first, None))  # views
        place_B_1 = part.age_B[:, None].clone()
        token_B, logprob_B = draw_tokens(logits_B_V.float(), part.uniforms_B_T.gather(1, place_B_1).squeeze(1), self.settings)
        part.ids_B_T.scatter_(1, place_B_1, token_B[:, None])
        part.logprobs_B_T.scatter_(1, place_B_1, logprob_B.double()[:, None])
        part.age_B.add_(1)
        part.token_B.copy_(token_B)
        part.over_B.logical_or_(torch.isin(token_B, self.ends) | (part.age_B >= part.limit_B))

    def _leave(self) -> list[Ended]:
        """Rows that are over leave the batch."""
        over_B, age_B = (t.cpu().numpy() for t in (self.batch.over_B, self.batch.age_B))
        looked_at = bool(self.settings.stop) or any(row.watch for row in self.running)
        if not looked_at and not over_B.any():
            return []
        ids_B_T, logprobs_B_T = (t[:, : age_B.max(initial=0)].cpu().numpy() for t in (self.batch.ids_B_T, self.batch.logprobs_B_T))
        if looked_at:
            over_B = over_B | self.stopped(self.running, [ids_T[:age] for ids_T, age in zip(ids_B_T, age_B, strict=True)])
        ended = [self._ended(self.running[b], ids_B_T[b, : age_B[b]], logprobs_B_T[b]) for b in np.flatnonzero(over_B)]
        self._keep(~over_B)
        return ended

    def _ended(self, row: Row, ids_T: np.ndarray, logprobs_T: np.ndarray) -> Ended:
        """The row up to its first end token or its limit: some were drawn a few tokens further."""
        ids_T = ids_T[: row.limit]
        ends = np.flatnonzero(np.isin(ids_T, self.ends.cpu().numpy()))
        count = int(ends[0]) + 1 if len(ends) else len(ids_T)
        return row, ids_T[:count].tolist(), logprobs_T[:count].copy()

    def _keep(self, keeps_B: np.ndarray) -> None:
        """Only these rows go on."""
        if keeps_B.all():
            return
        kept_B = np.flatnonzero(keeps_B)
        self.state.keep(kept_B)
        self.running = [self.running[b] for b in kept_B]
        self.batch = self.batch.kept(torch.from_numpy(kept_B).to(self.ends.device))

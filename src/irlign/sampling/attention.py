"""Attention of answers that share their prompts: a prompt's keys and values are kept once, each answer's own beside them.

It stands in for transformers' own attention while tokens are drawn (their `AttentionInterface`); the rest of every
block is the model's own. Plain products and softmax: on a CPU they are two to three times as fast as the fused kernel.
Sliding windows are masked, not cut out: a layer with a short window saves no time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

NAME = "irlign_shared_prompts"
GROW = 16  # tokens by which the room for own keys grows: products go over all of it, since over part of a buffer they are slow


class Cohort:
    """Answers that started together, sorted by prompt: all have drawn `age` tokens.

    Prompts are padded on the left: `keys_P_H_T_D` of each layer, with `mask_P_T`. Row b answers prompt `which_B[b]`
    (ascending). A row's own keys are [B, H, room, D]. H counts key heads, each shared by G query heads.
    """

    def __init__(self, cache: Any, mask_P_T: torch.Tensor, which_B: np.ndarray):
        self.prompts = [(layer.keys, layer.values) for layer in cache.layers]
        padding_P_1_1_T = mask_P_T[:, None, None] == 0
        bias = torch.zeros_like(padding_P_1_1_T, dtype=self.prompts[0][0].dtype).masked_fill(padding_P_1_1_T, -torch.inf)
        self.bias_P_1_1_T = bias if bool(padding_P_1_1_T.any()) else None
        self.own = [tuple(part.new_zeros(len(which_B), part.shape[1], GROW, part.shape[3]) for part in layer) for layer in self.prompts]
        self.age = 0
        self._place(which_B)

    def __len__(self) -> int:
        return len(self.which_B)

    def _place(self, which_B: np.ndarray) -> None:
        """Where each row stands in a grid of prompts by rows, whose width is the most rows that a prompt has."""
        self.which_B = which_B
        counts_P = np.bincount(which_B)
        self.grid = len(counts_P), int(counts_P.max())
        rank_B = np.arange(len(which_B)) - (np.cumsum(counts_P) - counts_P)[which_B]
        place_B = which_B * self.grid[1] + rank_B
        row_S = np.zeros(self.grid[0] * self.grid[1], dtype=np.int64)  # empty places repeat row 0
        row_S[place_B] = np.arange(len(which_B))
        device = self.prompts[0][0].device
        self.full = len(row_S) == len(which_B)
        self.place_B, self.row_S = torch.from_numpy(place_B).to(device), torch.from_numpy(row_S).to(device)
        self.bias_B_1_1_T = None if self.bias_P_1_1_T is None else self.bias_P_1_1_T[torch.from_numpy(which_B).to(device)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens whose keys and values the prompts hold, padding included."""
        return self.grid[0] * int(self.prompts[0][0].shape[2])

    def reserve(self) -> None:
        """Room for one more token of every row."""
        if self.age == self.own[0][0].shape[2]:
            self.own = [tuple(torch.nn.functional.pad(part, (0, 0, 0, GROW)) for part in layer) for layer in self.own]

    def keep(self, kept_B: np.ndarray) -> None:
        """Only these rows (ascending) go on; prompts without rows are let go."""
        left_P, which_B = np.unique(self.which_B[kept_B], return_inverse=True)
        device = self.place_B.device
        if len(left_P) < self.grid[0]:
            left = torch.from_numpy(left_P).to(device)
            self.prompts = [(keys[left], values[left]) for keys, values in self.prompts]
            self.bias_P_1_1_T = None if self.bias_P_1_1_T is None else self.bias_P_1_1_T[left]
        kept = torch.from_numpy(kept_B).to(device)
        for i, layer in enumerate(self.own):
            self.own[i] = tuple(part[kept] for part in layer)
        self._place(which_B)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """One new token of every row, [B, heads, 1, D] each, over prompt and own tokens. Returns [B, 1, heads, D]."""
        prompt_keys, prompt_values = self.prompts[layer]
        own_keys, own_values = self.own[layer]
        count, heads, _, width = query.shape
        own_keys[:, :, self.age], own_values[:, :, self.age] = key[:, :, 0], value[:, :, 0]
        query_B_H_G_D = (query * scaling).view(count, key.shape[1], -1, width)
        shared_B_H_G_T = self._to_rows(self._to_prompts(query_B_H_G_D) @ prompt_keys.transpose(2, 3))
        scores = torch.cat([shared_B_H_G_T, query_B_H_G_D @ own_keys.transpose(2, 3)], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        shared, end = prompt_keys.shape[2], prompt_keys.shape[2] + self.age + 1
        if self.bias_B_1_1_T is not None:
            scores[..., :shared] += self.bias_B_1_1_T
        scores[..., end:] = -torch.inf
        if window is not None and end > window:
            scores[..., : end - window] = -torch.inf
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        out = weights[..., shared:] @ own_values
        out += self._to_rows(self._to_prompts(weights[..., :shared]) @ prompt_values)
        return out.view(count, 1, heads, width)

    def _to_prompts(self, rows_B_H_G_X: torch.Tensor) -> torch.Tensor:
        """[B, H, G, X] -> [P, H, rows of a prompt times G, X]."""
        _, heads, group, width = rows_B_H_G_X.shape
        grid = rows_B_H_G_X if self.full else rows_B_H_G_X[self.row_S]
        return grid.reshape(*self.grid, heads, group, width).transpose(1, 2).reshape(self.grid[0], heads, self.grid[1] * group, width)

    def _to_rows(self, prompts_P_H_RG_X: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_prompts`."""
        prompts, heads, _, width = prompts_P_H_RG_X.shape
        rows = prompts_P_H_RG_X.view(prompts, heads, self.grid[1], -1, width).transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows[self.place_B]


class SharedPrompts(Cache):
    """The cohorts of a running batch, in the order of its rows, in the place of a transformers cache."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.cohorts: list[Cohort] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """What the model hands on to its attention as keys and values: here the new ones, with all that came before."""
        return _Layer(self.cohorts, layer_idx, key_states, value_states), None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so that the model needs none from here."""
        return 0


class _Layer:
    """One layer's new keys and values, and where they belong."""

    def __init__(self, cohorts: list[Cohort], layer: int, key: torch.Tensor, value: torch.Tensor):
        self.cohorts, self.layer, self.key, self.value = cohorts, layer, key, value

    def attend(self, query: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes = [len(c) for c in self.cohorts]
        parts = zip(self.cohorts, *(t.split(sizes) for t in (query, self.key, self.value)), strict=True)
        outs = [cohort.attend(self.layer, q, k, v, **options) for cohort, q, k, v in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, mask: Any, scaling: float | None = None,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls in every layer; `key` is what `SharedPrompts.update` gave."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.attend(query, scaling=scaling, softcap=softcap, window=sliding_window), None


AttentionInterface.register(NAME, _attention)


@contextmanager
def attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """The model attends as `name` says inside the block; None leaves it as it is."""
    before = model.config._attn_implementation
    if name in (None, before):
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

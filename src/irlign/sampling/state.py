"""A running batch of answers as the model sees it: prompts in, one token of every row, rows out; prompts shared or copied."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from irlign.data.chat import pad
from irlign.forward import reads_alike
from irlign.sampling.attention import NAME, Cohort, SharedPrompts, attention


class SharedState:
    """A running batch whose rows share their prompts' keys and values (any model with transformers' attention interface)."""

    joins = True  # rows can be added while others run
    attention_name: str | None = NAME  # how the model attends while this is stepped

    def __init__(self, model: PreTrainedModel, pad_id: int):
        self.model, self.pad_id, self.cache = model, pad_id, SharedPrompts()
        self.own_attention = model.config._attn_implementation

    @property
    def prompt_tokens(self) -> int:
        """Tokens whose keys and values the prompts hold."""
        return sum(cohort.prompt_tokens for cohort in self.cache.cohorts)

    def add(self, prompts: Sequence[Sequence[int]], which_B: np.ndarray) -> torch.Tensor:
        """Compute the prompts; logits [B, V] after each row's own, rows in ascending order of prompt."""
        with attention(self.model, self.own_attention):
            logits_P_V, cache, mask_P_T = prefill(self.model, prompts, self.pad_id)
        self.cache.cohorts.append(Cohort(cache, mask_P_T, which_B))
        return logits_P_V[torch.from_numpy(which_B).to(logits_P_V.device)]

    def step(self, token_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token of every row."""
        for cohort in self.cache.cohorts:
            cohort.reserve()
        inputs = {"input_ids": token_B[:, None], "position_ids": position_B[:, None]}
        logits_B_V = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits[:, -1]
        for cohort in self.cache.cohorts:
            cohort.age += 1
        return logits_B_V

    def keep(self, kept_B: np.ndarray) -> None:
        """Only these rows (ascending) go on."""
        cohorts, start = [], 0
        for cohort in self.cache.cohorts:
            end = start + len(cohort)
            own = kept_B[(kept_B >= start) & (kept_B < end)] - start
            if len(own):
                if len(own) < len(cohort):
                    cohort.keep(own)
                cohorts.append(cohort)
            start = end
        self.cache.cohorts = cohorts


class CopiedState:
    """The same for any causal language model that keeps its past in a transformers `Cache` (`policy.load.check_causal`), states of linear
    attention included: the prompt's cache copied to each of its rows."""

    joins = False
    attention_name: str | None = None
    prompt_tokens = 0  # it starts anew each time

    def __init__(self, model: PreTrainedModel, pad_id: int):
        self.model, self.pad_id = model, pad_id
        self.cache: Any = None

    def add(self, prompts: Sequence[Sequence[int]], which_B: np.ndarray) -> torch.Tensor:
        which = torch.from_numpy(which_B).to(self.model.device)
        logits_P_V, self.cache, mask_P_T = prefill(self.model, prompts, self.pad_id, DynamicCache(config=self.model.config))
        self.cache.reorder_cache(which)  # it alone takes the states of linear attention along
        self.mask_B_T = mask_P_T[which]
        return logits_P_V[which]

    def step(self, token_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        self.mask_B_T = torch.cat([self.mask_B_T, self.mask_B_T.new_ones(len(token_B), 1)], dim=1)
        step = {"input_ids": token_B[:, None], "attention_mask": self.mask_B_T, "position_ids": position_B[:, None]}
        return self.model(**step, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def keep(self, kept_B: np.ndarray) -> None:
        kept = torch.from_numpy(kept_B).to(self.model.device)
        self.cache.reorder_cache(kept)
        self.mask_B_T = self.mask_B_T[kept]


State = SharedState | CopiedState


def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, cache: Any = None
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Logits [P, V] after each prompt, the cache filled with all of them (padded on the left), and the mask [P, T]."""
    ids_P_T, mask_P_T = (t.to(model.device) for t in pad(prompts, pad_id, side="left"))
    positions_P_T = (mask_P_T.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_P_T, "attention_mask": mask_P_T, "position_ids": positions_P_T}
    cache = DynamicCache() if cache is None else cache
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], cache, mask_P_T


def serves(model: PreTrainedModel, pad_id: int) -> bool:
    """Whether the model draws from shared prompts what it draws by itself: two steps after two prompts are compared.

    False for layers that keep anything else than keys and values of the whole text or of a sliding window.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    first, second = [1, 2, 3], [4, 5]

    def shared() -> torch.Tensor:
        state = SharedState(model, pad_id)
        state.add([first, second], np.array([0, 0, 1]))
        with attention(model, state.attention_name):
            state.step(torch.tensor([6, 7, 8], device=model.device), torch.tensor([3, 3, 2], device=model.device))
            return state.step(torch.tensor([9, 10, 11], device=model.device), torch.tensor([4, 4, 3], device=model.device))

    def alone() -> torch.Tensor:
        rows = [torch.tensor([text], device=model.device) for text in ([*first, 6, 9], [*first, 7, 10], [*second, 8, 11])]
        return torch.cat([model(input_ids=ids, use_cache=False).logits[:, -1] for ids in rows])

    return reads_alike(model, shared, alone)

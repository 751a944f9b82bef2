"""Both answers of a pair in one row, after the prompt that they share: the same rewards and gradients from fewer tokens.

A row is `prompt, better, worse`. The worse answer does not see the better one and its positions go on from the prompt, so that each answer's
reward is the one of a row of its own, but for rounding. Where the prompts of a pair differ (one was cut to fit), both rows stand whole.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from irlign.data.chat import Encoded, pad
from irlign.forward import reads_alike

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARED, BETTER, WORSE, NONE = range(4)
Pair = tuple[Encoded, Encoded]


def collate(pairs: Sequence[Pair], pad_id: int) -> dict[str, "torch.Tensor"]:
    """`input_ids`, `position_ids` and `segments` of shape [B, T] for `read`, and `ends` [2, B]: where the better and the worse answers end.

    `attention_mask` [2B, L] is that of the answers in rows of their own, from which tokens are counted.
    """
    import torch

    rows, segments, positions, ends = [], [], [], []
    for better, worse in pairs:
        prompt = better.prompt_ids if better.prompt_ids == worse.prompt_ids else []
        first, second = better.ids[len(prompt) :], worse.ids[len(prompt) :]
        rows.append([*prompt, *first, *second])
        segments.append([SHARED] * len(prompt) + [BETTER] * len(first) + [WORSE] * len(second))
        positions.append([*range(len(prompt) + len(first)), *range(len(prompt), len(prompt) + len(second))])
        ends.append((len(prompt) + len(first) - 1, len(rows[-1]) - 1))
    alone, _ = pad([[1] * len(row) for side in zip(*pairs, strict=True) for row in side], 0)
    return {
        "input_ids": pad(rows, pad_id)[0],
        "position_ids": pad(positions, 0)[0],
        "segments": pad(segments, NONE)[0],
        "ends": torch.tensor(ends).T,
        "attention_mask": alone,
    }


def visible(segments_B_T: "torch.Tensor") -> "torch.Tensor":
    """Whether query t sees key s: an earlier one or itself, of its own segment or of the shared prompt. Booleans of shape [B, 1, T, T]."""
    import torch

    width = segments_B_T.shape[1]
    query_B_T_1, key_B_1_T = segments_B_T[:, :, None], segments_B_T[:, None, :]
    earlier_T_T = torch.ones(width, width, dtype=torch.bool, device=segments_B_T.device).tril()
    return (earlier_T_T & ((query_B_T_1 == key_B_1_T) | ((key_B_1_T == SHARED) & (query_B_T_1 != NONE))))[:, None]


def _hidden(model: Any, batch: dict[str, Any]) -> "torch.Tensor":
    """The last hidden states at the ends of the better answers, then of the worse ones. Shape [2B, D]."""
    import torch

    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": visible(batch["segments"])}
    hidden_B_T_D = model.base_model(**inputs, use_cache=False).last_hidden_state
    better_B, worse_B = batch["ends"]
    places_B = torch.arange(len(better_B), device=better_B.device)
    return torch.cat([hidden_B_T_D[places_B, better_B], hidden_B_T_D[places_B, worse_B]])


def read(model: Any, batch: dict[str, Any]) -> "torch.Tensor":
    """Logits of shape [2B, K] of a sequence-classification model (or an adapter on one), better answers first."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.score(_hidden(inner, batch))


def can_fork(model: "PreTrainedModel", pair: Pair, pad_id: int) -> bool:
    """Whether this model reads the pair (take the longest) forked as it reads it in two rows. False for encoders, for attention that takes no
    mask of ours, and for layers that keep a state or look back over a window."""
    import torch

    if not hasattr(model, "score") or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False

    def forked() -> "torch.Tensor":  # [1, 2, D]: the two ends are compared as one
        return _hidden(model, {name: of.to(model.device) for name, of in collate([pair], pad_id).items()})[None]

    def apart() -> "torch.Tensor":
        rows = [torch.tensor([row.ids], device=model.device) for row in pair]
        return torch.cat([model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1] for ids in rows])[None]

    return reads_alike(model, forked, apart)


def fork_trainer(compute_loss_func: Callable[..., Any], **options: Any) -> Any:
    """transformers' Trainer over batches of `collate` with their `labels`; `options` are its own."""
    from transformers import Trainer

    class ForkTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with self.accelerator.autocast():
                logits = read(self.accelerator.unwrap_model(model), inputs)
            return compute_loss_func(SimpleNamespace(logits=logits), inputs["labels"], num_items_in_batch)

    return ForkTrainer(compute_loss_func=compute_loss_func, **options)

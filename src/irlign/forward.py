"""Rows through a model in batches of similar length, where a prompt that several answers share is computed once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from irlign.data.batches import in_batches
from irlign.data.chat import Encoded, pad
from irlign.errors import out_of_memory
from irlign.packed import packed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CPU_TOKENS, GPU_TOKENS = 1024, 32768  # padded tokens a batch: small ones win on a CPU
KEPT = 4  # on a CPU a batch may look back on so many times the tokens it computes

_sharing: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Batch:
    """Some of the rows, by their places: what of each the model has yet to read, and the keyword arguments that make it do so.
    `inputs["input_ids"]` has shape [B, T], padded on the right; a row's prompt may be down to its last token."""

    places: list[int]
    rows: list[Encoded]
    inputs: dict[str, Any]


def each_batch(
    model: "PreTrainedModel", rows: Sequence[Encoded], pad_id: int, work: Callable[[Batch], None], *, where: str, most: int | None = None
) -> None:
    """`work(batch)` on every row once, longest first; at most `most` padded tokens a batch, or what suits the device, whichever is less, and
    half of it where memory runs out.

    Prompts of two or more answers are read once, and their keys and values are handed to each answer: the same numbers but for
    rounding, from a third of the work at 16 answers. Models that keep their past in another way read every row whole. Raises ModelError
    where memory does not hold one row.
    """
    with packed(model, sum(map(len, rows))):
        _each_batch(model, rows, pad_id, work, where, most)


def _each_batch(
    model: "PreTrainedModel", rows: Sequence[Encoded], pad_id: int, work: Callable[[Batch], None], where: str, most: int | None
) -> None:
    on_gpu = model.device.type == "cuda"
    budget = min(GPU_TOKENS if on_gpu else CPU_TOKENS, most or GPU_TOKENS)
    answers = Counter(tuple(row.prompt_ids) for row in rows)
    shared = [i for i, row in enumerate(rows) if len(row.prompt_ids) > 1 and answers[tuple(row.prompt_ids)] > 1]
    if shared and not _shares(model, rows[shared[0]], pad_id):
        shared = []
    _with_shared_prompts(model, rows, shared, pad_id, work, where, budget, 1 if on_gpu else KEPT)
    together = set(shared)
    alone = [i for i in range(len(rows)) if i not in together]

    def whole(part: list[int]) -> None:
        places = [alone[i] for i in part]
        ids_B_T, mask_B_T = (t.to(model.device) for t in pad([rows[i].ids for i in places], pad_id))
        inputs = {"input_ids": ids_B_T, "attention_mask": mask_B_T, "use_cache": False}
        work(Batch(places, [rows[i] for i in places], inputs))

    in_batches([len(rows[i]) for i in alone], budget, whole, where=where)


def _with_shared_prompts(
    model: "PreTrainedModel",
    rows: Sequence[Encoded],
    places: Sequence[int],
    pad_id: int,
    work: Callable[[Batch], None],
    where: str,
    budget: int,
    kept: int,
) -> None:
    """The rows at these places; the keys and values of at most `budget` tokens of prompts are held at a time."""
    of: dict[tuple[int, ...], list[int]] = {}
    for i in places:
        of.setdefault(tuple(rows[i].prompt_ids), []).append(i)
    prompts = list(of)

    def answers(group: list[int]) -> None:
        memory = _Prompts(model, [prompts[g] for g in group], pad_id)
        which = {i: p for p, g in enumerate(group) for i in of[prompts[g]]}
        tails = [(i, Encoded(rows[i].prompt_ids[-1:], rows[i].completion_ids)) for i in which]
        width = memory.mask_P_T.shape[1]

        def after(part: list[int]) -> None:
            own = [tails[j][0] for j in part]
            inputs = memory.inputs([which[i] for i in own], [tails[j][1].ids for j in part])
            work(Batch(own, [tails[j][1] for j in part], inputs))

        weights = [max(len(tail), -(-(len(tail) + width) // kept)) for _, tail in tails]
        in_batches(weights, budget, after, where=where, texts=[len(rows[i]) for i, _ in tails])

    in_batches([len(p) for p in prompts], budget, answers, where=where)


class _Prompts:
    """Keys and values of prompts but for their last token, which every answer reads itself: its output is the answer's first."""

    def __init__(self, model: "PreTrainedModel", prompts: Sequence[Sequence[int]], pad_id: int):
        from transformers import DynamicCache

        self.device, self.pad_id, cache = model.device, pad_id, DynamicCache()
        ids_P_T, self.mask_P_T = (t.to(self.device) for t in pad([p[:-1] for p in prompts], pad_id, side="left"))
        positions_P_T = (self.mask_P_T.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids_P_T, "attention_mask": self.mask_P_T, "position_ids": positions_P_T}
        model.base_model(**inputs, past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        self.layers = [(layer.keys, layer.values) for layer in layers]

    def inputs(self, which: Sequence[int], tails: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What makes the model read row b after prompt `which[b]`: `tails[b]`, padded on the right."""
        import torch
        from transformers import DynamicCache

        which_B = torch.tensor(which, device=self.device)
        ids_B_T, own_B_T = (t.to(self.device) for t in pad(tails, self.pad_id))
        before_B_T = self.mask_P_T[which_B]
        cache = DynamicCache()
        for number, (keys_P_H_T_D, values_P_H_T_D) in enumerate(self.layers):
            cache.update(keys_P_H_T_D[which_B], values_P_H_T_D[which_B], number)
        positions_B_T = before_B_T.sum(1, keepdim=True) + (own_B_T.cumsum(1) - 1).clamp(min=0)  # padding too: the model has no others
        mask_B_T = torch.cat([before_B_T, own_B_T], dim=1)
        return {
            "input_ids": ids_B_T,
            "attention_mask": mask_B_T,
            "position_ids": positions_B_T,
            "past_key_values": cache,
            "use_cache": True,
        }


def _shares(model: "PreTrainedModel", row: Encoded, pad_id: int) -> bool:
    """Whether the model reads an answer after its prompt's keys and values as it reads the whole row; found out once a model."""
    import torch

    def after_prompt() -> "torch.Tensor":
        inputs = _Prompts(model, [row.prompt_ids], pad_id).inputs([0], [[row.prompt_ids[-1], *row.completion_ids]])
        return model.base_model(**inputs).last_hidden_state

    def whole() -> "torch.Tensor":
        ids = torch.tensor([row.ids], device=model.device)
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, len(row.prompt_ids) - 1 :]

    if model not in _sharing:
        _sharing[model] = reads_alike(model, after_prompt, whole)
    return _sharing[model]


def reads_alike(model: "PreTrainedModel", way: Callable[[], "torch.Tensor"], plain: Callable[[], "torch.Tensor"]) -> bool:
    """Whether the model reads rows in a way of ours as it reads them plainly. Each returns [N, ...], and the N parts are compared one by one:
    equal but for rounding, of the largest number in the part. Dropout is off meanwhile.

    False where the model refuses: encoders, attention that takes no mask or cache of ours, layers that keep anything else than keys and
    values.
    """
    import torch

    near = 1e-3 if model.dtype == torch.float32 else 5e-2
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            both = zip(way(), plain(), strict=True)
            return all(bool((found - own).abs().max() <= near * own.abs().max()) for found, own in both)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):  # says nothing of the model
            raise
        return False
    finally:
        model.train(training)

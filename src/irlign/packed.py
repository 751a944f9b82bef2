"""Linear layers whose weights are laid out once as the processor's products want them.

torch lays out the weights of a linear layer anew in every call. Where few rows go through large layers, as in sampling, that is half of a product's time and more;
oneDNN, which torch carries, takes weights that are laid out already, for the same numbers but for rounding.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from irlign.errors import out_of_memory
from irlign.machine import total_memory

if TYPE_CHECKING:
    import torch

LARGE = 1 << 18  # numbers in a weight: below it the call costs more than it saves
PAYS_FROM = 2048  # tokens: fewer do not win back the time of laying out


def pack(model: "torch.nn.Module") -> list[Any]:
    """From now on the large linear layers of a model on a CPU compute with weights that are laid out once; they are returned. None where a quarter of the machine's
    memory does not hold a second copy of them, and as many more as processes of so many threads have cores: a rule that gives the same today and on a resume. For inference:
    gradients do not pass, and weights that change are not seen."""
    import torch

    layers: list[Any] = [layer for layer in model.modules() if _fits(layer)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    sharing = max(1, (os.cpu_count() or 1) // torch.get_num_threads())
    if not layers or size * sharing > total_memory() // 4 or not all(map(_works, {layer.weight.dtype for layer in layers})):
        return []
    try:
        for layer in layers:
            weight_N_K = layer.weight.detach() if isinstance(layer, torch.nn.Linear) else layer.weight.detach().t().contiguous()
            layer.forward = partial(_product, _lay_out(weight_N_K), layer.bias, layer.forward, weight_N_K.dtype)
    except (RuntimeError, MemoryError) as error:
        _unpack(layers)
        if out_of_memory(error):
            return []
        raise
    return layers


@contextlib.contextmanager
def packed(model: "torch.nn.Module", tokens: float = float("inf")) -> Iterator[None]:
    """`pack`, inside only, where so many tokens pay for it."""
    layers = pack(model) if tokens >= PAYS_FROM else []
    try:
        yield
    finally:
        _unpack(layers)


def _unpack(layers: Sequence[Any]) -> None:
    for layer in layers:
        layer.__dict__.pop("forward", None)


def _fits(layer: Any) -> bool:
    """Whether it is a large linear layer (GPT-2's `Conv1D` is one, its weight transposed) on a CPU, not laid out yet."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if type(layer) not in (torch.nn.Linear, Conv1D) or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() >= LARGE


def _lay_out(weight_N_K: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight_N_K, None)


def _product(laid_out: "torch.Tensor", bias: "torch.Tensor | None", plain: Any, dtype: "torch.dtype", x: "torch.Tensor") -> "torch.Tensor":
    """The layer's output; as torch computes it under autocast, and where the input is in another number format or empty."""
    import torch

    if torch.is_autocast_enabled("cpu") or x.dtype != dtype or not x.numel():
        return plain(x)
    return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


@cache
def _works(dtype: "torch.dtype") -> bool:
    """Whether this torch has these products on this processor, and they are those of a linear layer."""
    import torch

    with torch.autocast("cpu", enabled=False):
        weight, x = torch.linspace(-1, 1, 64 * 32).reshape(64, 32).to(dtype), torch.linspace(-2, 2, 3 * 32).reshape(1, 3, 32).to(dtype)
        try:
            found = _product(_lay_out(weight), None, None, dtype, x)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return torch.allclose(found, torch.nn.functional.linear(x, weight), atol=1e-5 if dtype == torch.float32 else 1e-1)

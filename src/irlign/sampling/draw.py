"""One token a row from logits: temperature, top-k, top-p and the inversion of the cumulative distribution."""

import torch

from irlign.sampling.engine import SamplingSettings

BLOCK = 128  # tokens summed at once before the cumulative sum, whose cost grows with the vocabulary
NUCLEUS = 1024  # likeliest tokens sorted first for top-p; all of them only where these do not reach p


def draw_tokens(logits_B_V: torch.Tensor, uniforms_B: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF, and its log-probability under the untempered, unfiltered law.

    `logits_B_V` float32, `uniforms_B` float64 in [0, 1). Top-k keeps the k likeliest; top-p then keeps the smallest
    set of the likeliest whose share reaches p (the order of transformers and vLLM). Exact in distribution up to the
    rounding of float32; among tokens of equal probability the filters' boundary falls anywhere.
    """
    plain = settings.temperature == 1
    weights_B_V = (logits_B_V if plain else logits_B_V / settings.temperature).softmax(-1)
    if settings.top_k or settings.top_p < 1:
        top_B_K, order_B_K = _likeliest(weights_B_V, settings)
        token_B = order_B_K.gather(1, _invert(top_B_K, uniforms_B)[:, None])
    else:
        token_B = _invert(weights_B_V, uniforms_B)[:, None]
    if plain:
        logprob_B = weights_B_V.gather(1, token_B).log()
    else:
        logprob_B = logits_B_V.gather(1, token_B) - logits_B_V.logsumexp(-1, keepdim=True)
    return token_B.squeeze(1), logprob_B.squeeze(1)


def _likeliest(weights_B_V: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in descending order with their tokens; those outside top-k or top-p are 0."""
    vocabulary = weights_B_V.shape[-1]
    top_B_K, order_B_K = weights_B_V.topk(min(settings.top_k or NUCLEUS, vocabulary))
    if not settings.top_k and bool((top_B_K.sum(-1) <= settings.top_p).any()):
        top_B_K, order_B_K = weights_B_V.sort(dim=-1, descending=True)
    if settings.top_p < 1:
        before_B_K = top_B_K.cumsum(-1) - top_B_K
        whole_B_1 = top_B_K.sum(-1, keepdim=True) if settings.top_k else 1.0
        top_B_K = top_B_K.masked_fill(before_B_K >= settings.top_p * whole_B_1, 0.0)
    return top_B_K, order_B_K


def _invert(weights_B_V: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds u times the total; never an index of weight 0.

    In two steps, the block first and then the index inside it: sums are fast where cumulative sums are not.
    """
    vocabulary = weights_B_V.shape[-1]
    if vocabulary <= 2 * BLOCK:
        cumulative_B_V = weights_B_V.double().cumsum(-1)
        return _first_above(cumulative_B_V, uniforms_B * cumulative_B_V[:, -1])
    whole = vocabulary // BLOCK
    sums_B_W = weights_B_V[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
    rest_B = weights_B_V[:, whole * BLOCK :].sum(-1, keepdim=True)
    cumulative_B_W = torch.cat([sums_B_W, rest_B], dim=1).double().cumsum(-1)
    target_B = uniforms_B * cumulative_B_W[:, -1]
    block_B_1 = _first_above(cumulative_B_W, target_B)[:, None]
    before_B_1 = torch.where(block_B_1 > 0, cumulative_B_W.gather(1, (block_B_1 - 1).clamp(min=0)), 0.0)
    index_B_K = block_B_1 * BLOCK + torch.arange(BLOCK, device=weights_B_V.device)
    inside_B_K = weights_B_V.gather(1, index_B_K.clamp(max=vocabulary - 1)).double().masked_fill(index_B_K >= vocabulary, 0.0)
    return block_B_1.squeeze(1) * BLOCK + _first_above(inside_B_K.cumsum(-1), target_B - before_B_1.squeeze(1))


def _first_above(cumulative_B_V: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds the target, which rounding may have pushed out of the range."""
    total_B = cumulative_B_V[:, -1]
    target_B = torch.minimum(target_B.clamp(min=0.0), torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_B_V, target_B[:, None], right=True).squeeze(1).clamp(max=cumulative_B_V.shape[-1] - 1)

"""Sampling in process from any transformers causal language model, on a CPU or a GPU.

Each distinct prompt is computed once for all its answers, finished rows leave the batch, and tokens are drawn by
inverting the cumulative distribution with uniforms that belong to the request: a request's samples do not depend on
what else is in the batch, up to the rounding of matrix products (identical batches give identical bytes).
Left out: admitting new rows into a running batch, and bf16.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from irlign.data.chat import Format, pad
from irlign.errors import DataError, ModelError
from irlign.policy.load import load_policy
from irlign.records import FinishReason, Sample
from irlign.sampling.engine import Request, SamplingSettings

if TYPE_CHECKING:
    import torch

DROP_EVERY = 8  # steps between looking for finished rows: each look costs a copy of the cache


class TransformersEngine:
    """An `Engine` over a policy folder."""

    name = "transformers"

    def __init__(self, policy: Path, settings: SamplingSettings, chat_template: str):
        self.policy = load_policy(str(policy), policy.name)
        self.format = Format(self.policy.tokenizer, chat_template)
        self.settings = settings
        ends = self.policy.model.generation_config.eos_token_id if self.policy.model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted({self.policy.tokenizer.eos_token_id, *(e for e in ends if e is not None)})

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples for every request, in order. Batches are cut from the requests as they come, never across calls."""
        prompts = self.format.prompts_ids([r.prompt.content for r in requests])
        limit = self.policy.max_length
        for request, ids in zip(requests, prompts, strict=True):
            if len(ids) >= limit:
                raise DataError(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer: the model reads {limit}",
                    where=f"prompt {request.prompt.prompt_id}",
                    do="drop or truncate long prompts (data.on_overlong)",
                )
        rows = [(request, i) for i, request in enumerate(requests) for _ in request.seeds]
        seeds = [seed for request in requests for seed in request.seeds]
        indices = [j for request in requests for j in range(len(request.seeds))]
        samples: list[Sample] = []
        size = self.settings.batch_size
        for start in range(0, len(rows), size):
            batch = range(start, min(start + size, len(rows)))
            drawn, logprobs = self._decode([prompts[rows[b][1]] for b in batch], [seeds[b] for b in batch])
            for b, row_ids, row_logprobs in zip(batch, drawn, logprobs, strict=True):
                request, i = rows[b]
                text, reason, used = self._finish(prompts[i], row_ids)
                samples.append(Sample(request.prompt, indices[b], text, reason, used, float(np.sum(row_logprobs[:used]))))
        return samples

    def _decode(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids (EOS included) and their log-probabilities at temperature 1, for each row."""
        import torch

        policy, model = self.policy, self.policy.model
        limits_B = np.array([min(self.settings.max_new_tokens, policy.max_length - len(p)) for p in prompts])
        steps = int(limits_B.max())
        uniforms_B_T = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])
        tokens_B_T, logprobs_B_T = np.zeros((len(prompts), steps), dtype=np.int64), np.zeros((len(prompts), steps))
        lengths_B = np.zeros(len(prompts), dtype=np.int64)
        alive = np.arange(len(prompts))  # the original row of each row still in the batch
        done = np.zeros(len(prompts), dtype=bool)  # of the rows still in the batch
        distinct = {p: i for i, p in enumerate(dict.fromkeys(tuple(p) for p in prompts))}
        which = torch.tensor([distinct[tuple(p)] for p in prompts], device=policy.device)
        with torch.inference_mode():
            ids_P_T, mask_P_T = (t.to(policy.device) for t in pad(list(distinct), policy.pad_id, side="left"))
            positions_P_T = (mask_P_T.cumsum(1) - 1).clamp(min=0)
            out = model(input_ids=ids_P_T, attention_mask=mask_P_T, position_ids=positions_P_T, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            cache.batch_select_indices(which)
            logits_B_V, mask_B_T, position_B = out.logits[which, -1], mask_P_T[which], positions_P_T[which, -1]
            for t in range(steps):
                uniforms_B = torch.from_numpy(uniforms_B_T[alive, t]).to(policy.device)
                token_B, logprob_B = draw_tokens(logits_B_V.float(), uniforms_B, self.settings)
                live = alive[~done]
                tokens_B_T[live, t] = token_B.cpu().numpy()[~done]
                logprobs_B_T[live, t] = logprob_B.double().cpu().numpy()[~done]
                if not np.isfinite(logprobs_B_T[live, t]).all():
                    raise ModelError("its token probabilities are not finite", where=policy.name, do="train it again, or give another")
                lengths_B[live] += 1
                done |= np.isin(tokens_B_T[alive, t], self.eos_ids) | (t + 1 >= limits_B[alive])
                if t % DROP_EVERY == DROP_EVERY - 1 or done.all():
                    done |= self._stopped([prompts[int(b)] for b in alive], [tokens_B_T[b, : lengths_B[b]] for b in alive])
                    if done.all():
                        break
                    keep = torch.from_numpy(np.flatnonzero(~done)).to(policy.device)
                    if len(keep) < len(alive):
                        cache.batch_select_indices(keep)
                        token_B, mask_B_T, position_B = token_B[keep], mask_B_T[keep], position_B[keep]
                        alive, done = alive[~done], done[~done]
                position_B = (position_B + 1).clamp(max=policy.max_length - 1)
                mask_B_T = torch.cat([mask_B_T, mask_B_T.new_ones(len(mask_B_T), 1)], dim=1)
                step = {"input_ids": token_B[:, None], "attention_mask": mask_B_T, "position_ids": position_B[:, None]}
                logits_B_V = model(**step, past_key_values=cache, use_cache=True).logits[:, -1]
        rows = range(len(prompts))
        return [tokens_B_T[b, : lengths_B[b]].tolist() for b in rows], [logprobs_B_T[b, : lengths_B[b]] for b in rows]

    def _stopped(self, prompts: list[Sequence[int]], drawn: list[np.ndarray]) -> np.ndarray:
        """Which rows already hold a stop string."""
        if not self.settings.stop:
            return np.zeros(len(prompts), dtype=bool)
        texts = self.format.decode_completions(prompts, [d.tolist() for d in drawn])
        return np.array([any(stop in text for stop in self.settings.stop) for text in texts])

    def _finish(self, prompt: Sequence[int], ids: list[int]) -> tuple[str, FinishReason, int]:
        """The text, why it ended, and how many of the drawn tokens it took (its EOS or stop string included)."""
        ended = bool(ids) and ids[-1] in self.eos_ids
        body = ids[:-1] if ended else ids
        text = self.format.decode_completion(prompt, body)
        cuts = [text.index(stop) for stop in self.settings.stop if stop in text]
        if not cuts:
            return text, ("eos" if ended else "length"), len(ids)
        low, high = 1, len(body)  # the fewest tokens whose text already holds a stop string
        while low < high:
            middle = (low + high) // 2
            shorter = self.format.decode_completion(prompt, body[:middle])
            low, high = (low, middle) if any(stop in shorter for stop in self.settings.stop) else (middle + 1, high)
        return text[: min(cuts)], "stop", low


def draw_tokens(
    logits_B_V: "torch.Tensor", uniforms_B: "torch.Tensor", settings: SamplingSettings
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """One token a row by inverse CDF, and its log-probability under the untempered, unfiltered law.

    `logits_B_V` float32, `uniforms_B` float64 in [0, 1). Top-k keeps the k likeliest; top-p then keeps the smallest
    set of the likeliest whose share reaches p (the order of transformers and vLLM).
    """
    logprobs_B_V = logits_B_V.log_softmax(-1)
    if settings.top_k or settings.top_p < 1:
        sorted_B_V, order_B_V = (logits_B_V / settings.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        if settings.top_k:
            sorted_B_V[:, settings.top_k :] = 0.0
        if settings.top_p < 1:
            before_B_V = sorted_B_V.cumsum(-1) - sorted_B_V
            sorted_B_V = sorted_B_V.masked_fill(before_B_V >= settings.top_p * sorted_B_V.sum(-1, keepdim=True), 0.0)
        token_B = order_B_V.gather(1, _invert(sorted_B_V, uniforms_B)[:, None]).squeeze(1)
    else:
        scaled = logprobs_B_V if settings.temperature == 1 else (logits_B_V / settings.temperature).log_softmax(-1)
        token_B = _invert(scaled.exp(), uniforms_B)
    return token_B, logprobs_B_V.gather(1, token_B[:, None]).squeeze(1)


def _invert(weights_B_V: "torch.Tensor", uniforms_B: "torch.Tensor") -> "torch.Tensor":
    """The first index whose cumulative weight exceeds u times the total; never an index of weight 0."""
    import torch

    cumulative_B_V = weights_B_V.double().cumsum(-1)
    total_B = cumulative_B_V[:, -1]
    target_B = torch.minimum(uniforms_B.double() * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_B_V, target_B[:, None], right=True).squeeze(1).clamp(max=weights_B_V.shape[-1] - 1)

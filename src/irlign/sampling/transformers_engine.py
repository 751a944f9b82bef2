"""Sampling in process from any transformers causal language model, on a CPU or a GPU.

Answers that start together share their prompt's keys and values; finished rows leave the batch and waiting ones take their
places. Tokens are drawn by inverting the cumulative distribution with uniforms that belong to the request, so a request's
samples do not depend on what else is in the batch, with one exception: products are rounded differently in batches of
different shapes, and where that carries a cumulative share across the uniform, another token is drawn and the rest of that
answer differs (seldom in float32; bfloat16 keeps three digits). The same call with the same settings and `settled` on the
same machine gives the same bytes. Models without transformers' attention interface are served by copies of the prompt's
cache, without joining.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlign.data.chat import Format
from irlign.errors import DataError, ModelError, out_of_memory
from irlign.machine import free_memory
from irlign.policy.load import load_policy
from irlign.records import FinishReason, Sample
from irlign.sampling.decoder import Decoder, Room, Row
from irlign.sampling.ending import ending
from irlign.sampling.engine import Drawn, Request, SamplingSettings
from irlign.sampling.state import CopiedState, SharedState, serves
from irlign.training import bf16_pays


class TransformersEngine:
    """An `Engine` over a policy folder."""

    name = "transformers"

    def __init__(self, policy: Path, settings: SamplingSettings, chat_template: str, settled: Mapping[str, Any] | None = None):
        self.policy = load_policy(str(policy), policy.name)
        self.format = Format(self.policy.tokenizer, chat_template)
        self.settings = settings
        model = self.policy.model
        pays = bf16_pays(model.num_parameters())
        dtype = {"auto": "bfloat16" if pays else "float32"}.get(settings.dtype, settings.dtype)
        self.settled = {"dtype": dtype, **(settled or {})}
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay exact
            parameter.data = parameter.data.to(getattr(torch, self.settled["dtype"]))
        self.state = SharedState if serves(model, self.policy.pad_id) else CopiedState
        self.settled = {"batch_tokens": self._batch_tokens(), **self.settled}
        self.halvings, self.usage = 0, dict[str, float]()
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted({self.policy.tokenizer.eos_token_id, *(e for e in ends if e is not None)})

    def _batch_tokens(self) -> int:
        """Tokens whose keys and values half of the free memory holds: a power of two, so that a little more or less
        memory changes nothing, and never more than a full batch of the longest texts needs."""
        most = self.settings.batch_size * self.policy.max_length
        fitting = free_memory(self.policy.device.type) // 2 // self._token_bytes
        return min(most, 1 << max(fitting, 1).bit_length() - 1)

    @property
    def _token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        config, size = self.policy.model.config.get_text_config(), self.policy.model.dtype.itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * size * config.num_hidden_layers * heads * width

    def under(self, settings: SamplingSettings) -> "TransformersEngine":
        """The same weights under another law; what was settled for them holds."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples for every request, in order. Batches never cross calls.

        Memory that runs out halves the batch and starts anew; `halvings` says how often, for this call only.
        """
        return [one.sample for one in self.answers(requests)]

    def answers(self, requests: Sequence[Request]) -> list[Drawn]:
        """The same with their tokens."""
        prompts = self.format.prompts_ids([r.prompt.content for r in requests])
        limit = self.policy.max_length
        for request, ids in zip(requests, prompts, strict=True):
            if len(ids) >= limit:
                raise DataError(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer: the model reads {limit}",
                    where=f"prompt {request.prompt.prompt_id}",
                    do="drop or truncate long prompts (data.on_overlong)",
                )
        wanted = [(request, ids, i) for request, ids in zip(requests, prompts, strict=True) for i in range(len(request.seeds))]
        drawn, logprobs = self._decode([self._row(*of) for of in wanted])
        found = []
        for (request, prompt, i), ids, row_logprobs in zip(wanted, drawn, logprobs, strict=True):
            text, reason, used = self._finish(prompt, ids)
            sample = Sample(request.prompt, i, text, reason, used, float(np.sum(row_logprobs[:used])))
            found.append(Drawn(sample, len(prompt), tuple(ids[:used]), tuple(row_logprobs[:used].tolist())))
        return found

    def _row(self, request: Request, prompt: Sequence[int], i: int) -> Row:
        """Answer i to a request, as the decode loop draws it."""
        limit = min(request.limit or self.settings.max_new_tokens, self.policy.max_length - len(prompt))
        return Row(tuple(prompt), request.seeds[i], limit, request.watch and partial(request.watch, i))

    def _decode(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids (EOS included) and their log-probabilities at temperature 1, for each row."""
        self.halvings = 0
        while True:
            try:
                ids, logprobs = self._run(rows, self._room())
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self._room().rows == 1:
                    raise
            self.halvings += 1
        if not all(np.isfinite(row).all() for row in logprobs):
            raise ModelError("its token probabilities are not finite", where=self.policy.name, do="train it again, or give another")
        return ids, logprobs

    def _room(self) -> Room:
        """What fits at once, after the halvings so far. Logits, their weights and a copy weigh as much as some tokens."""
        vocabulary = int(self.policy.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        rows, tokens = self.settings.batch_size >> self.halvings, self.settled["batch_tokens"] >> self.halvings
        return Room(max(1, rows), tokens, row_tokens=12 * vocabulary // self._token_bytes)

    def _run(self, rows: Sequence[Row], room: Room) -> tuple[list[list[int]], list[np.ndarray]]:
        state = self.state(self.policy.model, self.policy.pad_id)
        context = self.policy.max_length
        return Decoder(state, rows, self.settings, ends=self.eos_ids, context=context, stopped=self._stopped).run(room)

    def _stopped(self, rows: list[Row], drawn: list[np.ndarray]) -> np.ndarray:
        """Which rows already hold a stop string, or may end because nobody waits for them."""
        over = np.zeros(len(rows), dtype=bool)
        seen = [i for i, row in enumerate(rows) if self.settings.stop or row.watch]
        bodies = [self._before_end(drawn[i].tolist()) for i in seen]
        for i, text in zip(seen, self.format.decode_completions([rows[i].prompt for i in seen], bodies), strict=True):
            cut = min((text.index(stop) for stop in self.settings.stop if stop in text), default=None)
            watch = rows[i].watch
            left = watch is not None and watch(text[:cut])
            over[i] = cut is not None or left
        return over

    def _before_end(self, ids: list[int]) -> list[int]:
        """What stands before the first end token: some rows were drawn a few tokens further."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.eos_ids), None)]

    def _finish(self, prompt: Sequence[int], ids: list[int]) -> tuple[str, FinishReason, int]:
        return ending(self.format, prompt, ids, eos_ids=self.eos_ids, stop=self.settings.stop)

"""Sampling in process from any transformers causal language model that takes `past_key_values`, on a CPU or a GPU.

Answers that start together share their prompt's keys and values; finished rows leave the batch and waiting ones take their
places, those of requests that come while others are drawn among them (`drawing`). Tokens are drawn by inverting the cumulative
distribution with uniforms that belong to the request, so a request's samples do not depend on what else is in the batch, with
one exception: products are rounded differently in batches of different shapes, and where that carries a cumulative share across
the uniform, another token is drawn and the rest of that answer differs (seldom in float32; bfloat16 keeps three digits). The
same call with the same settings and `settled` on the same machine gives the same bytes. Models without transformers' attention
interface are served by copies of the prompt's cache, without joining.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlign.data.chat import Format
from irlign.errors import DataError, ModelError, out_of_memory
from irlign.machine import free_memory
from irlign.packed import pack
from irlign.policy.load import load_policy
from irlign.records import Sample
from irlign.sampling.decoder import ALL_THERE, MORE_MAY_COME, Decoder, Ended, Joining, Room, Row
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
        pack(model)
        self.state = SharedState if serves(model, self.policy.pad_id) else CopiedState
        self.settled = {"batch_tokens": self._batch_tokens(), **self.settled}
        self.halvings, self.usage = 0, dict[str, float]()
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted({self.policy.tokenizer.eos_token_id, *(e for e in ends if e is not None)})

    def _batch_tokens(self) -> int:
        """Tokens whose keys and values half of the free memory holds: a power of two, so that a little more or less
        memory changes nothing, and never more than a full batch of the longest texts needs. Processes side by side share a CPU's."""
        most, kind = self.settings.batch_size * self.policy.max_length, self.policy.device.type
        sharing = self.settings.num_workers if kind == "cpu" else 1
        fitting = free_memory(kind) // 2 // sharing // self._token_bytes
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

    def drawing(self) -> "JoinedDrawing":
        """Requests to be drawn together, none yet."""
        return JoinedDrawing(self, MORE_MAY_COME)

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples for every request, in order. Batches never cross calls.

        Memory that runs out halves the batch; `halvings` says how often, for this call only.
        """
        return [one.sample for one in self.answers(requests)]

    def answers(self, requests: Sequence[Request]) -> list[Drawn]:
        """The same with their tokens."""
        drawing, found = JoinedDrawing(self), dict[int, list[Drawn]]()
        drawing.add(dict(enumerate(requests)))
        while len(found) < len(requests):
            found |= drawing.turn()
        self.halvings = drawing.halvings
        return [one for number in range(len(requests)) for one in found[number]]

    def room(self, halvings: int = 0) -> Room:
        """What fits at once, after so many halvings. Logits, their weights and a copy weigh as much as some tokens."""
        vocabulary = int(self.policy.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        rows, tokens = self.settings.batch_size >> halvings, self.settled["batch_tokens"] >> halvings
        return Room(max(1, rows), tokens, row_tokens=12 * vocabulary // self._token_bytes)


@dataclass(frozen=True)
class _Open:
    """A request whose answers are drawn: its prompt's tokens, a row for each answer, and the answers that are there, by number."""

    request: Request
    prompt: Sequence[int]
    rows: Sequence[Row]
    drawn: dict[int, Drawn]

    @property
    def left(self) -> list[Row]:
        """The rows of the answers that are not there."""
        return [row for i, row in enumerate(self.rows) if i not in self.drawn]


class JoinedDrawing:
    """A `Drawing` that requests join and leave while others are drawn.

    Memory that runs out halves the batch from then on, and starts the answers that are not there anew; `halvings` says how often.
    """

    def __init__(self, engine: TransformersEngine, joining: Joining = ALL_THERE):
        self.engine, self.joining, self.halvings, self.open = engine, joining, 0, dict[int, _Open]()
        self.decoder = self._decoder()

    def _decoder(self) -> Decoder:
        e = self.engine
        state = e.state(e.policy.model, e.policy.pad_id)
        limit = e.policy.max_length
        return Decoder(state, e.settings, ends=e.eos_ids, context=limit, stopped=self._stopped, joining=self.joining)

    def add(self, requests: Mapping[int, Request]) -> None:
        """These begin as soon as there is room. Raises DataError, and adds none, where a prompt leaves no room for an answer."""
        prompts = self.engine.format.prompts_ids([r.prompt.content for r in requests.values()])
        limit = self.engine.policy.max_length
        for request, ids in zip(requests.values(), prompts, strict=True):
            if len(ids) >= limit:
                raise DataError(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer: the model reads {limit}",
                    where=f"prompt {request.prompt.prompt_id}",
                    do="drop or truncate long prompts (data.on_overlong)",
                )
        for (number, request), ids in zip(requests.items(), prompts, strict=True):
            self.open[number] = _Open(request, ids, [self._row(request, ids, i) for i in range(len(request.seeds))], {})
            self.decoder.add(self.open[number].rows)

    def _row(self, request: Request, prompt: Sequence[int], i: int) -> Row:
        """Answer i to a request, as the decode loop draws it."""
        limit = min(request.limit or self.engine.settings.max_new_tokens, self.engine.policy.max_length - len(prompt))
        return Row(tuple(prompt), request.seeds[i], limit, request.watch and partial(request.watch, i))

    def drop(self, number: int) -> None:
        """Nobody waits for this request any more."""
        self.decoder.drop(self.open.pop(number).left)

    def turn(self) -> dict[int, list[Drawn]]:
        """Some tokens further; the answers to each request that now has all of them."""
        owner = {row: (one, i) for one in self.open.values() for i, row in enumerate(one.rows)}
        for row, ids, logprobs in self._ended():
            one, i = owner[row]
            one.drawn[i] = self._drawn(one, i, ids, logprobs)
        ready = [number for number, one in self.open.items() if len(one.drawn) == len(one.rows)]
        return {number: [one.drawn[i] for i in range(len(one.rows))] for number in ready for one in [self.open.pop(number)]}

    def _ended(self) -> list[Ended]:
        """The rows that have ended in this turn."""
        while True:
            try:
                return self.decoder.turn(self.engine.room(self.halvings))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.engine.room(self.halvings).rows == 1:
                    raise
            self.halvings += 1
            self.decoder = self._decoder()
            self.decoder.add([row for one in self.open.values() for row in one.left])

    def _drawn(self, one: _Open, i: int, ids: list[int], logprobs: np.ndarray) -> Drawn:
        """Answer i to a request, from its tokens. Raises ModelError where their log-probabilities are not finite."""
        e = self.engine
        if not np.isfinite(logprobs).all():
            raise ModelError("its token probabilities are not finite", where=e.policy.name, do="train it again, or give another")
        text, reason, used = ending(e.format, one.prompt, ids, eos_ids=e.eos_ids, stop=e.settings.stop)
        sample = Sample(one.request.prompt, i, text, reason, used, float(np.sum(logprobs[:used])))
        return Drawn(sample, len(one.prompt), tuple(ids[:used]), tuple(logprobs[:used].tolist()))

    def _stopped(self, rows: list[Row], drawn: list[np.ndarray]) -> np.ndarray:
        """Which rows already hold a stop string; who watches hears what there is."""
        over, stops = np.zeros(len(rows), dtype=bool), self.engine.settings.stop
        seen = [i for i, row in enumerate(rows) if stops or row.watch]
        bodies = [self._before_end(drawn[i].tolist()) for i in seen]
        for i, text in zip(seen, self.engine.format.decode_completions([rows[i].prompt for i in seen], bodies), strict=True):
            cut = min((text.index(stop) for stop in stops if stop in text), default=None)
            if watch := rows[i].watch:
                watch(text[:cut])
            over[i] = cut is not None
        return over

    def _before_end(self, ids: list[int]) -> list[int]:
        """What stands before the first end token: some rows were drawn a few tokens further."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.engine.eos_ids), None)]

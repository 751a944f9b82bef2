"""Answers of a policy between two steps of its training: our decode loop in the place of `generate`, under the same law."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from irlign.sampling.decoder import Decoder, Room, Row
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import SharedState


def draw_in_training(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    ends: Sequence[int],
    pad_id: int,
    context: int,
    process: int = 0,
    stopped: Callable[[list[Row], list[np.ndarray]], np.ndarray] | None = None,
) -> list[list[int]]:
    """The tokens of one answer to each prompt, given as tokens, EOS included; equal prompts are computed once. Seeds are drawn from torch's global random state, so a training that
    is resumed with it draws the same; each `process` has its own. `stopped` says which answers hold a stop string, where the settings have one; an answer may go on a few tokens
    after it. The model is in training mode again afterwards if it was."""
    seeds = [(seed << 16) + process for seed in torch.randint(1 << 46, (len(prompts),)).tolist()]
    rows = [Row(tuple(ids), seed, min(settings.max_new_tokens, context - len(ids))) for ids, seed in zip(prompts, seeds, strict=True)]
    training, found = model.training, dict[Row, list[int]]()
    model.eval()
    try:
        with torch.inference_mode():
            decoder = Decoder(SharedState(model, pad_id), settings, ends=ends, context=context, stopped=stopped or _never)
            decoder.add(rows)
            while len(found) < len(rows):
                found |= {row: ids for row, ids, _ in decoder.turn(Room(len(rows), 1 << 40))}
    finally:
        model.train(training)
    return [found[row] for row in rows]


def _never(rows: Sequence[Row], _: object) -> np.ndarray:
    return np.zeros(len(rows), bool)

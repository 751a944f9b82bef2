"""Answers scored side by side: transformers in batches of 8, 16 and 32 in order, and irlign's scoring of rewards and likelihoods.

    python benchmarks/scoring.py [--quick] [--only SHAPE] [--repeats K] [--cpu] [--json FILE]

Random weights, a reward head or the language model's own; prompts of 32 to 96 tokens, 16 answers each, of a geometric length with mean 39, cut
at 96. `alone`: irlign where no prompt has two answers, so that nothing is shared (each answer with a prompt of its own).
Tokens are those of prompt and answer, for every answer, padding left out. A ratio is to float32 batches of 8 in order in the same
repeat, the spread the smallest and largest of them. `same winners`: the share of prompts whose best answer is the one of float32 in
order; `irlign` is held to it in float32 too. Random weights tell answers apart less than a trained reward does.
`positions`: places that the model computed, padding with them, for each token: what an engine can still save, and below 1 where prompts are shared.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from side_by_side import command, in_turn, random_model, rows_of, show, texts, word_tokenizer
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from irlign.data.chat import IGNORED, Encoded, Format, pad
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import Policy
from irlign.reward.model import Classifier

ANSWERS = 16
Engine = Callable[[Any, Sequence[Encoded]], np.ndarray]


def in_order(model: Any, rows: Sequence[Encoded], size: int, read: Callable[[Any, Sequence[Encoded]], torch.Tensor]) -> np.ndarray:
    """transformers: the rows as they come, padded on the right."""
    found = []
    with torch.inference_mode():
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            ids, mask = pad([row.ids for row in part], 0)
            found.append(read(model(input_ids=ids, attention_mask=mask).logits.float(), part))
    return torch.cat(found).numpy()


def rewards(logits: torch.Tensor, rows: Sequence[Encoded]) -> torch.Tensor:
    return logits[:, 0]


def likelihoods(logits: torch.Tensor, rows: Sequence[Encoded]) -> torch.Tensor:
    labels = pad([row.labels for row in rows], IGNORED)[0][:, 1:]
    return -torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)


def irlign_rewards(model: Any, rows: Sequence[Encoded], tokenizer: Any) -> np.ndarray:
    return Classifier(model, Format(tokenizer, "none"), "random").logits(rows)[:, 0]


def irlign_likelihoods(model: Any, rows: Sequence[Encoded], tokenizer: Any) -> np.ndarray:
    return sequence_log_probs(Policy(model, tokenizer, "random"), rows)


KINDS: dict[str, tuple[Any, dict[str, Any], Any, Any]] = {
    "reward": (AutoModelForSequenceClassification, {"num_labels": 1}, rewards, irlign_rewards),
    "likelihood": (AutoModelForCausalLM, {}, likelihoods, irlign_likelihoods),
}


def same_winners(found: np.ndarray, held_to: np.ndarray) -> float:
    """Share of prompts with the same best answer."""
    return float((found.reshape(-1, ANSWERS).argmax(1) == held_to.reshape(-1, ANSWERS).argmax(1)).mean())


class Places:
    """How many places of its input a model has computed, padding with them; `of` is what each engine's last run came to."""

    def __init__(self, *models: Any):
        self.count, self.of = 0, dict[str, int]()
        for model in models:
            model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, arguments: Any, named: dict[str, Any]) -> None:
        self.count += (arguments[0] if arguments else named["input_ids"]).numel()

    def noted(self, name: str, run: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def again() -> np.ndarray:
            before = self.count
            found = run()
            self.of[name] = self.count - before
            return found

        return again


def measure(
    shape: str, kind: str, *, prompts: int, repeats: int, sizes: Sequence[int] = (8, 16, 32), **timing: Any
) -> list[dict[str, Any]]:
    """The table's rows for one shape and kind of score."""
    auto, config, read, own = KINDS[kind]
    model = random_model(shape, auto, **config)
    low = copy.deepcopy(model)
    for parameter in low.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    tokenizer = word_tokenizer(model.config.vocab_size)
    rows = Format(tokenizer, "none").encode(*zip(*texts(prompts, ANSWERS), strict=True))
    alone = [Encoded([3 + i // 900, 3 + i % 900, *row.prompt_ids[2:]], row.completion_ids) for i, row in enumerate(rows)]
    engines: dict[str, Callable[[], np.ndarray]] = {}
    for name, its in (("float32", model), ("bf16", low)):
        engines |= {f"in order, batches of {size}, {name}": partial(in_order, its, rows, size, read) for size in sizes}
        engines[f"irlign, alone, {name}"] = partial(own, its, alone, tokenizer)
        engines[f"irlign, {name}"] = partial(own, its, rows, tokenizer)
    for run in engines.values():  # first calls
        run.func(run.args[0], rows[:ANSWERS], *run.args[2:])  # type: ignore[attr-defined]
    places, tokens = Places(model, low), sum(map(len, rows))
    seconds, results = in_turn({name: places.noted(name, run) for name, run in engines.items()}, repeats, **timing)
    base = next(iter(engines))
    found = rows_of(seconds, base, tokens, shape=shape, kind=kind)
    for row in found:
        row["positions"] = places.of[row["engine"]] / tokens
        row["more"] = f"{kind}, {row['positions']:.2f} positions a token"
        if "alone" not in row["engine"]:
            row["same_winners"] = same_winners(results[row["engine"]], results[base])
            row["more"] += f", {row['same_winners']:.1%} the same winners"
    show(found)
    return found


def main(arguments: list[str] | None = None) -> None:
    def run(given: Namespace) -> list[dict[str, Any]]:
        if given.quick:
            return measure("llama 0.9 M", "reward", prompts=12, repeats=given.repeats or 3, sizes=(8,), clock=given.clock)
        plan = {"llama 0.9 M": (24, 5), "gpt-2 small": (4, 3)}
        wanted = [(shape, *size) for shape, size in plan.items() if given.only in (None, shape)]
        return [
            row
            for shape, prompts, repeats in wanted
            for kind in KINDS
            for row in measure(shape, kind, prompts=prompts, repeats=given.repeats or repeats, clock=given.clock)
        ]

    command(__doc__, run, arguments, "rewards of the 0.9 M Llama, under a minute")


if __name__ == "__main__":
    main()

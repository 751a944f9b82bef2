"""RLOO and GRPO side by side: the same training with answers drawn by TRL's `generate` and by irlign's sampler.

    python benchmarks/on_policy.py [--quick] [--only SHAPE] [--repeats K] [--cpu] [--json FILE]

The models of benchmarks/sampling.py, whose answers have a geometric length with mean 39, cut at 96; prompts of 32 to 96 tokens, 8 answers each, 64 answers
a step; a reward that counts words; float32. Seconds are of the whole training, models loaded and saved. Each training draws its own answers, another seed in each repeat, so a ratio is of seconds for a drawn
token, to `generate` with the same method in the same repeat; the spread is the smallest and largest of them.
"""

import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sampling import NEW, make_model
from side_by_side import command, rows_of, show, texts, word_tokenizer
from training import quiet

from irlign.optimise.rloo import on_policy_config, train_on_policy
from irlign.optimise.settings import OnPolicySettings
from irlign.records import Prompt, PromptContent, Sample
from irlign.sampling.engine import SamplingSettings
from irlign.training import TrainerSettings

METHODS: tuple[Literal["rloo", "grpo"], ...] = ("rloo", "grpo")
DRAWN_BY: dict[str, dict[str, Any]] = {"generate": {"repetition_penalty": 1.0}, "irlign": {}}  # a field of TRL's leaves drawing to TRL


class Words:
    """A reward that costs nothing."""

    name = "words"

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        return np.array([float(len(set(text.split()))) for text in completions])


def train(
    start: Path, folder: Path, asked: Sequence[Sample], method: Literal["rloo", "grpo"], trainer: dict[str, Any], seed: int = 0
) -> int:
    """One pass over the prompts; the tokens it drew."""
    config = on_policy_config(method, OnPolicySettings(), SamplingSettings(max_new_tokens=NEW))
    settings = TrainerSettings(learning_rate=1e-5, num_train_epochs=1, per_device_train_batch_size=64, trainer={"bf16": False, **trainer})
    places: dict[str, Any] = {"folder": folder / "policy", "checkpoints": folder / "checkpoints"}
    about: dict[str, Any] = {"chat_template": "none", "seed": seed, "report_to": "none", "reward": Words, "length_penalty": 0.0}
    shutil.rmtree(folder, ignore_errors=True)
    return train_on_policy(start, asked, [], settings, config=config, **places, **about)["drawn"]


def measure(shape: str, prompts: int, repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[dict[str, Any]]:
    """The table's rows for one shape."""
    asked = [Sample(Prompt.of(prompt, "train"), 0, answer, "eos", len(answer.split()) + 1, -1.0) for prompt, answer in texts(prompts, 1)]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        start, out = Path(place, "start"), Path(place, "out")
        model = make_model(shape, "realistic", torch.float32)
        model.save_pretrained(start)
        word_tokenizer(model.config.vocab_size).save_pretrained(start)
        for method in METHODS:
            paces: dict[str, list[float]] = {name: [] for name in DRAWN_BY}  # seconds a token
            for repeat in range(-1, repeats):
                for name, more in DRAWN_BY.items():
                    before = clock()
                    drawn = train(start, out, asked if repeat >= 0 else asked[:8], method, more, seed=repeat + 1)
                    if repeat >= 0:  # before: imports and first calls
                        paces[name].append((clock() - before) / drawn)
            rows = rows_of(paces, "generate", 1, shape=shape, kind=method)
            for row in rows:
                row["more"] = method
            show(rows)
            found += rows
    return found


def main(arguments: list[str] | None = None) -> None:
    quiet()

    def run(given: Namespace) -> list[dict[str, Any]]:
        if given.quick:
            return measure("llama 0.9 M", 16, given.repeats or 2, clock=given.clock)
        plan = {"llama 0.9 M": (128, 5), "gpt-2 small": (8, 3)}
        wanted = [(shape, *size) for shape, size in plan.items() if given.only in (None, shape)]
        return [row for shape, prompts, repeats in wanted for row in measure(shape, prompts, given.repeats or repeats, clock=given.clock)]

    command(__doc__, run, arguments, "the 0.9 M Llama on a few prompts, under a minute")


if __name__ == "__main__":
    main()

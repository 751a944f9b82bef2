"""Tokens a second of fine-tuning and of reward training: irlign's stages, TRL's trainers, and a plain loop, on the same rows.

    python benchmarks/training.py [--quick] [--only SHAPE] [--repeats K] [--cpu] [--json FILE]

Random weights; every engine goes from a folder with a model to a folder with the trained one, with batches of 8 rows (or pairs), one epoch,
the same peak learning rate, and no evaluation. Prompts have 32 to 96 tokens, answers a geometric length with mean 39, cut at 96. Tokens are
real ones, padding left out. `defaults` are TRL's own (gradient checkpointing, bf16 autocast); the others change what their names say.
`plain loop`: rows sorted by length, batches of neighbours in random order, fused AdamW, in float32 or under bf16 autocast. A ratio is to
TRL's defaults in the same repeat, the spread the smallest and largest of them.
"""

import contextlib
import logging
import shutil
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import Text, command, in_turn, random_model, rows_of, show, texts, tokens_in, word_tokenizer
from transformers import set_seed
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from irlign.data.chat import IGNORED, Format, pad
from irlign.policy.sft import SFTSettings, train_sft
from irlign.records import Contrast, Demonstration, Prompt
from irlign.reward.train import RewardSettings, train_reward

BATCH, RATE = 8, 1e-4
SAME: dict[str, Any] = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": RATE}
CHEAP: dict[str, Any] = {"gradient_checkpointing": False}
GROUPED: dict[str, Any] = {**CHEAP, "train_sampling_strategy": "group_by_length"}
PACKED: dict[str, Any] = {**CHEAP, "packing": True, "packing_strategy": "wrapped", "max_length": 256}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no checkpointing, float32": {**CHEAP, "bf16": False},
    "no checkpointing, bf16": CHEAP,
    "by length, float32": {**GROUPED, "bf16": False},
    "by length, bf16": GROUPED,
    "packing (wrapped), float32": {**PACKED, "bf16": False},
    "packing (wrapped), bf16": PACKED,
}


def save_start(folder: Path, shape: str) -> Path:
    """The model and tokenizer that every engine starts from."""
    model = random_model(shape, AutoModelForCausalLM)
    model.save_pretrained(folder)
    word_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def trl_sft(start: Path, folder: Path, rows: Sequence[Text], **options: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    arguments = SFTConfig(output_dir=str(folder), **SAME, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(start))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder))


def trl_reward(start: Path, folder: Path, pairs: Sequence[tuple[Text, Text]], **options: Any) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_list([{"prompt": prompt, "chosen": better, "rejected": worse} for (prompt, better), (_, worse) in pairs])
    arguments = RewardConfig(
        output_dir=str(folder), **SAME, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options
    )
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(start))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder))


def irlign_sft(start: Path, folder: Path, rows: Sequence[Text]) -> None:
    shown = [Demonstration(Prompt.of(prompt, "train"), answer) for prompt, answer in rows]
    options: dict[str, Any] = {"chat_template": "none", "checkpoints": folder / "checkpoints", "seed": 0, "report_to": "none"}
    train_sft(start, shown, [], SFTSettings(**SAME), folder=folder / "sft", **options)


def irlign_reward(start: Path, folder: Path, pairs: Sequence[tuple[Text, Text]]) -> None:
    rows = [Contrast(Prompt.of(prompt, "train"), better, worse) for (prompt, better), (_, worse) in pairs]
    options: dict[str, Any] = {"chat_template": "none", "checkpoints": folder / "checkpoints", "seed": 0, "report_to": "none"}
    settings = RewardSettings(**SAME, loss="bradley-terry")
    train_reward(start, rows, [], settings, folder=folder / "reward", **options)


def loop(model: Any, batches: Sequence[Callable[[], Any]], bf16: bool) -> None:
    """One pass over the batches in random order; each of them gives its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for i in np.random.default_rng(0).permutation(len(batches)):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = batches[i]()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def plain_sft(start: Path, folder: Path, rows: Sequence[Text], bf16: bool) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train(), AutoTokenizer.from_pretrained(start)
    encoded = sorted(Format(tokenizer, "none").encode(*zip(*rows, strict=True)), key=len)

    def loss(first: int) -> Any:
        part = encoded[first : first + BATCH]
        (ids, mask), (labels, _) = pad([r.ids for r in part], 0), pad([r.labels for r in part], IGNORED)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    loop(model, [partial(loss, first) for first in range(0, len(encoded), BATCH)], bf16)
    model.save_pretrained(folder)


def plain_reward(start: Path, folder: Path, pairs: Sequence[tuple[Text, Text]], bf16: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32).train()
    sides = [Format(tokenizer, "none").encode(*zip(*side, strict=True)) for side in zip(*pairs, strict=True)]
    encoded = sorted(zip(*sides, strict=True), key=lambda pair: max(map(len, pair)))

    def loss(first: int) -> Any:
        part = encoded[first : first + BATCH]
        ids, mask = pad([r.ids for side in zip(*part, strict=True) for r in side], 0)
        better, worse = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().chunk(2)
        return -torch.nn.functional.logsigmoid(better - worse).mean()

    loop(model, [partial(loss, first) for first in range(0, len(encoded), BATCH)], bf16)
    model.save_pretrained(folder)


def quiet() -> None:
    """Nothing on the terminal but the table."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as own

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    own.set_verbosity_error()
    own.disable_progress_bar()
    disable_progress_bars()


def engines(kind: str, shape: str, quick: bool) -> dict[str, Callable[..., None]]:
    """By name; each is called with the start, a folder of its own and the rows."""
    if kind == "sft":
        names = ["defaults", "no checkpointing, float32"] if quick else list(OPTIONS)
        found = {f"SFTTrainer, {name}": partial(trl_sft, **OPTIONS[name]) for name in names}
        return {
            **found,
            "plain loop, float32": partial(plain_sft, bf16=False),
            "plain loop, bf16": partial(plain_sft, bf16=True),
            "irlign": irlign_sft,
        }
    names = ["defaults"] if quick else list(OPTIONS)[:3]  # RewardTrainer groups no pairs by length, and packs none
    found = {f"RewardTrainer, {name}": partial(trl_reward, **OPTIONS[name]) for name in names}
    return {**found, "plain loop, float32": partial(plain_reward, bf16=False), "plain loop, bf16": partial(plain_reward, bf16=True), "irlign": irlign_reward}  # fmt: skip


def measure(shape: str, rows: int, repeats: int, quick: bool = False, **timing: Any) -> list[dict[str, Any]]:
    """Rows of the table for both kinds of training on this shape; `rows` demonstrations, and half as many pairs."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        start = save_start(Path(place, "start"), shape)
        shown = texts(rows, 1)
        both = texts(rows // 2, 2, seed=1)
        data: dict[str, Any] = {"sft": shown, "reward": list(zip(both[::2], both[1::2], strict=True))}
        for kind, own in data.items():

            def run(engine: Callable[..., None], own: Any = own) -> None:
                folder = Path(place, "out")
                set_seed(0)
                engine(start, folder, own)
                shutil.rmtree(folder, ignore_errors=True)

            peers = engines(kind, shape, quick)
            for engine in peers.values():  # imports and first calls
                run(engine, own[:BATCH])
            seconds, _ = in_turn({name: partial(run, engine) for name, engine in peers.items()}, repeats, **timing)
            tokens = tokens_in(shown if kind == "sft" else both)
            found += rows_of(seconds, next(iter(peers)), tokens, shape=shape, kind=kind)
            show(found[-len(peers) :])
    return found


def main(arguments: list[str] | None = None) -> None:
    quiet()

    def run(given: Namespace) -> list[dict[str, Any]]:
        if given.quick:
            return measure(given.only or "llama 0.9 M", 64, given.repeats or 2, quick=True, clock=given.clock)
        plan = {"llama 0.9 M": (256, 5), "gpt-2 small": (32, 3)}
        return [
            row
            for shape, (rows, repeats) in plan.items()
            if given.only in (None, shape)
            for row in measure(shape, rows, given.repeats or repeats, clock=given.clock)
        ]

    command(__doc__, run, arguments, "the 0.9 M Llama on a few rows, under a minute")


if __name__ == "__main__":
    main()

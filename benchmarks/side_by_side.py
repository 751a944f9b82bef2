"""What the benchmarks share: random models with the two stated laws of lengths, peers timed in turn, a row for each, one table."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import HAZARD, NEW, PAD, SHAPES
from transformers import set_seed

Text = tuple[str, str]
LENGTHS = "realistic"  # the law of `texts`, as sampling.py calls it


def random_model(shape: str, kind: Any, **config: Any) -> Any:
    """A model of this shape with random weights; `kind` is an Auto class."""
    set_seed(0)
    form = SHAPES[shape]()
    form.update(config)
    return kind.from_config(form).eval()


def word_tokenizer(vocabulary: int) -> Any:
    """One token a word: w3, w4, ...; `<pad>` and `<eos>` as in SHAPES, nothing added in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(prompts: int, answers: int, seed: int = 0) -> list[Text]:
    """Prompts of 32 to 96 words, `answers` each, in the order of the prompts; lengths of answers are geometric with mean 39, cut at 96."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, 1000, count))

    asked = [words(int(rng.integers(32, 97))) for _ in range(prompts)]
    return [(prompt, " " + words(min(NEW, int(rng.geometric(HAZARD))))) for prompt in asked for _ in range(answers)]


def tokens_in(rows: Sequence[Text]) -> int:
    """Words and an EOS each."""
    return sum(len(prompt.split()) + len(answer.split()) + 1 for prompt, answer in rows)


def in_turn(
    engines: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every engine in every repeat, the engines one after the other within it, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in engines.items():
            start = clock()
            results[name] = run()
            seconds[name].append(clock() - start)
    return seconds, results


def rows_of(seconds: Mapping[str, Sequence[float]], base: str, tokens: int, **about: Any) -> list[dict[str, Any]]:
    """A row for each engine, of texts with the law LENGTHS: median tokens a second, and how many times as fast as `base` in the same repeat."""
    rows = []
    for name, own in seconds.items():
        ratios = [b / s for b, s in zip(seconds[base], own, strict=True)]
        speed, ratio = tokens / statistics.median(own), statistics.median(ratios)
        row = {**about, "engine": name, "lengths": LENGTHS, "tokens_per_s": speed, "ratio": ratio}
        rows.append({**row, "spread": [min(ratios), max(ratios)]})
    return rows


def show(rows: Sequence[Mapping[str, Any]], unit: str = "tok/s") -> None:
    for row in rows:
        low, high = row["spread"]
        more = f"  {row['more']}" if row.get("more") else ""
        print(f"{row['shape']:12} {row['engine']:44} {row['tokens_per_s']:9.0f} {unit} {row['ratio']:6.2f}x ({low:.2f} to {high:.2f}){more}", flush=True)  # fmt: skip


def command(
    doc: str | None, measure: Callable[[argparse.Namespace], list[dict[str, Any]]], arguments: Sequence[str] | None, quick: str
) -> None:
    """The command line that all of them have: `--quick`, `--only SHAPE`, `--repeats K`, `--cpu`, `--json FILE`. The load of the machine stands above the table."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", choices=list(SHAPES)[:2], help="one shape only")
    parser.add_argument("--repeats", type=int, help="how often each engine runs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds: on a busy machine, with one thread")
    given = parser.parse_args(arguments)
    given.clock = time.process_time if given.cpu else time.perf_counter
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads; load average before the start {load:.2f}{'; CPU seconds' * given.cpu}", flush=True)
    rows = measure(given)
    if given.json:
        given.json.write_text(
            json.dumps({"load": load, "clock": "cpu" if given.cpu else "wall", "threads": torch.get_num_threads(), "rows": rows}, indent=1)
            + "\n",
            encoding="utf-8",
        )

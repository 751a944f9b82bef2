"""How cost grows with prompts, samples, model size and processes; and the whole chain beside preference rewards and DPO at three sizes.

    python benchmarks/scaling.py [--quick] [--only cost|chain] [--repeats K] [--seeds 100,101] [--cells FOLDER] [--json FILE]

`cost`: drawing N answers to each of P prompts, scoring them, and training a reward on N/2 pairs a prompt, by irlign's own stages from folders of
weights: small Llamas with random weights, answers as long as in the other benchmarks. In every repeat each point is measured in fresh processes of
one thread, after a small first call. Seconds are those of the slowest process; FLOPs those of the cost model (docs/scale.md) at the lengths that
occurred, `planned` are the seconds that these take at the speed of a plain matrix product here. Memory is the peak of the largest process, and what of it came after
libraries and first call (`own`), beside the bytes planned for that. An exponent is the slope of the logarithms along an axis, median and range
over the repeats, beside the slope of what is planned. Along `processes` each of two draws and scores half of the prompts, as the workers of
a cluster do (without Ray), and `accelerate launch` trains, its start included, with the same global batch.

`chain` (scaling_chain.py): `irlign run`, preference rewards with Best-of-n and DPO in cells of the arena, all in the same run.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import NEW, SHAPES, TINY, make_model
from scaling_chain import chain
from side_by_side import texts, word_tokenizer
from training import quiet
from transformers import LlamaConfig

from irlign.config import parse_seeds
from irlign.costs import SAMPLING, SCORING, TRAINING
from irlign.machine import matmul_flops, peak_memory_mib, reset_peak_memory
from irlign.sizes import shape_of
from irlign.stage_costs import SCORING_TOKENS

BATCH, MIB, QUANTITIES = 8, 1 << 20, {"seconds": "planned_seconds", "own_mib": "planned_mib"}
HERE: dict[
    str, Any
] = {}  # of a process that is measured: the barrier before a stage, the speed of a product, and its memory before the first stage


@dataclass(frozen=True)
class Point:
    """So many prompts, answers to each, width of the model, and processes."""

    prompts: int = 24
    answers: int = 8
    width: int = 128
    processes: int = 1


MANY = Point(prompts=96)
AXES: dict[str, list[Point]] = {
    "prompts": [Point(prompts=6), Point(), MANY],
    "answers": [Point(answers=2), Point(), Point(answers=32)],
    "width": [Point(width=64), Point(), Point(width=256)],
    "processes": [MANY, replace(MANY, processes=2)],
}
QUICK = {"prompts": [Point(4, 4, 64), Point(24, 4, 64)]}


def save_policy(folder: Path, width: int) -> int:
    """A Llama of this width with the benchmarks' law of lengths, a token a word; its parameters that multiply."""
    form = {**TINY, "hidden_size": width, "intermediate_size": 11 * width // 4, "tie_word_embeddings": False}
    SHAPES[folder.name] = lambda: LlamaConfig(vocab_size=1024, **form, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    make_model(folder.name, "realistic", torch.float32).save_pretrained(folder)
    word_tokenizer(1024).save_pretrained(folder)
    shape = shape_of(str(folder))
    return shape.parameters - shape.looked_up


def sampling(policy: Path, point: Point, share: int) -> tuple[float, float, float]:
    """Draw the answers to this process's share of the prompts: tokens drawn, FLOPs, planned bytes."""
    from irlign.records import Prompt
    from irlign.sampling.engine import SamplingSettings
    from irlign.sampling.pools import draw_pool

    asked = [prompt for prompt, _ in texts(point.prompts, 1)][share :: point.processes]
    settings, shape = SamplingSettings(max_new_tokens=NEW, dtype="float32"), shape_of(str(policy))
    with tempfile.TemporaryDirectory() as place:
        wanted = [(Prompt.of(prompt, "test"), point.answers) for prompt in asked]
        drawn = draw_pool(policy, wanted, settings, chat_template="none", folder=Path(place), seed=0, name="sft")
    length, count, mean = statistics.mean(len(p.split()) for p in asked), drawn["samples"], drawn["completions/mean_length"]
    planned = shape.sampling_memory(min(count, settings.batch_size), length + NEW, 4)
    return count * mean, shape.drawn(len(asked), count, length, mean), planned


def scoring(policy: Path, point: Point, share: int) -> tuple[float, float, float]:
    """Score the answers to this process's share of the prompts with a fresh head: tokens read, FLOPs, planned bytes."""
    from irlign.reward.model import Classifier

    rows = [row for i, row in enumerate(texts(point.prompts, point.answers)) if i // point.answers % point.processes == share]
    Classifier.start(policy, "none", "random").score([p for p, _ in rows], [a for _, a in rows])
    length, shape = float(np.mean(lengths(rows))), shape_of(str(policy))
    tokens, planned = len(rows) * length, shape.scoring_memory(min(SCORING_TOKENS, sum(lengths(rows))), False)
    return tokens, shape.read(len(rows), length, False), planned


def training(policy: Path, point: Point, share: int) -> tuple[float, float, float]:
    """Train a reward in all processes: tokens trained on (each text with its prompt), FLOPs, planned bytes."""
    from irlign.launch import ProcessSettings, launch
    from irlign.records import Contrast, Prompt
    from irlign.reward.train import RewardSettings, train_reward

    rows, batch = texts(point.prompts, point.answers), BATCH // point.processes
    pairs = [Contrast(Prompt.of(prompt, "train"), a, b) for (prompt, a), (_, b) in zip(rows[::2], rows[1::2], strict=True)]
    settings = RewardSettings(num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-4)
    with tempfile.TemporaryDirectory() as place:
        options: dict[str, Any] = {"folder": Path(place, "reward"), "chat_template": "none", "seed": 0, "report_to": "none"}
        own = ProcessSettings(num_processes=point.processes, accelerate_config=None)
        launch(own, train_reward, policy, pairs, [], settings, checkpoints=Path(place, "checkpoints"), **options)
    of, shape = lengths(rows), shape_of(str(policy))
    planned = shape.training_memory(2 * min(batch, len(pairs)), max(of), False, False)
    return float(sum(of)), shape.trained(len(rows), float(np.mean(of)), False), planned


KINDS = {"sampling": (sampling, SAMPLING), "scoring": (scoring, SCORING), "training": (training, TRAINING)}


def lengths(rows: Sequence[tuple[str, str]]) -> list[int]:
    """Tokens of each prompt and its answer, EOS included."""
    return [len(prompt.split()) + len(answer.split()) + 1 for prompt, answer in rows]


def ready(policy: Path, barrier: Any) -> None:
    """What a measured process does first: libraries, first calls, and its memory after them."""
    quiet()
    for run, _ in KINDS.values():
        run(policy, Point(2, 2), 0)
    reset_peak_memory()
    HERE.update(barrier=barrier, before=peak_memory_mib())


def work(policy: Path, kind: str, point: Point, share: int) -> dict[str, float]:
    """One process's part of a stage; those that divide the prompts begin together."""
    if kind != "training":
        HERE["barrier"].wait()
    reset_peak_memory()
    start = time.perf_counter()
    tokens, flops, planned = KINDS[kind][0](policy, point, share)
    seconds, peak = time.perf_counter() - start, peak_memory_mib()
    if (
        kind == "training" and point.processes > 1
    ):  # a child begins at the peak of the process that started it, so this is the largest of both
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
    own = max(1.0, peak - HERE["before"])
    return {"tokens": tokens, "flops": flops, "seconds": seconds, "peak_mib": peak, "own_mib": own, "planned_mib": planned / MIB}


def measure(policy: Path, point: Point) -> dict[str, dict[str, float]]:
    """One point once, by kind: tokens and FLOPs of all processes, the most of the rest."""
    context, found = get_context("spawn"), {}
    with ProcessPoolExecutor(point.processes, context, ready, (policy, context.Barrier(point.processes))) as pool:
        for kind, (_, reached) in KINDS.items():
            parts = [*pool.map(partial(work, policy, kind, point), range(1 if kind == "training" else point.processes))]
            found[kind] = {key: (sum if key in ("tokens", "flops") else max)(part[key] for part in parts) for key in parts[0]}
            found[kind]["planned_seconds"] = found[kind]["flops"] / point.processes / (HERE["speed"] * reached)
    return found


def cost(axes: Mapping[str, Sequence[Point]], repeats: int) -> list[dict[str, Any]]:
    """The rows of the table: every point by kind, then an exponent of seconds and of memory for every axis and kind."""
    points = dict.fromkeys(point for axis in axes.values() for point in axis)
    HERE["speed"] = matmul_flops()
    with tempfile.TemporaryDirectory() as place:
        sizes = {width: save_policy(Path(place, f"llama {width}"), width) for width in {p.width for p in points}}
        runs = [{point: measure(Path(place, f"llama {point.width}"), point) for point in points} for _ in range(repeats)]
    rows: list[dict[str, Any]] = []
    for axis, along in axes.items():
        values = [sizes[point.width] if axis == "width" else getattr(point, axis) for point in along]
        for kind in KINDS:
            of = {key: np.array([[run[point][kind][key] for point in along] for run in runs]) for key in runs[0][along[0]][kind]}
            middle = {key: np.median(table, axis=0).tolist() for key, table in of.items()}
            spread = np.stack([of["seconds"].min(0), of["seconds"].max(0)], 1).tolist()
            rows += [
                {"part": "cost", "axis": axis, "value": value, "kind": kind, "spread": spread[i], **{key: each[i] for key, each in middle.items()}}
                for i, value in enumerate(values)
            ]  # fmt: skip
            about = {"part": "exponent", "axis": axis, "kind": kind}
            rows += [{**about, "of": key, **exponent(values, of[key], of[plan])} for key, plan in QUANTITIES.items()]
    return rows


def exponent(values: Sequence[float], found_R_V: np.ndarray, planned_R_V: np.ndarray) -> dict[str, Any]:
    """The slope of log y on log x in every repeat: median and range, and the median slope of what is planned."""
    own, planned = (np.polyfit(np.log(values), np.log(table).T, 1)[0] for table in (found_R_V, planned_R_V))
    return {"exponent": float(np.median(own)), "spread": [float(own.min()), float(own.max())], "planned": float(np.median(planned))}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Points, then exponents."""
    for r in (r for r in rows if r["part"] == "cost"):
        low, high = r["spread"]
        print(f"{r['axis']:9} {r['value']:9,} {r['kind']:8} {r['seconds']:7.2f} s ({low:.2f} to {high:.2f}), planned {r['planned_seconds']:7.2f}; {r['tokens']:9,.0f} tokens, "
              f"{r['flops'] / 1e9:8.1f} GFLOP; peak {r['peak_mib']:5.0f} MiB, own {r['own_mib']:5.0f}, planned {r['planned_mib']:5.0f}")  # fmt: skip
    for r in (r for r in rows if r["part"] == "exponent"):
        low, high = r["spread"]
        print(f"exponent in {r['axis']:9} of {r['kind']:8} {r['of']:8} {r['exponent']:6.2f} ({low:.2f} to {high:.2f}), planned {r['planned']:5.2f}", flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small points and one small cell, about a minute")
    parser.add_argument("--only", choices=("cost", "chain"), help="one part only")
    parser.add_argument("--repeats", type=int, help="how often each point is measured: 3, --quick 1")
    parser.add_argument("--seeds", default="100", help="of the cells: 100..102, or 100,101")
    parser.add_argument("--cells", type=Path, help="where cells are kept, and found, such as runs/arena/cells")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "IRLIGN_QUIET": "1", "TRANSFORMERS_VERBOSITY": "error"}  # for the processes that start
    torch.set_num_threads(1)
    quiet()
    load, rows = os.getloadavg()[0], []
    print(f"one thread a process; load average before the start {load:.2f}", flush=True)
    if given.only != "chain":
        rows += cost(QUICK if given.quick else AXES, given.repeats or (1 if given.quick else 3))
        show(rows)
    if given.only != "cost":
        rows += chain(given.cells, parse_seeds(given.seeds), given.quick)
    if given.json:
        given.json.write_text(json.dumps({"load": load, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

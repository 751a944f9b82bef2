"""irlign's decode loop in several processes, as `sampling.num_workers` has it: what each of them loads, and a share of the prompts as a shard."""

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sampling
import torch

from irlign.sampling.processes import Processes

Prompts = list[tuple[int, ...]]


def load(shape: str, lengths: str, dtype: str, told: Any) -> tuple[Callable[[Prompts], list[int]], Any]:
    """In a process: the model, and what draws the answers to some prompts."""
    return partial(sampling.irlign, sampling.make_model(shape, lengths, getattr(torch, dtype))), told


def runner(shape: str, lengths: str, dtype: str, count: int, until: contextlib.ExitStack) -> Callable[[Prompts], tuple[float, list[int]]]:
    """Seconds and useful lengths of prompts that are dealt out to so many processes of one thread; they have loaded before the clock starts."""
    os.environ.update(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    workers = until.enter_context(Processes(count, partial(load, shape, lengths, dtype), "sampling"))

    def run(prompts: Prompts) -> tuple[float, list[int]]:
        start = time.perf_counter()
        found = dict(workers.work({number: prompts[number::count] for number in range(count) if prompts[number::count]}))
        return time.perf_counter() - start, [n for number in sorted(found) for n in found[number]]

    return run

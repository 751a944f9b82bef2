"""Peak memory against the number of samples: a pool is drawn, counted, scored and selected from, part by part.

    python benchmarks/flat_memory.py [--quick] [--json FILE]

The engine is a stand-in that answers at once with 2 to 9 words; everything else is what a run uses: `draw_pool` with its seeds, parts and
statistics, `pool_parts`, candidate rows under the reward `length`, `select`. 64 samples a prompt, 64 prompts a part, each size in a process of its
own. `whole` is what the stage `bon` does instead (up to 100,000): all samples of dev and test prompts and their candidate rows at once. Rows:
`{what, samples, peak_mib, seconds}`; `peak_mib` counts the process with its libraries, before anything is drawn in the row `start`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.machine import peak_memory_mib
from irlign.optimise.best_of_n import candidate_rows, scored_text, select
from irlign.records import Prompt, Sample
from irlign.reward.controls import length
from irlign.sampling import pools
from irlign.sampling.engine import Request, SamplingSettings
from irlign.sampling.pools import draw_pool, pool_parts, read_pool

SIZES, QUICK = (10_000, 100_000, 1_000_000), (10_000, 50_000)
EACH, WHOLE = 64, 100_000  # samples a prompt; the most for `whole`
WORDS = ("so", "then", "we", "went", "home", "and", "slept", "well")


class Ready:
    """An `Engine` that needs no model."""

    name, settled, halvings, usage = "ready", {"dtype": "none"}, 0, dict[str, float]()

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        return [self._sample(r.prompt, i, seed) for r in requests for i, seed in enumerate(r.seeds)]

    def _sample(self, prompt: Prompt, index: int, seed: int) -> Sample:
        words = [WORDS[seed >> 3 * k & 7] for k in range(2 + seed % 8)]
        return Sample(prompt, index, " ".join(words), "eos", len(words) + 1, -float(len(words)))


def in_parts(samples: int, folder: Path) -> int:
    """Draw, count, score and select; returns the number of selected answers."""
    pools.load_engine = lambda *_: Ready()  # type: ignore[assignment, return-value]
    wanted = [(Prompt.of(f"question {i}", "test"), EACH) for i in range(samples // EACH)]
    settings = SamplingSettings(part_prompts=64)
    statistics = draw_pool(folder / "no policy", wanted, settings, chat_template="none", folder=folder / "pool", seed=1, name="sft")
    assert statistics["samples"] == EACH * len(wanted) and statistics["prompts"] == len(wanted)
    selected = 0
    for number, part in enumerate(pool_parts(folder / "pool")):
        rows = scored(part)
        pools.write_table(folder / f"candidates/part-{number:05d}.parquet", rows)
        selected += len(select(rows, "length", EACH))
    return selected


def at_once(folder: Path) -> int:
    """The same from the stored pool with all rows in memory."""
    return len(select(scored(read_pool(folder / "pool")), "length", EACH))


def scored(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    texts = [scored_text(s) for s in samples]
    return candidate_rows(samples, {"length": length([s.prompt.content for s in samples], texts)})


def measure(what: str, samples: int, folder: Path) -> dict[str, Any]:
    """One row, in this process."""
    started = time.perf_counter()
    if what != "start":
        found = in_parts(samples, folder) if what == "parts" else at_once(folder)
        assert found == samples // EACH
    return {"what": what, "samples": samples, "peak_mib": peak_memory_mib(), "seconds": round(time.perf_counter() - started, 1)}


def table(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Every row, each from a process of its own."""
    rows = [_apart("start", 0, Path())]
    for samples in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_apart("parts", samples, Path(folder)))
            if samples <= WHOLE:
                rows.append(_apart("whole", samples, Path(folder)))
    return rows


def _apart(what: str, samples: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, str(samples), str(folder)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['what']:>6} {row['samples']:>10,} samples {row['peak_mib']:>8.1f} MiB {row['seconds']:>7.1f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), Path(given.one[2]))))
    else:
        found = table(QUICK if given.quick else SIZES)
        print("\n".join(map(_line, found)))
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")

"""The second part of scaling.py: the whole chain beside a preference reward with Best-of-n and DPO, measured by the arena in the same run.

The cells are those of `irlign arena labels` with no label flipped: the dialogue world at three widths. `irlign run` is SFT, both pools, the Init-SFT
reward and Best-of-n by the judge; `preference (labels)` a Bradley-Terry reward on labels with the same Best-of-n; DPO has the same labels. pi_0
is given. Pools are drawn for the largest n; a method is charged for the share of their tokens that its own n needs, and for scoring whole pools. FLOPs are the cost model's for the tokens counted (reading the prompts to draw from, 2 % of them, is left out). As many
cells as the machine has cores run at a time, one thread each. Golden: the test answers, 95 % interval over seeds and prompts, of one seed over
prompts alone. Cells that the arena has finished are read, not measured again.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.arena.cell import Cell, Place
from irlign.arena.leaderboard import CellResult, Measured, rows_named, run_cells
from irlign.arena.methods import CHOSEN, LIKELIHOODS, METHODS, Pick
from irlign.arena.studies import STUDIES
from irlign.costs import Shape
from irlign.optimise.preference import need_trl
from irlign.runs import Run
from irlign.sizes import Sizes, world_sizes
from irlign.statistics import nested_estimate

ROWS, GIVEN = f"{CHOSEN},preference (labels),DPO (labels)", "initial policy"
QUICK = {"as": "quick", "world.name": "dialogue", "pretrain.hidden_size": 48, "pretrain.num_train_epochs": 1, "sft.num_train_epochs": 2, "reward.num_train_epochs": 1}  # fmt: skip


def chain(root: Path | None, seeds: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """The rows of the table, printed as they are known: a method at a size each, means over the seeds, the most memory of any."""
    need_trl()
    settings = [QUICK] if quick else STUDIES["labels"].settings
    with tempfile.TemporaryDirectory() as place:
        places = [Place(str(root or place), tuple(setting.items()), seed, quick) for setting in settings for seed in seeds]
        found = run_cells(places[::-1], rows_named(ROWS), os.cpu_count() or 1)[::-1]  # the largest first
        costs = [costs_of(where, cell) for where, cell in zip(places, found, strict=True)]
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(cell.setting for cell in found):
        own = [i for i, cell in enumerate(found) if cell.setting == name]
        for method in costs[own[0]]:
            golden = nested_estimate([found[i].methods[method].chosen_P for i in own], resamples=2000)
            of = {key: [costs[i][method][key] for i in own] for key in costs[own[0]][method]}
            row = {key: float(max(each) if key == "peak_mib" else np.mean(each)) for key, each in of.items()}
            rows.append({"part": "chain", "setting": name, "method": method, **row, "golden": golden.to_json()})
            show(rows[-1])
    return rows


def show(r: Mapping[str, Any]) -> None:
    low, high = r["golden"]["ci95"]
    print(f"{r['setting']:33} {r['parameters']:9,.0f} {r['method']:20} {r['seconds']:6.1f} s; {r['drawn']:9,.0f} drawn + {r['trained']:9,.0f} trained, {r['flops'] / 1e12:5.2f} TFLOP; "
          f"peak {r['peak_mib']:5.0f} MiB; golden {r['golden']['mean']:6.3f} [{low:.3f}, {high:.3f}]", flush=True)  # fmt: skip


def costs_of(place: Place, result: CellResult) -> dict[str, dict[str, float]]:
    """What each method of a finished cell cost; pi_0 costs nothing."""
    recipe = place.recipe()
    sizes, shape = world_sizes(recipe)
    with Run.open(recipe.output_dir, recipe) as run:
        cell = Cell(recipe, run)
        return {name: _cost(cell, METHODS[name](cell), of, sizes, shape) for name, of in result.methods.items() if name != GIVEN}


def _cost(cell: Cell, pick: Pick, of: Measured, sizes: Sizes, shape: Shape) -> dict[str, float]:
    """Seconds, tokens, FLOPs and memory of one method in one cell, from the cell's manifest and pools."""
    own = pick.pool not in ("init", "sft")  # its test answers are drawn in a stage of its own, from train answers alone
    pools = sum(map(cell.tokens, ("train", "dev", "test")))
    shared = (cell.tokens("train") if own else of.tokens) / pools
    stages = [stage for stage in pick.stages if stage != "sample"]
    trained = {stage: cell.run.stages[stage]["notes"].get("tokens") or 0 for stage in stages}
    return {
        "parameters": shape.parameters,
        "seconds": cell.seconds(stages) + shared * cell.seconds(["sample"]),
        "drawn": of.tokens,
        "trained": sum(trained.values()),
        "flops": flops(shape, sizes.prompt, sizes.answer, of.tokens, trained, len(cell.pool)),
        "peak_mib": cell.memory([*stages, "sample"]),
    }


def flops(shape: Shape, prompt: float, answer: float, drawn: float, trained: Mapping[str, int], answers: int) -> float:
    """Operations by the cost model: tokens drawn, tokens trained on by stage, and a pool of so many answers read by what scores it. DPO reads what it
    trains on once more, with its reference."""
    length = prompt + answer
    total = shape.forward(drawn, prompt + answer / 2)
    for stage, tokens in trained.items():
        reward = stage.startswith("reward-")
        total += (4 if "dpo" in stage else 3) * shape.forward(tokens, length / 2, not reward)
        passes = 2 if stage == LIKELIHOODS else int(reward)
        total += passes * shape.read(answers, length, not reward)
    return total

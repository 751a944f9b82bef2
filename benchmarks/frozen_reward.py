"""A frozen reward under on-policy training beside one that is refreshed before every round: what each does to answers and to the truth.

    python benchmarks/frozen_reward.py runs/frozen [--seeds 0..2] [--rounds 3] [--json FILE] [key=value ...]

The dialogue world with a demonstrator in a style of its own; rloo with neither KL nor length control. Both arms share the first round, take the
same steps with the same seeds, and each round goes on from the one before; in one arm it does so under the reward of the first round
(`frozen`), in the other under `optimise.refresh`. Alarms end no round here, but the table says where the safety net would have. Golden rewards
are read on the test prompts and decide nothing; the judge is that of the held-out demonstrations. Rounds that are there already are kept.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from irlign import __version__, pipeline
from irlign.config import parse_seeds
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, read_table, write_json
from irlign.optimise.align import improve, judged_sft, measures_of_sft, weighed
from irlign.optimise.methods import METHODS, own_config
from irlign.optimise.work import SEEDS_APART, Work
from irlign.recipe import as_recipe
from irlign.records import Demonstration, Sample
from irlign.runs import Run
from irlign.sampling.pools import read_pool, stored_samples
from irlign.statistics import nested_estimate

RECIPE: dict[str, Any] = {
    "world": {"name": "dialogue", "heterogeneity": 1.0, "test_prompts": 60},
    "pretrain": {"learning_rate": 4e-3, "num_train_epochs": 3},
    "sft": {"learning_rate": 3e-4, "num_train_epochs": 4, "per_device_train_batch_size": 16},
    "sampling": {"num_generations": 4, "train_generations": 4, "initial_generations": 4, "max_new_tokens": 128, "max_cut_share": 1.0},
    "reward": {
        "contrast": "init-demo",
        "learning_rate": 5e-4,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "log_ratio": False,
        "ending": "keep",
        "max_leak_accuracy": 1.0,
    },
    "best_of_n": {"likelihood": 0.0},
    "optimise": {
        "method": "rloo",
        "refresh": "current-demo",
        "replay": False,  # the usual discriminator: against the current policy alone
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "max_steps": 4,
        "generations": 2,
        "keep_checkpoints": [],
        "on_policy": {"beta": 0.0, "length_penalty": 0.0, "num_generations": 4, "max_length_ratio": None},
    },
}
ARMS, MEASURES = ("frozen", "refreshed"), ("golden", "tokens", "finished", "judged")


def step(work: Work, number: int, shown: Sequence[Demonstration], arm: str) -> None:
    """One round of an arm; a round that is there already is kept."""
    place = work.round(number)
    if (place / "log.json").exists():
        return
    if arm == "refreshed" or number == 1:
        improve(work, number, shown, __version__)
        return
    method, frozen = METHODS[work.settings.method], replace(work, settings=work.settings.model_copy(update={"refresh": "none"}))
    options = {**method.options(frozen, number), "config": own_config(work.settings, work.sampling), "chat_template": work.chat_template}
    options |= {"folder": place / "policy", "checkpoints": place / "checkpoints", "seed": work.run.seed + SEEDS_APART * (number - 1)}
    rows = method.rows(frozen, number)
    write_json(place / "log.json", method.train(work.policy(number - 1), rows, shown, work.settings, report_to="none", **options))


def measures(golden: Any, samples: Sequence[Sample], judged_P: np.ndarray, alarms: Sequence[str]) -> dict[str, Any]:
    """What the table shows of one policy: on each test prompt the golden reward, the tokens and the share finished; on each dev prompt the judged gain."""
    of: dict[str, list[tuple[float, float, float]]] = {}
    for s in samples:
        value = float(golden([s.prompt.content], [s.completion])[0])
        of.setdefault(s.prompt.prompt_id, []).append((value, float(s.tokens), float(s.finished)))
    means = np.array([np.mean(values, axis=0) for values in of.values()])
    return {**dict(zip(MEASURES[:3], means.T.tolist(), strict=True)), "judged": judged_P.tolist(), "alarms": list(alarms)}


def study(root: Path, seed: int, rounds: int, overrides: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Both arms of one seed: for each the measures of pi_SFT (round 0) and of every round."""
    given = [*overrides, f"optimise.rounds={rounds}", f"seed={seed}", f"output_dir={root / f'seed-{seed}'}"]
    recipe = as_recipe(RECIPE, given)
    with Run.open(recipe.output_dir, recipe) as run:
        for stage in (pipeline.init, pipeline.data, pipeline.sft, pipeline.sample, pipeline.reward, pipeline.bon):
            stage(recipe, run)
        golden, shown = recipe.world.golden, stored_demonstrations(run, "dev")  # type: ignore[union-attr]
        rows = [row for row in read_table(run.path("best_of_n/candidates.parquet")) if row["split"] == "dev"]
        sft = judged_sft(rows, recipe.reward.name)
        pool = stored_samples(run, "sft", "dev", "test")
        wanted = [(p, recipe.optimise.generations) for p in {s.prompt.prompt_id: s.prompt for s in pool}.values()]
        start = measures(golden, [s for s in pool if s.prompt.split == "test"], np.zeros(len(shown)), [])
        of_run = recipe.optimise, recipe.sampling, recipe.reward.name, recipe.data.chat_template
        arms = {arm: Work(run, *of_run, run.path("arms", arm), learning=recipe.reward) for arm in ARMS}
        base = measures_of_sft(arms[ARMS[0]], sft)
        found: dict[str, list[dict[str, Any]]] = {}
        for arm, work in arms.items():
            found[arm] = [start]
            for number in range(1, rounds + 1):
                if number == 1 and arm != ARMS[0] and not work.round(1).exists():
                    shutil.copytree(run.path("arms", ARMS[0], "rounds/1"), work.round(1))
                step(work, number, shown, arm)
                drawn = work.draw(number, "pool", wanted)
                own = weighed(work, work.made(number)[-1], [s for s in drawn if s.prompt.split == "dev"], sft, base, shown, [])
                alarms = [alarm["name"] for alarm in own.about["alarms"]]
                test = [s for s in read_pool(work.round(number) / "pool.parquet") if s.prompt.split == "test"]
                told = read_json(work.round(number) / "log.json").get("reward", {}).get("dev")
                found[arm].append({**measures(golden, test, own.gains_P, alarms), "told_apart": told and told["accuracy"]})
                print(f"seed {seed} {arm} round {number}: " + ", ".join(f"{k} {np.mean(found[arm][-1][k]):.2f}" for k in MEASURES),
                      f"told apart {found[arm][-1]['told_apart']}", alarms, flush=True)  # fmt: skip
    return found


def table(seeds: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Markdown: a row for each arm and round, means over seeds with prompts nested and their 95 % intervals, and in how many seeds an alarm."""
    lines = ["| round | reward | golden | tokens | finished | judged gain, sd | alarm in |", "|---|---|---|---|---|---|---|"]
    for number in range(len(next(iter(seeds.values()))[ARMS[0]])):
        for arm in ARMS if number > 1 else ARMS[:1]:
            of = [arms[arm][number] for arms in seeds.values()]
            cells = [nested_estimate([one[key] for one in of]) for key in MEASURES]
            shapes = (".2f", ".0f", ".0%", "+.2f")
            texts = [f"{c.mean:{f}} [{c.ci95[0]:{f}}, {c.ci95[1]:{f}}]" for c, f in zip(cells, shapes, strict=True)]
            name = "SFT" if number == 0 else "both" if number == 1 else arm
            lines.append(f"| {number} | {name} | {' | '.join(texts)} | {sum(bool(one['alarms']) for one in of)} of {len(of)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="run directories are made below it, seed-K")
    parser.add_argument("--seeds", default="0..2", help="0..2, or 0,3,5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every value here")
    parser.add_argument("overrides", nargs="*", help="keys of the recipe, such as reward.ending=keep")
    given = parser.parse_intermixed_args(arguments)  # overrides after options
    found = {seed: study(given.root, seed, given.rounds, given.overrides) for seed in parse_seeds(given.seeds)}
    print("\n".join(table(found)))
    if given.json:
        given.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

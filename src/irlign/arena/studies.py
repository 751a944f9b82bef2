"""Each study as data: the settings of its cells, its seeds, and the methods that it compares. One command each: `irlign arena NAME`."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irlign.arena.cell import Place, Setting, golden_of
from irlign.arena.hours import expected_seconds
from irlign.arena.leaderboard import leaderboard, rows_named
from irlign.arena.methods import CHOSEN
from irlign.arena.policies import OF, POLICIES, with_method
from irlign.config import parse_seeds
from irlign.errors import ConfigError
from irlign.optimise.preference import need_trl
from irlign.preflight import check_method, preflight
from irlign.progress import clock, say

CONTRASTS = f"{CHOSEN},init-sft,init-sft+likelihood,init-demo,sft-demo,likelihood,log-ratio,control: length"
QUICK_SEEDS = "100..101"


@dataclass(frozen=True)
class Study:
    """What is compared (`rows`, patterns as in --rows, None: everything) in which settings, on which seeds."""

    settings: Sequence[Setting]
    seeds: str
    rows: str | None
    about: str


def dial(world: str, key: str, values: Sequence[Any], **fixed: Any) -> list[Setting]:
    """One setting for each value of a dotted recipe key."""
    return [{"world.name": world, **fixed, key: value} for value in values]


WORLDS = ("dialogue", "arithmetic", "errands")
OVER_OPTIMISED: Setting = {  # few demonstrations in a style of their own, a reward trained hard, a long curve
    "as": "over-optimised",
    "world.name": "dialogue",
    "world.heterogeneity": 1.0,
    "world.demonstrations": 100,
    "sft.num_train_epochs": 10,
    "sampling.train_generations": 2,
    "sampling.num_generations": 64,
    "reward.learning_rate": 3e-3,
    "reward.num_train_epochs": 8,
}
LABELS = f"{CHOSEN},init-sft,likelihood,preference*,init-sft with preference (labels),DPO (labels*"
STUDIES: Mapping[str, Study] = {
    "reference": Study(
        [setting for world in WORLDS[:2] for setting in dial(world, "world.heterogeneity", (0.0, 1.0))],
        "0..9",
        "SFT on all tokens,irlign run,init-sft,init-sft+likelihood,init-demo*,sft-demo,three*,features logistic,likelihood,log-ratio*,control*",
        "the leaderboard: two worlds, the demonstrator in pi_0's style and in one of its own",
    ),
    "policies": Study(
        [setting for world in WORLDS[:2] for setting in dial(world, "world.heterogeneity", (0.0, 1.0))],
        "0..9",
        f"{CHOSEN},{OF}*,DPO (labels)",
        "what each policy method publishes, at one answer a prompt",
    ),
    "stopping": Study(
        [setting for world in WORLDS[:2] for setting in dial(world, "world.heterogeneity", (0.0, 1.0))] + [OVER_OPTIMISED],
        "100..104",
        f"{CHOSEN},* by *",
        "ways to choose n without labels, on development seeds",
    ),
    "heterogeneity": Study(
        dial("dialogue", "world.heterogeneity", (0.0, 0.25, 0.5, 0.75, 1.0)),
        "0..4",
        CONTRASTS,
        "does init-sft resist where init-demo and sft-demo are hacked?",
    ),
    "quality": Study(dial("dialogue", "world.quality", (1.0, 0.75, 0.5, 0.25)), "0..4", CONTRASTS, "degraded demonstrations"),
    "count": Study(
        dial("dialogue", "world.demonstrations", (25, 100, 400, 2000)),
        "0..4",
        CONTRASTS,
        "how many demonstrations to train on; 60 more are held out for the judge each time",
    ),
    "diversity": Study(dial("dialogue", "world.skeletons", (10, 40, 160, None)), "0..4", CONTRASTS, "how many kinds of request"),
    "out-of-distribution": Study(
        [setting for world in WORLDS for setting in dial(world, "world.out_of_distribution", (False, True))],
        "0..4",
        CONTRASTS,
        "test prompts of kinds that no demonstration has",
    ),
    "ensembles": Study(
        dial("dialogue", "world.demonstrations", (100, 400)),
        "0..4",
        "init-sft*,three*,preference (labels)",
        "members of one contrast, of several, and with a preference reward",
    ),
    "labels": Study(
        dial("dialogue", "pretrain.hidden_size", (48, 96, 160)),
        "0..4",
        LABELS,
        "preferences with 0 to 40 % of the labels flipped, three sizes",
    ),
    "sft-distance": Study(
        dial("dialogue", "sft.num_train_epochs", (0.25, 1, 4, 16, 64)), "0..4", CONTRASTS, "pi_SFT from barely moved to memorised"
    ),
}


def run_study(
    name: str,
    root: Path,
    *,
    seeds: str | None = None,
    rows: str | None = None,
    only: str | None = None,
    quick: bool = False,
    jobs: int | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Run a study into ROOT and return what to print; `only` is a pattern of setting names. With `config` the cells are that recipe with
    `overrides`, one for each seed, and the study is called after the file. Raises ConfigError on an unknown study, method, setting or seed.
    """
    if config and quick:
        raise ConfigError("--quick has small cells of its own, and the recipe says what to run", where="arena", do="leave one of them out")
    if config:
        pairs = dict(text.split("=", 1) for text in overrides if "=" in text)
        name, study = Path(config).stem, Study([pairs], "0..4", CONTRASTS, f"one's own data, by the recipe {config}")
    elif overrides:
        raise ConfigError(f"the cells of a study are its own, so {overrides[0]!r} has no place", where="arena", do="give --config RECIPE")
    elif name not in STUDIES:
        raise ConfigError(f"no study is called {name!r}", where="arena", do=f"known: {', '.join(STUDIES)}")
    else:
        study = STUDIES[name]
    methods, jobs = rows_named(rows or study.rows), jobs or os.cpu_count() or 1
    cells = str(root / ("quick" if quick else "cells"))
    numbers = parse_seeds(seeds or (QUICK_SEEDS if quick else study.seeds))
    places = [Place(cells, tuple(setting.items()), seed, quick, config) for setting in study.settings for seed in numbers]
    known = list(dict.fromkeys(place.name for place in places))
    places = [place for place in places if fnmatch.fnmatch(place.name, only or "*")]
    if not places:
        raise ConfigError(f"no setting is called {only!r}", where="--only", do=f"known: {'; '.join(known)}")
    for place in places:
        preflight(recipe := place.recipe())  # a mistake is found before any compute
        golden_of(recipe)
    say(f"arena: {name}, {study.about}: {len(places)} cells x {len(methods)} methods, {jobs} at a time")
    if any(row.startswith("DPO") for row in methods):
        need_trl()
    if policies := [row for row in methods if row in POLICIES]:
        for row in policies:
            check_method(with_method(places[0].recipe(), row.removeprefix(OF)))
        say(
            f"arena: about {clock(expected_seconds(places, policies) / jobs)} (h:mm:ss), by what finished cells took, or else by `irlign plan`"
        )
    found = leaderboard(places, methods, jobs, root, f"{name}-quick" if quick else name)
    return [*found["headline"], f"{root / found['title']}.html"]

"""What a run directory serves: which policy, at which n, by which reward, with which alarms; all of it in memory before the first request."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irlign.config import load_recipe
from irlign.errors import ConfigError, RunError
from irlign.files import read_json, read_table
from irlign.optimise.label_free import guard_n
from irlign.recipe import Recipe, as_recipe
from irlign.records import Demonstration
from irlign.reward.load import load_resident
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings, load_engine
from irlign.serving.answers import Answerer, Served

POLICIES = ("aligned", "best-of-n")
RETRIES = 2  # further attempts at an upstream: a client waits, and tries again itself


@dataclass(frozen=True)
class Wanted:
    """What the command line says of it; None is the run's own choice."""

    policy: str | None = None
    n: int | None = None
    name: str | None = None
    upstream: str | None = None
    upstream_model: str | None = None
    force: bool = False


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Torch computes on one core inside. A thread that computes on several keeps helpers of its own from then on; those of a thread that only
    loads would contend for the cores with those of the thread that draws (a third of its speed on two cores)."""
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def load_answerer(root: str | Path, wanted: Wanted = Wanted()) -> Answerer:
    """The answerer of the run in a folder. Raises RunError where the run lacks what is to be served, ConfigError for what it cannot serve."""
    run = Run.read(root)
    recipe = as_recipe({**run.recipe, "seeds": None})
    served = what_is_served(run, recipe, wanted)
    run.check("policies", "rewards")
    with one_core():
        engine = load_engine(run.path("policies", served.policy), served.sampling, recipe.data.chat_template)
        answerer = Answerer(served, engine, load_resident(run.path("rewards", served.reward)))
        for row in read_table(run.path("data/dev.parquet"))[:1]:  # brings the reward's networks into memory, and shows that it can score
            shown = Demonstration.from_row(row)
            answerer.reward.score([shown.prompt.content], [shown.completion])
    return answerer


def what_is_served(run: Run, recipe: Recipe, wanted: Wanted) -> Served:
    """By default the aligned policy where one was published that is not pi_SFT, else Best-of-N. Reads records only; errors as above."""
    _complete(run, "bon")
    choice = read_json(run.path("best_of_n/choice.json"))
    policy = wanted.policy or _published(run, wanted)
    if policy not in POLICIES:
        raise ConfigError(f"no policy {policy!r}", where="--policy", do=f"use {' or '.join(POLICIES)}")
    if policy == "aligned":
        _complete(run, "optimise")
        if not run.path("policies/aligned").is_dir():
            raise RunError("this run has no aligned policy", where=run.root, do="say --policy best-of-n")
        if wanted.n is not None and wanted.n > 1 and not wanted.force:
            what = "Best-of-N was judged with answers of the SFT policy, not of the aligned one"
            raise ConfigError(what, where="--n", do="say --policy best-of-n, or --force")
    else:
        choice = {**choice, "given": wanted.n or choice["given"], "n": wanted.n or choice["n"]}
        guard_n(choice, wanted.force)
    best_of = choice["n"] if policy == "best-of-n" else wanted.n or 1
    rows = read_table(run.path("data/dev.parquet")) or read_table(run.path("data/train.parquet"))
    about: dict[str, Any] = {"choice": choice, "alarms": _alarms(run), "reward": choice["reward"], "force": wanted.force}
    side = "aligned" if policy == "aligned" else "sft"
    about |= {"sampling": _sampling(recipe.sampling, side, wanted), "lone_text": not any(row["conversational"] for row in rows)}
    return Served(wanted.name or policy, side, best_of, **about)


def _published(run: Run, wanted: Wanted) -> str:
    """The default: what the stage `optimise` published, unless it is pi_SFT or answers come from elsewhere."""
    if wanted.upstream or wanted.n:
        return "best-of-n"
    _complete(run, "optimise")
    choice = run.path("optimise/choice.json")
    return "aligned" if choice.is_file() and read_json(choice)["published"] != "sft" else "best-of-n"


def _complete(run: Run, stage: str) -> None:
    """Raises RunError where a stage that is needed has not run to its end."""
    status = run.stages.get(stage, {}).get("status", "not there yet")
    if status != "complete":
        beside = ", or say --policy best-of-n to serve without it" if stage == "optimise" else ""
        raise RunError(f"the stage {stage} is {status}, so there is nothing to serve", where=run.root, do=f"irlign run {run.root}{beside}")


def _alarms(run: Run) -> list[dict[str, str]]:
    """The alarms of the run's evaluation; one more where there was none."""
    if run.stages.get("eval", {}).get("status") != "complete":
        return [{"name": "not evaluated", "seen": "the stage eval has not run", "do": f"irlign eval {run.root}"}]
    return list(read_json(run.path("evaluation/results.json"))["alarms"])


def _sampling(own: SamplingSettings, side: str, wanted: Wanted) -> SamplingSettings:
    """The run's law of drawing, in process or at the upstream, under whose name for the policy the run's settings know it unless another is given."""
    own = own.model_copy(update={"num_workers": 1})  # one process serves
    if wanted.upstream is None:
        if wanted.upstream_model:
            raise ConfigError("there is no upstream for this model", where="--upstream-model", do="say --upstream http://HOST:PORT/v1 too")
        return own.here.by_weights
    if not wanted.upstream_model and side not in own.openai.policies:
        raise ConfigError(f"which model at the upstream is {side}?", where="--upstream-model", do="give its name there")
    model = wanted.upstream_model or own.openai.policies[side].model
    there = {"base_url": wanted.upstream, "policies": {side: model}, "max_retries": min(RETRIES, own.openai.max_retries)}
    settings = {**own.model_dump(mode="json"), "engine": "openai", "openai": {**own.openai.model_dump(mode="json"), **there}}
    return load_recipe(SamplingSettings, settings)

"""`irlign plan`: what a run will cost, before any compute, as a table of its stages (stage_costs.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.costs import SAMPLING, SCORING, TRAINING, Shape, Speed
from irlign.errors import ConfigError
from irlign.machine import has_cuda
from irlign.optimise.label_free import without_judge
from irlign.progress import clock
from irlign.recipe import Recipe, as_recipe, stored_recipe
from irlign.sizes import Sizes, assumed_sizes, file_sizes, measured_speed, shape_of, world_sizes
from irlign.stage_costs import Stage, answer_length, stages

HEAD = ("stage", "generated", "trained", "read", "FLOPs", "time", "memory", "disk", "share")
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan(
    config: str | Path | Mapping[str, Any] | Recipe | None,
    overrides: Sequence[str] = (),
    *,
    flops: float | None = None,
    prompts: int | None = None,
    prompt_tokens: float | None = None,
    answer_tokens: float | None = None,
) -> str:
    """The table for a recipe. `flops` stands in for the measured speed (operations a second), `prompts` with their mean tokens and
    those of an answer for the data file. Raises ConfigError, DataError or ModelError where something it reads is wrong.
    """
    recipe = as_recipe(config if config is not None else stored_recipe(overrides), overrides)
    given = (prompts, prompt_tokens, answer_tokens)
    if any(given) and not all(given):
        raise ConfigError("sizes are given together", where="irlign plan", do="give --prompts, --prompt-tokens and --answer-tokens")
    return render(*_planned(recipe, flops, given), measured=flops is None)


def planned(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe and what they will cost on this machine. Raises as `plan` does."""
    return _planned(recipe, None, (None, None, None))[0]


def _planned(recipe: Recipe, flops: float | None, given: tuple[Any, Any, Any]) -> tuple[list[Stage], Recipe, Sizes, Shape, Speed]:
    if recipe.pools is not None:
        what = "the samples are given, and no policy is trained: only the reward reads and learns"
        raise ConfigError(what, where="pools", do="`irlign validate` says what the files hold")
    if recipe.world is not None:
        sizes, shape = world_sizes(recipe)
    else:
        shape = shape_of(str(recipe.model_name_or_path), flops is None and has_cuda())
        sizes = assumed_sizes(recipe, *given) if all(given) else file_sizes(recipe)
    own = recipe.reward.backbone in ("sft", "init", "words")  # words cost next to nothing
    speed = Speed(flops, flops) if flops else measured_speed(shape.parameters)
    return stages(recipe, sizes, shape, shape if own else shape_of(recipe.reward.backbone), speed), recipe, sizes, shape, speed


def render(table: Sequence[Stage], recipe: Recipe, sizes: Sizes, shape: Shape, speed: Speed, *, measured: bool) -> str:
    """The stages and their total as columns, and below them what the figures rest on."""
    sums = {key: sum(getattr(s, key) or 0.0 for s in table) for key in ("generated", "trained", "read", "flops", "seconds", "disk")}
    total = Stage("total", memory=max(s.memory for s in table), **sums)
    lines = [HEAD, *(_cells(s, sums["seconds"]) for s in [*table, total])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    p, sample = sizes.prompts, next(s for s in table if s.name == "sample")
    text += [
        "",
        f"{p['train']:,} train, {p['dev']:,} dev, {p['test']:,} test prompts of {sizes.prompt:.0f} tokens, answers of {answer_length(recipe, sizes):.0f}; "
        f"{short(shape.parameters)} parameters",
        f"{short(speed.full)} FLOP/s in float32, {short(speed.half)} in the precision that pays ({'measured now' if measured else 'given'}); "
        f"of that training is taken to reach {TRAINING:.0%}, sampling {SAMPLING:.0%}, scoring {SCORING:.0%} (docs/scale.md)",
    ]
    if sample.seconds is None:
        cost = recipe.sampling.openai.cost(int(sample.read), int(sample.generated))
        text.append(f"sample runs at the endpoint: {'price_in and price_out would say its cost' if cost is None else f'cost {cost:,.2f}'}")
    if recipe.world is None and (line := without_judge(min(sizes.rows["dev"], p["dev"]))):
        text.append(line)
    return "\n".join(text + ([f"for each of {len(recipe.seeds)} seeds"] if recipe.seeds else []))


def _cells(s: Stage, seconds: float) -> tuple[str, ...]:
    took = "-" if s.seconds is None else clock(s.seconds) if s.seconds >= 60 else f"{s.seconds:.1f} s"
    share = "-" if s.seconds is None or not seconds else f"{s.seconds / seconds:.0%}"
    numbers = [short(value) if value else "-" for value in (s.generated, s.trained, s.read, s.flops)]
    return (s.name, *numbers, took, f"{short(s.memory)}B", f"{short(s.disk)}B" if s.disk else "-", share)


def short(value: float) -> str:
    """A count in three digits: 950, 1.24 k, 12.4 M, 3.5 G."""
    size = 0
    while value >= 999.5 and size < len(PREFIXES) - 1:
        value, size = value / 1000, size + 1
    digits = 0 if not size or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {PREFIXES[size]}".rstrip()

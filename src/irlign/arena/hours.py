"""How long the policy rows of a study will take, before any of it is computed."""

from collections.abc import Iterator, Sequence

from irlign.arena.cell import Place
from irlign.arena.policies import OF, POLICIES, with_method
from irlign.files import read_json
from irlign.optimise.work import stage_of
from irlign.plan import planned
from irlign.recipe import Recipe


def expected_seconds(places: Sequence[Place], rows: Sequence[str]) -> float:
    """Seconds on one thread that the cells and their policy rows still take: of each stage what it took in a finished cell, of the same
    setting where there is one, else what `irlign plan` says."""
    methods = [name.removeprefix(OF) for name in rows if name in POLICIES]
    took = {place: _took(place) for place in places}
    plans: dict[str, dict[str, float]] = {}

    def seconds(place: Place, stage: str) -> float:
        everywhere = [(other.name, of[stage]) for other, of in took.items() if stage in of]
        here = [value for name, value in everywhere if name == place.name]
        if known := here or [value for _, value in everywhere]:
            return sum(known) / len(known)
        if place.name not in plans:
            plans[place.name] = _planned(place.recipe(), methods)
        return plans[place.name].get(stage, 0.0)

    return sum(seconds(place, stage) for place in places for stage in _stages(place.recipe(), methods) if stage not in took[place])


def _took(place: Place) -> dict[str, float]:
    """Seconds of the stages that a cell has finished."""
    manifest = place.folder / "manifest.json"
    stages = read_json(manifest)["stages"] if manifest.exists() else {}
    return {name: entry["seconds"] for name, entry in stages.items() if entry["status"] == "complete"}


def _stages(recipe: Recipe, methods: Sequence[str]) -> Iterator[str]:
    """The stages of a cell that cost something."""
    yield from ("pretrain" if recipe.world else "init", "sft", "sample", f"reward-{recipe.reward.name}", "bon")
    yield from map(stage_of, methods)


def _planned(recipe: Recipe, methods: Sequence[str]) -> dict[str, float]:
    """Seconds of each stage by `irlign plan`."""
    found: dict[str, float] = {}
    for method in methods:
        found |= {"reward": 0.0, **{s.name: s.seconds or 0.0 for s in planned(with_method(recipe, method))}}
        found |= {f"reward-{recipe.reward.name}": found["reward"], stage_of(method): found.pop("optimise", 0.0)}
    return found

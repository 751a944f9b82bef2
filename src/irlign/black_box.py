"""A run from stored samples (`pools`): what stands in the place of the stages, the checks and the words that need a policy's weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from irlign.data.checks import read_notes
from irlign.progress import say
from irlign.recipe import Recipe
from irlign.records import SPLITS, Demonstration, Prompt
from irlign.reward.contrasts import contrast_pairs
from irlign.reward.features import WORDS
from irlign.runs import Run
from irlign.sampling.given import describe_given, give_pools, read_answers


def pool_files(recipe: Recipe) -> dict[str, str]:
    """The files of stored samples as inputs of a stage; none where policies draw them."""
    return {f"pools.{pool}": file for pool, file in recipe.pools.files.items()} if recipe.pools else {}


def take_pools(recipe: Recipe, run: Run, prompts: Sequence[Prompt]) -> None:
    """The stage `sample` from files: pools of the run's prompts in pools/."""
    assert recipe.pools is not None
    pools = recipe.pools

    def build(folder: Path) -> dict[str, Any]:
        statistics = give_pools(pools, recipe.data, prompts, folder)
        for name, of in statistics.items():
            say(f"sample {name}: {of['samples']} answers to {of['prompts']} prompts, {1 - of['completions/clipped_ratio']:.0%} finished")
        return statistics

    inputs = {**pool_files(recipe), **{path: path for path in (f"data/{split}.parquet" for split in SPLITS)}}
    outputs = [f"pools/{name}.parquet" for name in pools.files]
    run.do("sample", build, settings={"pools": pools, "data": recipe.data}, inputs=inputs, outputs=outputs)


def validate_pools(recipe: Recipe, splits: Mapping[str, Sequence[Demonstration]], notes: Mapping[str, Any]) -> str:
    """What stored samples are, and what length and the ending alone tell of the train answers, before and after they are matched.
    Raises DataError where no pair is left."""
    assert recipe.pools is not None
    train = {d.prompt.prompt_id for d in splits["train"]}
    sides = []
    for pool in ("sft", "init"):
        samples = [a.sample for a in read_answers(recipe.pools.files[pool], recipe.data)]
        sides.append([(s.prompt, s.completion, s.finished) for s in samples if s.prompt.prompt_id in train])
    pairs, left_out, controls = contrast_pairs({"init-sft": (sides[0], sides[1])}, match=recipe.reward.ending == "match")
    missing = ", ".join(f"{n} {what}".replace("_", " ") for what, n in left_out.items())
    return "\n".join(
        [
            *(f"read: {line}" for line in read_notes(notes)),
            "",
            *describe_given(splits, recipe.pools, recipe.data),
            "",
            f"{len(pairs['init-sft'])} init-sft pairs; left out: {missing}",
            f"length alone tells {controls['length_accuracy']:.0%} of them apart ({controls['length_accuracy_raw']:.0%} as given), the ending "
            f"{controls['ending_accuracy']:.0%}; reward.max_leak_accuracy is {recipe.reward.max_leak_accuracy:.0%}",
        ]
    )


class Source(NamedTuple):
    """What Best-of-N selects from: the `pool`, the checkpoint by whose features the judge `reads` it, and what n = 1 stands for, `kept`."""

    pool: str
    reads: Path
    kept: str


def selection_source(recipe: Recipe, run: Run) -> Source:
    """pi_SFT's pool, read by features of pi_0; stored samples are read by those of the reward's backbone."""
    if not recipe.pools:
        return Source("sft", run.path("policies/init"), "SFT")
    return Source(recipe.pools.pool, Path(recipe.reward.backbone), "the first candidate" if recipe.pools.candidates else "SFT")


def why_no_judge(reads: Path, shown: Sequence[Demonstration]) -> str:
    """Why nothing could judge the answers though there are demonstrations; empty where something can."""
    return "words alone make no judge of whether an answer belongs to its prompt" if str(reads) == WORDS and shown else ""


def stand_for(recipe: Recipe) -> dict[str, Any]:
    """What stands for the policies and the demonstrations in a report; nothing where there are policies."""
    if not recipe.pools:
        return {}
    shown = recipe.dataset_name or "no demonstrations"
    policies = {"model": f"samples of {recipe.pools.initial}", "sft_model": f"samples of {recipe.pools.sft}"}
    return {**policies, "dataset": shown, "num_generations": "as many as were given"}


def black_box_notes(recipe: Recipe) -> list[str]:
    """What the reader of a result from stored samples must know; nothing for other runs."""
    if not recipe.pools:
        return []
    words = [f"the initial policy is whatever wrote {recipe.pools.initial}", f"SFT whatever wrote {recipe.pools.sft}"]
    words += [f"and the candidates are {recipe.pools.candidates}"] if recipe.pools.candidates else []
    return [f"no policy's weights were read: {', '.join(words)}. So no likelihood, no log-ratio and no aligned policy stand here"]

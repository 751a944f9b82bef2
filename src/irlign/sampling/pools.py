"""Pools of samples: drawn in parts, stored as Parquet, taken up where an interrupted draw stopped; read part by part."""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from irlign.errors import GuardError, RunError, memory_errors
from irlign.files import read_table, table_parts, write_table
from irlign.machine import give_memory_back, versions
from irlign.progress import Progress
from irlign.records import Prompt, Sample
from irlign.runs import Run, request_seed
from irlign.sampling.engine import Engine, Request, SamplingSettings, load_engine

CARD = """---
tags: [alignment-from-demonstrations, synthetic]
configs:
- config_name: default
  data_files: "part-*.parquet"
---
# {name}: answers that the policy `{name}` gave

{samples} answers to {prompts} prompts, drawn by irlign {version} with the engine `{engine}`: temperature {temperature:g}, top_p {top_p:g}, top_k {top_k}
(0: all tokens), at most {max_new_tokens} tokens{stop}. {finished:.0%} ended by themselves, {empty:.0%} are empty; {tokens:.1f} tokens each.

```python
from datasets import load_dataset

load_dataset("parquet", data_files="this folder/*.parquet", split="train")
```
A row is one answer: `prompt` (the JSON of its messages where `conversational`), `completion`, `finish_reason` (`length`: cut), `logprob` in nats under the
policy itself, the `split` of its prompt in the run, and how it was drawn.

Limits: a model's answers as they came. They can be false or rude, and none was chosen. Prompts of the split `test` measure the run: train on no answer to them.
"""
DRAWN = ".drawn.jsonl"  # answers that were paid for and whose part is not stored yet


def draw_pool(
    policy: Path,
    wanted: Sequence[tuple[Prompt, int]],
    settings: SamplingSettings,
    *,
    chat_template: str,
    folder: Path,
    seed: int,
    name: str,
) -> dict[str, Any]:
    """Draw the wanted number of samples for each prompt and store them in `folder` as numbered parts.

    A part is a fixed range of prompts, and batches never cross it; a part that is already there is kept, and what the
    engine settled on for it (precision, tokens at once) holds for the rest, so that an interrupted draw goes on and gives
    the same bytes: all but the parts in which memory ran out, which the statistics count. The policy's memory is
    returned before this does. Returns the pool's statistics.
    """
    wanted = sorted(((p, n) for p, n in wanted if n > 0), key=lambda item: (item[0].split, item[0].prompt_id))
    size = settings.part_prompts
    paths = {first: folder / f"part-{number:05d}.parquet" for number, first in enumerate(range(0, len(wanted), size))}
    todo = {number: wanted[first : first + size] for number, (first, path) in enumerate(paths.items()) if not path.exists()}
    most = len(todo) if settings.spread else settings.num_workers
    settings = settings.model_copy(update={"num_workers": max(1, min(most, len(todo)))})  # who share the memory, as far as is known here
    places, load = [*paths.values()], partial(_drawer, policy, settings, chat_template, seed, name)
    with Progress(f"sample {name}", sum(n for _, n in wanted), "samples") as bar:
        bar.advance(sum(n for first, path in paths.items() if path.exists() for _, n in wanted[first : first + size]))
        for number, rows in _drawn(settings, load, todo, folder, name):
            write_table(places[number], rows)
            (folder / DRAWN).unlink(missing_ok=True)
            bar.advance(len(rows))
    (folder / DRAWN).unlink(missing_ok=True)  # of a process that was killed right after its last part
    billed = {"usage": usage} if (usage := _usage(folder)) else {}
    return {**stored_statistics(folder), "settled": _settled(folder), "parts_halved": _halved(folder), **billed}


Part = Sequence[tuple[Prompt, int]]
Draw = Callable[[Part], list[dict[str, Any]]]  # the rows of a part


def _drawer(
    policy: Path,
    settings: SamplingSettings,
    chat_template: str,
    seed: int,
    name: str,
    settled: Mapping[str, Any] | None,
    drawn: Path | None = None,
) -> tuple[Draw, Mapping[str, Any]]:
    """What draws parts, its engine loaded, and what the engine settled on. Raises RunError where a worker of a cluster sees no such policy."""
    if settings.spread and not policy.is_dir() and settings.here.engine != "openai":
        do = "give an output_dir on a file system that all nodes share"
        raise RunError("a node of the cluster does not see this folder", where=policy, do=do)
    if settings.spread:
        sharing = min(settings.num_workers, settings.cluster.on_a_node(os.cpu_count() or 1))
        settings = settings.model_copy(update={"num_workers": sharing})
    engine = load_engine(policy, settings, chat_template, settled, drawn)
    return partial(_draw_part, engine, settings, seed, name), engine.settled


def _draw_part(engine: Engine, settings: SamplingSettings, seed: int, name: str, part: Part) -> list[dict[str, Any]]:
    requests = [Request(p, tuple(request_seed(seed, f"sample-{name}", p.prompt_id, i) for i in range(n))) for p, n in part]
    seeds = [s for r in requests for s in r.seeds]
    with memory_errors("one answer at a time", where=f"sample {name}", do="lower sampling.max_new_tokens, or free memory"):
        drawn = engine.draw(requests)
    about = {"settled": json.dumps(engine.settled), "halvings": engine.halvings}
    about |= {"usage": json.dumps(engine.usage)} if engine.usage else {}
    return [{**_row(sample, s, settings.here), **about} for sample, s in zip(drawn, seeds, strict=True)]


def _drawn(
    settings: SamplingSettings, load: Callable[..., tuple[Draw, Any]], todo: Mapping[int, Part], folder: Path, name: str
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The parts that are not stored yet, in order here and as they come from several processes; the engine and its memory go with the last."""
    if not todo:
        return
    settled = _settled(folder)
    if settings.several:
        from irlign.sampling.processes import spread

        yield from spread(settings, load, todo, f"sample {name}", settled)
        return
    draw, _ = load(settled, folder / DRAWN)
    for number, part in todo.items():
        yield number, draw(part)
    del draw
    gc.collect()
    give_memory_back()


def _settled(folder: Path) -> dict[str, Any] | None:
    """What the engine chose for the parts that are there."""
    first = next(table_parts(folder, "settled"), None) if folder.is_dir() else None
    return json.loads(first[0]["settled"]) if first else None


def _halved(folder: Path) -> list[str]:
    """The parts in which memory ran out: drawn again, their bytes may differ."""
    return [path.stem for path in sorted(folder.glob("part-*.parquet")) if read_table(path, "halvings")[0]["halvings"]]


def _usage(folder: Path) -> dict[str, float]:
    """What all parts together were billed for; empty where nothing was."""
    total: Counter[str] = Counter()
    for rows in table_parts(folder, "usage"):
        total.update(json.loads(rows[0].get("usage", "{}")))
    return dict(total)


def _row(sample: Sample, seed: int, settings: SamplingSettings) -> dict[str, Any]:
    drawn = settings.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens", "engine"})
    return {**sample.to_row(), **drawn, "stop": json.dumps(settings.stop), "seed": str(seed)}


def read_pool(folder: Path) -> list[Sample]:
    """The samples of a stored pool, in order. Raises RunError where a part is damaged."""
    return [sample for part in pool_parts(folder) for sample in part]


def pool_parts(folder: Path, *splits: str) -> Iterator[list[Sample]]:
    """The samples of a stored pool, part by part, in order; only those of the splits where some are named. One part is in memory at a
    time. Raises RunError where a part is damaged."""
    for rows in table_parts(folder):
        yield [Sample.from_row(row) for row in rows if not splits or row["split"] in splits]


def stored_samples(run: Run, policy: str, *splits: str) -> list[Sample]:
    """The samples of a run's policy for the prompts of these splits, in order. Raises RunError where a part is damaged."""
    return [s for part in pool_parts(run.path(f"pools/{policy}.parquet"), *splits) for s in part]


def pool_statistics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts and shares under the names that TRL logs; lengths in tokens."""
    return _statistics([samples])


def stored_statistics(folder: Path) -> dict[str, Any]:
    """The same of a stored pool, read part by part."""
    return _statistics(pool_parts(folder))


def _statistics(parts: Iterable[Sequence[Sample]]) -> dict[str, Any]:
    """A part holds all answers to its prompts."""
    total: Counter[str] = Counter()
    for samples in parts:
        total.update(
            samples=len(samples),
            prompts=len({s.prompt.prompt_id for s in samples}),
            tokens=sum(s.tokens for s in samples),
            cut=sum(not s.finished for s in samples),
            empty=sum(not s.completion.strip() for s in samples),
        )
    count = total["samples"]
    return {
        "samples": count,
        "prompts": total["prompts"],
        "completions/mean_length": total["tokens"] / count,
        "completions/clipped_ratio": total["cut"] / count,
        "completions/empty_ratio": total["empty"] / count,
    }


def publish_card(folder: Path, name: str, statistics: Mapping[str, Any], settings: SamplingSettings) -> None:
    """README.md beside the parts of a pool, from its `pool_statistics`."""
    drawn = settings.model_dump(include={"engine", "temperature", "top_p", "top_k", "max_new_tokens"})
    counts = {key: statistics[key] for key in ("samples", "prompts")}
    finished, tokens = 1 - statistics["completions/clipped_ratio"], statistics["completions/mean_length"]
    about = {"finished": finished, "tokens": tokens, "empty": statistics["completions/empty_ratio"]}
    stop = f", ended by {', '.join(f'`{text!r}`' for text in settings.stop)}" if settings.stop else ""
    text = CARD.format(name=name, version=versions().get("irlign"), stop=stop, **drawn, **counts, **about)
    (folder / "README.md").write_text(text, encoding="utf-8")


def guard_finished(statistics: dict[str, Any], settings: SamplingSettings) -> None:
    """Error when so many of pi_SFT's answers are cut at the limit that Best-of-N would choose among fragments."""
    cut = statistics["completions/clipped_ratio"]
    if cut > settings.max_cut_share:
        ended = "no answer ended by itself" if cut == 1 else f"{cut:.0%} of the answers were cut at {settings.max_new_tokens} tokens"
        raise GuardError(
            f"{ended}: pi_SFT has not learned to end, or the limit is too short for its answers",
            where="sample sft",
            do="raise sampling.max_new_tokens, train SFT longer (sft.num_train_epochs), or give a sampling.stop string; "
            "sampling.max_cut_share=1 goes on all the same",
        )

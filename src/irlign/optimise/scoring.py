"""The scores of many answers by every reward, here or block by block over several processes or a cluster; and of a file by one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.batches import blocks
from irlign.data.demonstrations import DataSettings, load_demonstrations
from irlign.errors import RunError
from irlign.files import read_table, write_rows, write_table
from irlign.progress import Progress
from irlign.records import PromptContent
from irlign.reward.load import load_reward, score_all
from irlign.sampling.engine import SamplingSettings

SHARD = "part-{:05d}.parquet"
Texts = tuple[Sequence[PromptContent], Sequence[str]]


def scores_of(
    folders: Mapping[str, Path], prompts: Sequence[PromptContent], completions: Sequence[str], settings: SamplingSettings, kept: Path
) -> dict[str, np.ndarray]:
    """The scores of every reward by its name, each of shape [len(prompts)], as `score_all` gives them.

    With several workers, here or on a cluster, each block of answers (data/batches.py) is scored by a worker and stored in the folder `kept` as it is
    done, so that an interrupted attempt goes on. The numbers are those of one machine, to the last digit but for kind=features, which computes equal answers
    once and so batches others together.
    """
    if not settings.several or not len(prompts):
        return score_all(folders, prompts, completions)
    from irlign.sampling.processes import spread

    paths = [kept / SHARD.format(number) for number, _ in enumerate(blocks(len(prompts)))]
    todo = {k: (prompts[of], completions[of]) for k, of in enumerate(blocks(len(prompts))) if not paths[k].exists()}
    with Progress("score", len(paths), "blocks") as bar:
        bar.advance(len(paths) - len(todo))
        for number, rows in spread(settings, partial(_scorer, dict(folders)), todo, "score") if todo else ():
            write_table(paths[number], rows)
            bar.advance()
    rows = [row for path in paths for row in read_table(path)]
    return {name: np.array([row[name] for row in rows]) for name in folders}


def _scorer(folders: Mapping[str, Path], told: Any) -> tuple[Any, None]:
    """What a worker does with a block. Raises RunError where it sees no such reward."""
    for folder in folders.values():
        if not folder.is_dir():
            raise RunError(
                "a worker does not see this folder",
                where=folder,
                do="give an output_dir on a file system that all nodes share",
            )
    return partial(_score, folders), None


def _score(folders: Mapping[str, Path], texts: Texts) -> list[dict[str, float]]:
    scores = score_all(folders, *texts)
    return [dict(zip(scores, map(float, row), strict=True)) for row in zip(*scores.values(), strict=True)]


def score_file(reward_dir: str | Path, file: str | Path, output: str | Path) -> int:
    """Score the answers in a file with a stored reward: OUTPUT gets each row's prompt, completion and `reward`. Returns the rows.

    The same kinds of file as for demonstrations are read; answers may be empty.
    """
    reward = load_reward(reward_dir)
    rows = load_demonstrations(str(file), DataSettings(), answers=False, distinct=False).demonstrations
    rewards = reward.score([d.prompt.content for d in rows], [d.completion for d in rows])
    scored = [{"prompt": d.prompt.content, "completion": d.completion, "reward": float(r)} for d, r in zip(rows, rewards, strict=True)]
    write_rows(Path(output), scored)
    return len(scored)

"""Best-of-N: pools and rewards become candidates with all raw scores, and one selected answer for each prompt."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from irlign.config import Settings
from irlign.errors import DataError
from irlign.records import SCORE, PromptContent, Sample
from irlign.reward.contrasts import ended


class BestOfNSettings(Settings):
    """Selection from the pool of pi_SFT on dev and test prompts."""

    n: int | None = Field(None, ge=1, description="answers to choose among; null = chosen without labels on the dev prompts")
    budget: float | None = Field(
        None,
        ge=1,
        description="mean number of answers a prompt, each as many as it deserves, n at most (docs/adaptive.md); null = n for all",
    )
    force: bool = Field(False, description="select with an n above what the judge would take; `--force` says the same")
    likelihood: float = Field(
        1.0,
        ge=0,
        description="weight of what pi_SFT finds likely, log pi_SFT(y|x) a token, beside the reward, both in standard deviations within a "
        "prompt; the judge decides between the two together and the likelihood alone; 0 = the reward alone",
    )


def scored_text(sample: Sample) -> str:
    """What a reward sees of a candidate: the text under the same ending rule as in its training."""
    return ended(sample.completion, sample.finished)


def scored_texts(samples: Sequence[Sample]) -> tuple[list[PromptContent], list[str]]:
    """What a reward scores of samples: the prompts and the texts."""
    return [s.prompt.content for s in samples], [scored_text(s) for s in samples]


def candidate_rows(
    samples: Sequence[Sample],
    scores: Mapping[str, Sequence[float] | np.ndarray],
    judged: np.ndarray | None = None,
    style: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Rows of candidates.parquet: every sample with one column `reward/NAME` for each reward and the label-free judge's
    logits as `judge` and `style` (null without one); nothing chosen yet.
    """
    return [
        {
            **sample.to_row(),
            **{f"{SCORE}{name}": float(values[i]) for name, values in scores.items()},
            **{name: None if of is None else float(of[i]) for name, of in (("judge", judged), ("style", style))},
        }
        for i, sample in enumerate(samples)
    ]


def merit(row: Mapping[str, Any], reward: str) -> tuple[bool, float, int]:
    """What selection compares, the highest wins: an answer that finished before one cut at the limit, then the reward, then the first
    drawn."""
    return row["finish_reason"] != "length", row[f"{SCORE}{reward}"], -row["index"]


def select(rows: Sequence[Mapping[str, Any]], reward: str, n: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """The answer with the highest reward among the first n of each prompt, one n for all or each its own; one cut at the limit
    never beats a finished one, and of equal ones the first drawn wins. Rows of selected.jsonl. Raises DataError where a prompt has fewer.
    """
    most = n if isinstance(n, Mapping) else {row["prompt_id"]: n for row in rows}
    by_prompt: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["index"] < most[row["prompt_id"]]:
            by_prompt[row["prompt_id"]].append(row)
    selected = []
    for prompt_id, pool in by_prompt.items():
        if len(pool) < most[prompt_id]:
            raise DataError(
                f"{len(pool)} candidates, and best_of_n.n asks for {most[prompt_id]}",
                where=f"prompt {prompt_id}",
                do="lower it or draw more",
            )
        best = max(pool, key=lambda row: merit(row, reward))
        prompt = json.loads(best["prompt"]) if best["conversational"] else best["prompt"]
        selected.append(
            {
                "prompt_id": prompt_id,
                "split": best["split"],
                "prompt": prompt,
                "completion": best["completion"],
                "reward": best[f"{SCORE}{reward}"],
                "index": best["index"],
                "n": most[prompt_id],
                "finish_reason": best["finish_reason"],
            }
        )
    return selected

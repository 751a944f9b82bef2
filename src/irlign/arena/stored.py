"""Rewards over stored answers of many models: learned from a better and a base model, asked about models they never saw.

`python -m irlign.arena.stored outputs.jsonl --worse BASE --better TUNED --encoder CHECKPOINT ...`. A line of the file holds `prompt`,
`outputs` (answers by model), `judge_score` (a judge's score by model, the golden here) and, for the oracle-like control, a reference.
Heads on frozen features are cross-fitted over prompts: a prompt's answers are scored by a head fitted on the other folds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import typer

from irlign.errors import ConfigError, DataError, IrlignError
from irlign.records import prompt_identity
from irlign.reward.controls import controls
from irlign.reward.features import Features, LogisticHead
from irlign.statistics import estimate

FOLDS, RIDGE, WIDTH, MATCHED = 5, 1e-4, 8192, 0.1  # MATCHED: lengths within 10 % of each other
FEWEST = 20  # answers of either model


@dataclass(frozen=True)
class Stored:
    """All answers, row for row: whose they are, the fold of their prompt, and the judge's score (nan: none)."""

    prompts: Sequence[str]
    texts: Sequence[str]
    models: np.ndarray
    folds: np.ndarray
    golden: np.ndarray
    references: Mapping[str, Sequence[str]]


def read_stored(path: Path) -> Stored:
    """Raises DataError where a line is no object with a prompt and answers by model."""
    rows: list[tuple[str, str, str, float]] = []
    references: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            scores = record.get("judge_score") or {}
            rows += [
                (record["prompt"], text, model, np.nan if scores.get(model) is None else float(scores[model]))
                for model, text in record["outputs"].items()
            ]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            do = 'a line is {"prompt": ..., "outputs": {MODEL: answer}, "judge_score": {MODEL: score}}'
            raise DataError(f"not a line of stored answers: {error}", where=f"{path}:{number}", do=do) from error
        for key in (key for key in record if key.startswith("reference")):
            references.setdefault(prompt_identity(record["prompt"]), []).append(record[key])
    prompts, texts, models, golden = zip(*rows, strict=True)
    folds = np.array([crc32(prompt.encode()) % FOLDS for prompt in prompts])
    return Stored(prompts, texts, np.array(models), folds, np.array(golden), references)


def word_features(texts: Sequence[str]) -> np.ndarray:
    """Hashed words and word pairs, `log(1 + count)`, each answer at length 1 so that longer is not larger. Shape [len(texts), WIDTH]."""
    x_B_F = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        for term in [*words, *map(" ".join, pairwise(words))]:
            x_B_F[row, crc32(term.encode()) % WIDTH] += 1
    x_B_F = np.log1p(x_B_F)
    return x_B_F / np.maximum(np.linalg.norm(x_B_F, axis=1, keepdims=True), 1e-9)


def cross_fitted(stored: Stored, features: np.ndarray, better: str, worse: str) -> np.ndarray:
    """The logit of every answer by a head that tells `better`'s answers from `worse`'s, fitted on the other folds. Shape [rows]."""
    scores = np.zeros(len(features))
    side = np.isin(stored.models, (better, worse))
    for k in range(FOLDS):
        fit = side & (stored.folds != k)
        head = LogisticHead(features[fit].astype(float), (stored.models[fit] == better).astype(float), np.ones(fit.sum()), RIDGE)
        scores[stored.folds == k] = head(features[stored.folds == k])
    return scores


def agreement(stored: Stored, scores: np.ndarray, unseen: np.ndarray, matched: bool) -> dict[str, Any] | None:
    """How often the reward orders two unseen models' answers to one prompt as the judge does (a tie counts half), over prompts; pairs
    that the judge holds equal are left out, and with `matched` those whose lengths differ by more than MATCHED; None without pairs."""
    found = []
    lengths = np.array([max(1, len(text)) for text in stored.texts])
    for rows in _by_prompt(stored, unseen):
        a, b = np.triu_indices(len(rows), 1)
        first, second = rows[a], rows[b]
        keep = stored.golden[first] != stored.golden[second]
        if matched:
            keep &= np.abs(np.log(lengths[first] / lengths[second])) <= np.log1p(MATCHED)
        order = np.sign(stored.golden[first] - stored.golden[second])[keep]
        told = np.sign(scores[first] - scores[second])[keep]
        if len(order):
            found.append(float(np.mean(np.where(told == 0, 0.5, told == order))))
    return estimate(found).to_json() if found else None


def picked(stored: Stored, scores: np.ndarray, unseen: np.ndarray) -> dict[str, Any]:
    """The judge's score of the answer that the reward picks among the unseen models', over prompts."""
    return estimate([float(stored.golden[rows[np.argmax(scores[rows])]]) for rows in _by_prompt(stored, unseen)]).to_json()


def _by_prompt(stored: Stored, unseen: np.ndarray) -> list[np.ndarray]:
    _, group = np.unique(np.array(stored.prompts, dtype=object), return_inverse=True)
    return [rows for g in range(group.max() + 1) if len(rows := np.flatnonzero(unseen & (group == g))) > 1]


def compare(stored: Stored, better: str, worse: str, encoders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`all`, `matched` and `picked` of every reward. Raises ConfigError where a model is unknown, answers too little, or none is left."""
    for model in (better, worse):
        if (stored.models == model).sum() < FEWEST:
            known = ", ".join(sorted(set(stored.models)))
            raise ConfigError(f"model {model!r} has fewer than {FEWEST} answers", where="--better, --worse", do=f"known: {known}")
    unseen = ~np.isin(stored.models, (better, worse)) & ~np.isnan(stored.golden)
    if not unseen.any():
        raise ConfigError("no other model has a judge's score", where="judge_score", do="give scores to compare with")
    rewards = {"words": cross_fitted(stored, word_features(stored.texts), better, worse)}
    for encoder in encoders:
        features = Features(encoder, "none", name=Path(encoder).name)(stored.prompts, stored.texts)
        rewards[Path(encoder).name] = cross_fitted(stored, features, better, worse)
    rewards |= {f"control: {name}": of for name, of in controls(stored.prompts, stored.texts, stored.references).items()}
    rewards["the judge itself"] = np.nan_to_num(stored.golden)
    return {
        name: {
            "all": agreement(stored, of, unseen, matched=False),
            "matched": agreement(stored, of, unseen, matched=True),
            "picked": picked(stored, of, unseen),
        }
        for name, of in rewards.items()
    }


def _words(e: Mapping[str, Any] | None, digits: int) -> str:
    return f"{e['mean']:.{digits}f} [{e['ci95'][0]:.{digits}f}, {e['ci95'][1]:.{digits}f}]" if e else "–"


def main(
    file: Annotated[Path, typer.Argument(help="stored answers, JSON Lines")],
    better: Annotated[str, typer.Option(help="the model whose answers are the better side")],
    worse: Annotated[str, typer.Option(help="the base model, the worse side")],
    encoder: Annotated[list[str] | None, typer.Option(help="a checkpoint whose frozen features carry a head; may be repeated")] = None,
) -> None:
    """Print one table: agreement with the judge on models that the rewards never saw, and what the judge says of their picks."""
    try:
        found = compare(read_stored(file), better, worse, encoder or [])
    except IrlignError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"{file}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    typer.echo("| reward | agreement, all pairs | agreement, pairs of like length | judge's score of the pick |\n|---|---|---|---|")
    for name, row in found.items():
        cells = [_words(e, digits) for e, digits in zip(row.values(), (3, 3, 2), strict=True)]
        typer.echo(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)

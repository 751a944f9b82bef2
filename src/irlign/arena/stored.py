"""Rewards over stored answers of many models: learned from a better and a base model, asked about models they never saw.

`python -m irlign.arena.stored outputs.jsonl --worse BASE --better TUNED --encoder CHECKPOINT ...`. A line of the file holds `prompt`,
`outputs` (answers by model), `judge_score` (a judge's score by model, the golden here) and, for the oracle-like control, a reference.
Heads on frozen features are cross-fitted over prompts: a prompt's answers are scored by a head fitted on the other folds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import typer

from irlign.errors import ConfigError, DataError, IrlignError
from irlign.evaluate.reward_bench import similar
from irlign.files import write_rows
from irlign.records import prompt_identity
from irlign.reward.controls import controls
from irlign.reward.features import Features, LogisticHead, word_features
from irlign.statistics import estimate, paired_test, spearman

FOLDS, RIDGE = 5, 1e-4
RESAMPLES = 2000  # of the prompts, for the interval of the models' ranking
LENGTH, CHANCE = "control: length", "control: random"
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


def cross_fitted(stored: Stored, features: np.ndarray, better: str, worse: str) -> np.ndarray:
    """The logit of every answer by a head that tells `better`'s answers from `worse`'s, fitted on the other folds. Shape [rows]."""
    scores = np.zeros(len(features))
    side = np.isin(stored.models, (better, worse))
    for k in range(FOLDS):
        fit = side & (stored.folds != k)
        head = LogisticHead(features[fit].astype(float), (stored.models[fit] == better).astype(float), np.ones(fit.sum()), RIDGE)
        scores[stored.folds == k] = head(features[stored.folds == k])
    return scores


def agreement(stored: Stored, scores: np.ndarray, unseen: np.ndarray, matched: bool) -> np.ndarray:
    """How often the reward orders two unseen models' answers to one prompt as the judge does (a tie counts half), of each prompt with such a
    pair. Pairs that the judge holds equal are left out, and with `matched` those whose lengths are not `similar`. Shape [P]; the
    prompts are the same for every reward."""
    found = []
    lengths = np.array([max(1, len(text)) for text in stored.texts])
    for rows in _by_prompt(stored, unseen):
        a, b = np.triu_indices(len(rows), 1)
        first, second = rows[a], rows[b]
        keep = stored.golden[first] != stored.golden[second]
        if matched:
            keep &= similar(lengths[first], lengths[second])
        order = np.sign(stored.golden[first] - stored.golden[second])[keep]
        told = np.sign(scores[first] - scores[second])[keep]
        if len(order):
            found.append(float(np.mean(np.where(told == 0, 0.5, told == order))))
    return np.array(found)


def ranking(stored: Stored, scores: np.ndarray, unseen: np.ndarray) -> dict[str, Any]:
    """Spearman between the unseen models' mean reward and their mean judge's score over the same answers; the interval draws prompts,
    for these very models."""
    models, column = np.unique(stored.models[unseen], return_inverse=True)
    _, row = np.unique(np.array(stored.prompts, dtype=object)[unseen], return_inverse=True)
    shape = (row.max() + 1, len(models))
    sums = []
    for values in (np.ones(int(unseen.sum())), scores[unseen], stored.golden[unseen]):
        table_P_M = np.zeros(shape)
        np.add.at(table_P_M, (row, column), values)
        sums.append(table_P_M)
    rng = np.random.default_rng(0)
    weights_R_P = np.concatenate([np.ones((1, shape[0])), rng.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=RESAMPLES)])
    count_R_M, mine_R_M, golden_R_M = (weights_R_P @ table for table in sums)
    found = [spearman(a / n, g / n) or 0.0 for n, a, g in zip(count_R_M, mine_R_M, golden_R_M, strict=True) if n.all()]
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return {"mean": found[0], "ci95": [float(low), float(high)], "prompts": int(shape[0])}


def picked(stored: Stored, scores: np.ndarray, unseen: np.ndarray) -> dict[str, Any]:
    """The judge's score of the answer that the reward picks among the unseen models', over prompts."""
    return estimate([float(stored.golden[rows[np.argmax(scores[rows])]]) for rows in _by_prompt(stored, unseen)]).to_json()


def _by_prompt(stored: Stored, unseen: np.ndarray) -> list[np.ndarray]:
    _, group = np.unique(np.array(stored.prompts, dtype=object), return_inverse=True)
    return [rows for g in range(group.max() + 1) if len(rows := np.flatnonzero(unseen & (group == g))) > 1]


def compare(stored: Stored, better: str, worse: str, encoders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`all`, `matched`, `ranking` and `picked` of every reward, and what it is `above` length and chance on the matched pairs. Raises ConfigError where a model is unknown, answers too little, or none is left."""
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
    matched = {name: agreement(stored, of, unseen, matched=True) for name, of in rewards.items()}
    return {
        name: {
            "all": _mean(agreement(stored, of, unseen, matched=False)),
            "matched": _mean(matched[name]),
            "ranking": ranking(stored, of, unseen),
            "picked": picked(stored, of, unseen),
            "above": {
                control: paired_test(name, control, matched[name], matched[control]).to_json()
                for control in (LENGTH, CHANCE)
                if len(matched[name]) and not name.startswith(("control", "the judge"))
            },
        }
        for name, of in rewards.items()
    }


def _mean(values_P: np.ndarray) -> dict[str, Any] | None:
    return estimate(values_P).to_json() if len(values_P) else None


def write_pools(stored: Stored, better: str, worse: str, folder: Path) -> list[str]:
    """The files of recipes/black_box.yaml: the base model's answers, the better one's, and the judged models' as candidates, whose `id` is the
    row's number and the judge's score. Returns their names."""
    judged = ~np.isin(stored.models, (better, worse)) & ~np.isnan(stored.golden)
    sides = {"initial": stored.models == worse, "sft": stored.models == better, "candidates": judged}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sides.items():
        write_rows(
            folder / f"{name}.jsonl",
            [
                {
                    "prompt": stored.prompts[i],
                    "completion": stored.texts[i],
                    "model": str(stored.models[i]),
                    "id": f"{i} {stored.golden[i]:g}",
                }
                for i in map(int, np.flatnonzero(rows))
            ],
        )
    return [str(folder / f"{name}.jsonl") for name in sides]


def _words(e: Mapping[str, Any] | None, digits: int) -> str:
    return f"{e['mean']:.{digits}f} [{e['ci95'][0]:.{digits}f}, {e['ci95'][1]:.{digits}f}]" if e else "–"


def main(
    file: Annotated[Path, typer.Argument(help="stored answers, JSON Lines")],
    better: Annotated[str, typer.Option(help="the model whose answers are the better side")],
    worse: Annotated[str, typer.Option(help="the base model, the worse side")],
    encoder: Annotated[list[str] | None, typer.Option(help="a checkpoint whose frozen features carry a head; may be repeated")] = None,
    pools: Annotated[Path | None, typer.Option(help="write the files of recipes/black_box.yaml into this folder, and no table")] = None,
) -> None:
    """Print the tables: agreement with the judge on models that the rewards never saw, their ranking, and what the judge says of the picks."""
    try:
        stored = read_stored(file)
        if pools is not None:
            return typer.echo("\n".join(write_pools(stored, better, worse, pools)))
        found = compare(stored, better, worse, encoder or [])
    except IrlignError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"{file}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    typer.echo("| reward | agreement, all pairs | agreement, pairs of like length | ranking of the models | judge's score of the pick |")
    typer.echo("|---|---|---|---|---|")
    for name, row in found.items():
        cells = [_words(row[key], digits) for key, digits in (("all", 3), ("matched", 3), ("ranking", 2), ("picked", 2))]
        typer.echo(f"| {name} | {' | '.join(cells)} |")
    typer.echo("\n| pairs of like length | minus length | p | minus random | p |\n|---|---|---|---|---|")
    for name, row in found.items():
        if row["above"]:
            typer.echo(f"| {name} | {' | '.join(map(_signed, row['above'].values()))} |")


def _signed(test: Mapping[str, Any]) -> str:
    return f"{test['mean_difference']:+.3f} [{test['ci95'][0]:+.3f}, {test['ci95'][1]:+.3f}] | {test['p']:.4f}"


if __name__ == "__main__":
    typer.run(main)

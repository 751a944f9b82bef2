"""Several rewards as one: mean, minimum, or mean less a penalty on their disagreement.

Members of one contrast err together, so an ensemble softens over-optimisation and does not end it (arXiv 2310.02743).
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.files import read_json, write_json
from irlign.launch import ProcessSettings, launch
from irlign.records import Contrast, PromptContent
from irlign.reward.model import Classifier, RewardModel
from irlign.reward.train import RewardSettings, accuracy_and_margin, fold_of_pairs, train_reward

LOG = "training.json"  # in a member's folder once it is trained, so that an interrupted ensemble goes on after it


def combine(scores_K_B: np.ndarray, aggregate: str, penalty: float) -> np.ndarray:
    """One reward from K. Shape [B]. `mean`, `min`, or `mean-variance`: mean - penalty * variance over the members."""
    if aggregate == "min":
        return scores_K_B.min(0)
    return scores_K_B.mean(0) - (penalty * scores_K_B.var(0) if aggregate == "mean-variance" else 0.0)


def standardised(scores_K_B: np.ndarray, scales_K_2: np.ndarray) -> np.ndarray:
    """Each member's scores less its mean and over its standard deviation, the rows of `scales`. Shape [K, B]."""
    return (scores_K_B - scales_K_2[:, :1]) / (scales_K_2[:, 1:] + 1e-12)


class Ensemble:
    """`RewardModel` over members, one in memory at a time.

    `scales` [K, 2] holds each member's mean and standard deviation where members of different contrasts are standardised before
    they are combined (reward/learn.py); None where they share a contrast and so a scale.
    """

    def __init__(
        self,
        members: Sequence[Path],
        loader: Callable[[Path], RewardModel],
        aggregate: str,
        penalty: float,
        name: str,
        scales: np.ndarray | None = None,
    ):
        self.members, self.loader, self.aggregate, self.penalty, self.name = list(members), loader, aggregate, penalty, name
        self.scales = scales

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any], loader: Callable[[Path], RewardModel]) -> "Ensemble":
        """The ensemble published in `rewards/NAME`: its members are rewards in folders of their own, which `loader` reads."""
        members, scales = [folder / name for name in reward["members"]], reward.get("scales")
        shape = (reward["aggregate"], reward["variance_penalty"], reward["name"])
        return cls(members, loader, *shape, None if scales is None else np.array(scales))

    def member_scores(
        self, prompts: Sequence[PromptContent], completions: Sequence[str], known: Sequence[np.ndarray | None] = ()
    ) -> np.ndarray:
        """Every member's reward, standardised where there are scales; `known` scores are not computed again. Shape [K, len(prompts)]."""
        given = known or [None] * len(self.members)
        scores_K_B = np.stack(
            [self.loader(m).score(prompts, completions) if of is None else of for m, of in zip(self.members, given, strict=True)]
        )
        return scores_K_B if self.scales is None else standardised(scores_K_B, self.scales)

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str], known: Sequence[np.ndarray | None] = ()) -> np.ndarray:
        """Shape [len(prompts)]."""
        return combine(self.member_scores(prompts, completions, known), self.aggregate, self.penalty)


def average_weights(members: Sequence[Path], folder: Path, chat_template: str, name: str) -> None:
    """One classifier with the mean of the members' weights, saved in `folder` (WARM, arXiv 2401.12187). Members share their start."""
    import torch

    models = [Classifier.load(member, {"chat_template": chat_template, "name": name}) for member in members]
    states = [model.model.state_dict() for model in models]
    mean = {key: torch.stack([s[key].float() for s in states]).mean(0).to(states[0][key].dtype) for key in states[0]}
    models[0].model.load_state_dict(mean)
    models[0].save(folder)


def train_ensemble(
    backbone: Path,
    pairs: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: RewardSettings,
    *,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
    report_to: str,
    processes: ProcessSettings = ProcessSettings(),
    section: str = "reward",
) -> dict[str, Any]:
    """Train `settings.members` rewards and save them in `folder`, as a classifier (one member, or the average of the weights) or
    as members in folders of their own. Returns what reward.json says of it: `kind`, the members' training logs, dev accuracy.
    """
    options: dict[str, Any] = {"chat_template": chat_template, "report_to": report_to, "section": section}
    if settings.members == 1:
        log = launch(processes, train_reward, backbone, pairs, dev, settings, folder=folder, checkpoints=checkpoints, seed=seed, **options)
        return {"kind": "classifier", **_about([log], log["pairs"], log["dev"])}
    names = [f"member-{k}" for k in range(settings.members)]
    head_seed = seed if settings.aggregate == "weight-average" else None
    logs = []
    for k, name in enumerate(names):
        if not (folder / name / LOG).exists():
            own = fold_of_pairs(pairs, k, settings.members)
            places: dict[str, Any] = {"folder": folder / name, "checkpoints": checkpoints / name, "seed": seed + 1009 * k}
            options["head_seed"] = head_seed
            write_json(folder / name / LOG, launch(processes, train_reward, backbone, own, dev, settings, **places, **options))
        logs.append(read_json(folder / name / LOG))
    count = {"train": len(pairs), "dev": len(dev)}
    about = {"kind": "classifier", "chat_template": chat_template, "name": settings.name}
    if settings.aggregate == "weight-average":
        average_weights([folder / name for name in names], folder, chat_template, settings.name)
        for name in names:
            shutil.rmtree(folder / name)
        return {
            "kind": "classifier",
            "averaged": settings.members,
            **_about(logs, count, accuracy_and_margin(Classifier.load(folder, about), dev)),
        }
    shape = {"members": names, "aggregate": settings.aggregate, "variance_penalty": settings.variance_penalty}
    for name in names:
        write_json(folder / name / "reward.json", {**about, "name": f"{settings.name} {name}"})
    ensemble = Ensemble.load(folder, {**about, **shape}, lambda member: Classifier.load(member, about))
    return {"kind": "ensemble", **shape, **_about(logs, count, accuracy_and_margin(ensemble, dev))}


def _about(logs: Sequence[dict[str, Any]], pairs: dict[str, int], dev: dict[str, float] | None) -> dict[str, Any]:
    training = [{key: log[key] for key in ("steps", "tokens", "loss", "losses")} for log in logs]
    return {"pairs": pairs, "dev": dev, "training": training[0] if len(training) == 1 else training}

"""A published reward, whatever its kind, from its folder; several of them at once on the same answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from irlign.errors import ModelError
from irlign.files import read_json
from irlign.records import PromptContent
from irlign.reward.ensemble import Ensemble
from irlign.reward.log_ratio import LogRatio
from irlign.reward.model import Classifier, RewardModel

KINDS = {"classifier": Classifier, "ensemble": Ensemble, "log-ratio": LogRatio}


def load_reward(path: str | Path) -> RewardModel:
    """The reward in `path` (a `rewards/NAME` folder): `.score(prompts, completions)` gives one number each.

    Raises ModelError where there is no `reward.json` or its kind is unknown.
    """
    folder = Path(path)
    if not (folder / "reward.json").is_file():
        raise ModelError("no reward.json here, so this is no reward", where=folder, do="give a rewards/NAME folder of a run")
    reward = read_json(folder / "reward.json")
    if reward.get("kind") not in KINDS:
        raise ModelError(f"unknown kind of reward {reward.get('kind')!r}", where=folder / "reward.json", do=f"known: {', '.join(KINDS)}")
    return KINDS[reward["kind"]].load(folder, reward)  # type: ignore[attr-defined]


def score_all(folders: Mapping[str, Path], prompts: Sequence[PromptContent], completions: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of every reward by its name, each of shape [len(prompts)]; rewards are in memory one after the other, and
    log-ratios of the same two policies share one pass over them.
    """
    scores, likelihoods = {}, {}
    for name, folder in folders.items():
        reward = load_reward(folder)
        if isinstance(reward, LogRatio):
            if reward.source not in likelihoods:
                likelihoods[reward.source] = reward.likelihoods(prompts, completions)
            scores[name] = reward.from_likelihoods(*likelihoods[reward.source])
        else:
            scores[name] = reward.score(prompts, completions)
    return scores

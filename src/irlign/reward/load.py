"""A published reward, whatever its kind, from its folder; several of them at once on the same answers."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.errors import ModelError
from irlign.files import read_json
from irlign.records import PromptContent
from irlign.reward.ensemble import Ensemble
from irlign.reward.feature_reward import FeatureReward
from irlign.reward.features import Features
from irlign.reward.heads import SharedHeads
from irlign.reward.log_ratio import LogRatio
from irlign.reward.model import Classifier, RewardModel

KINDS: dict[str, Callable[[Path, dict[str, Any]], RewardModel]] = {
    "classifier": Classifier.load,
    "heads": SharedHeads.load,
    "features": FeatureReward.load,
    "ensemble": lambda folder, reward: Ensemble.load(folder, reward, member_loader()),
    "log-ratio": LogRatio.load,
}


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
    return KINDS[reward["kind"]](folder, reward)


def load_resident(path: str | Path, keep: Callable[[Any], Any] | None = None) -> RewardModel:
    """`load_reward`, for a process that scores all day: networks stay in memory from one score to the next, each once (`keep` makes a
    loader of this kind), and features of answers are not remembered. Raises ModelError as `load_reward` does."""
    keep = keep or _keeper()
    reward = load_reward(path)
    if isinstance(reward, LogRatio):
        reward.loader = keep(reward.loader)
    elif isinstance(reward, FeatureReward):
        own = reward.features
        own.policy_loader, own.encoder_loader, own.remembers = keep(own.policy_loader), keep(own.encoder_loader), False
    elif isinstance(reward, Ensemble):
        reward.loader = keep(lambda member: load_resident(member, keep))
    return reward


def _keeper() -> Callable[[Any], Any]:
    """Makes a loader into one that loads each folder once, whichever of the loaders asks for it first."""
    found: dict[tuple[str, str], Any] = {}

    def keep(load: Callable[..., Any]) -> Callable[..., Any]:
        def loader(path: str | Path, *name: str) -> Any:
            key = load.__name__, os.path.realpath(path)
            if key not in found:
                found[key] = load(path, *name)
            return found[key]

        return loader

    return keep


def member_loader(features: Features | None = None) -> Callable[[Path], RewardModel]:
    """`load_reward` for the members of an ensemble: those on frozen features, which have one backbone, share what is computed."""
    shared = features

    def loader(member: Path) -> RewardModel:
        nonlocal shared
        reward = load_reward(member)
        if isinstance(reward, FeatureReward):
            shared = reward.features = shared or reward.features
        return reward

    return loader


def score_all(folders: Mapping[str, Path], prompts: Sequence[PromptContent], completions: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of every reward by its name, each of shape [len(prompts)]. Rewards are in memory one after the other; log-ratios of
    the same two policies share one pass over them, and an ensemble takes the scores of members that are asked for themselves.
    """
    rewards = {name: load_reward(folder) for name, folder in folders.items()}
    known: dict[Path, np.ndarray] = {}
    likelihoods: dict[tuple[str, ...], Any] = {}
    for name, reward in sorted(rewards.items(), key=lambda item: _turn(item[1])):
        if isinstance(reward, LogRatio):
            if reward.source not in likelihoods:
                likelihoods[reward.source] = reward.likelihoods(prompts, completions)
            scores = reward.from_likelihoods(*likelihoods[reward.source])
        elif isinstance(reward, Ensemble):
            scores = reward.score(prompts, completions, [known.get(member.resolve()) for member in reward.members])
        else:
            scores = reward.score(prompts, completions)
        known[folders[name].resolve()] = scores
    return {name: known[folder.resolve()] for name, folder in folders.items()}


def _turn(reward: RewardModel) -> int:
    """Ensembles come last, and a likelihood alone after the log-ratios, whose pass over both policies it shares."""
    return 2 if isinstance(reward, Ensemble) else int(isinstance(reward, LogRatio) and reward.alone)

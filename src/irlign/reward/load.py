"""A published reward, whatever its kind, from its folder."""

from pathlib import Path

from irlign.errors import ModelError
from irlign.files import read_json
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

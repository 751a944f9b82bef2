"""GAD: a discriminator learns demonstrations over the policy's own answers, pair by pair, and its logit is the reward of GRPO (arXiv 2511.10643).

`min_D E[-log s(D(x, y_shown) - D(x, y_own))]` (Bradley-Terry), `max_pi E[D(x, y)]`. Its authors refresh the discriminator at every step; here
it is learned once, from pi_SFT's answers, and stays: the frozen case, whose failure they show.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlign.files import read_json
from irlign.optimise.rloo import train_on_policy
from irlign.records import Demonstration, Sample
from irlign.reward.contrasts import answers_of, contrast_pairs
from irlign.reward.learn import train_reward_of
from irlign.reward.load import load_resident
from irlign.reward.train import RewardSettings
from irlign.training import TrainerSettings


def train_gad(
    sft: Path,
    train: Sequence[Sample],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    demonstrations: Sequence[Demonstration],
    discriminator: TrainerSettings,
    folder: Path,
    checkpoints: Path,
    **about: Any,
) -> dict[str, Any]:
    """Train a discriminator, from the policy in `sft`, on `demonstrations` over the answers `train` of that policy, then the policy against
    it (`train_on_policy`, which takes `about`). It lies in `discriminator` beside the policy. Returns that function's log, the discriminator's
    tokens among its `tokens`, and the discriminator's own as `discriminator`. Raises as it does.
    """
    place = folder.parent / "discriminator"
    if not (place / "reward.json").exists():
        own = RewardSettings(contrast="sft-demo", loss="bradley-terry", **discriminator.model_dump())
        answers = {"sft-demo": answers_of("sft-demo", sft=train, demonstrations=demonstrations)}
        options = {key: about[key] for key in ("chat_template", "seed", "report_to")}
        places: dict[str, Any] = {"folder": place, "checkpoints": checkpoints / "discriminator"}
        train_reward_of(own, sft, contrast_pairs(answers, match=True)[0], {"sft-demo": []}, **places, **options)
    learned = read_json(place / "reward.json")["training"]
    log = train_on_policy(sft, train, dev, settings, reward=load_resident(place), folder=folder, checkpoints=checkpoints, **about)
    return {**log, "tokens": log["tokens"] + learned["tokens"], "discriminator": learned}

"""GAD: a discriminator learns demonstrations over the policy's own answers, pair by pair, and its logit is the reward of GRPO (arXiv 2511.10643).

`min_D E[-log s(D(x, y_shown) - D(x, y_own))]` (Bradley-Terry), `max_pi E[D(x, y)]`. Its authors refresh the discriminator at every step; here
it is learned once, from pi_SFT's answers, and stays: the frozen case, whose failure they show.
"""

from pathlib import Path
from typing import Any

from irlign.data.splits import stored_demonstrations
from irlign.files import read_json
from irlign.optimise.work import Work
from irlign.reward.contrasts import answers_of, contrast_pairs
from irlign.reward.learn import train_reward_of
from irlign.reward.train import RewardSettings
from irlign.sampling.pools import stored_samples


def discriminator_of(work: Work, number: int) -> tuple[Path, dict[str, Any]]:
    """The folder and the training's log of a discriminator, trained from pi_SFT on the train demonstrations over pi_SFT's answers to their prompts; it
    lies beside the round's policy, and one that is there is kept. Raises ModelError on divergence."""
    place, checkpoints = work.round(number) / "discriminator", work.round(number) / "discriminator-checkpoints"
    if not (place / "reward.json").exists():
        own = RewardSettings(contrast="sft-demo", loss="bradley-terry", **work.settings.discriminator.model_dump())
        shown = stored_demonstrations(work.run, "train")
        pairs = contrast_pairs(
            {"sft-demo": answers_of("sft-demo", sft=stored_samples(work.run, "sft", "train"), demonstrations=shown)}, match=True
        )
        about: dict[str, Any] = {
            "chat_template": work.chat_template,
            "seed": work.run.seed,
            "report_to": work.report_to,
            "processes": work.processes,
            "section": "optimise.discriminator",
        }
        train_reward_of(own, work.run.path("policies/sft"), pairs[0], {"sft-demo": []}, folder=place, checkpoints=checkpoints, **about)
    return place, read_json(place / "reward.json")["training"]

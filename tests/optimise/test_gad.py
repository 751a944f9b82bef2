"""GAD: the discriminator puts demonstrations over own answers, and the policy learns what it wants."""

import numpy as np
import pytest

pytest.importorskip("trl")

from tiny import make_tiny_policy

from irlign.optimise.gad import train_gad
from irlign.optimise.rloo import OnPolicySettings, on_policy_config
from irlign.records import Demonstration, Prompt, Sample
from irlign.reward.load import load_reward
from irlign.sampling.engine import SamplingSettings
from irlign.training import TrainerSettings

PROMPTS = [Prompt.of(f"the {colour} {animal}", "train") for colour in ("red", "blue") for animal in ("cat", "dog", "bird")]
OWN = [Sample(p, i, text, "eos", 3, -1.0) for p in PROMPTS for i, text in enumerate((" ran!", " sang now!"))]
SHOWN = [Demonstration(p, " sat on the mat.") for p in PROMPTS]
DEV = [Demonstration(Prompt.of("a red cat", "dev"), " sat on the mat.")]


def test_the_discriminator_is_the_reward(tmp_path):
    policy = make_tiny_policy(tmp_path / "start")
    places = {"folder": tmp_path / "round/policy", "checkpoints": tmp_path / "round/checkpoints"}
    about = {"chat_template": "none", "seed": 0, "report_to": "none", "length_penalty": 0.0, "demonstrations": SHOWN}
    config = on_policy_config("grpo", OnPolicySettings(num_generations=4), SamplingSettings(max_new_tokens=8))
    settings = TrainerSettings(learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=8, trainer={"logging_steps": 1})
    discriminator = TrainerSettings(learning_rate=1e-2, num_train_epochs=8)
    log = train_gad(policy, OWN, DEV, settings, config=config, discriminator=discriminator, **about, **places)
    reward = load_reward(tmp_path / "round/discriminator")
    asked = [p.content for p in PROMPTS]
    better, worse = (reward.score(asked, [text] * 6) for text in (" sat on the mat.", " sang now!"))
    assert (better > worse).all() and log["discriminator"]["steps"] == 8
    assert log["steps"] == 6 and np.isfinite(log["losses"]).all() and log["rows"] == 6
    prompts = log["tokens"] - log["discriminator"]["tokens"] - log["drawn"]
    assert 0 < log["drawn"] <= 48 * 8 and prompts == 48 * 4  # BOS and three words before each of 48 answers

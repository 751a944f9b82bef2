"""A reward that stays in memory scores as the one that is loaded anew, and loads each network once."""

import pytest
from tiny import make_tiny_policy

from irlign.files import write_json
from irlign.reward import features, log_ratio
from irlign.reward.feature_reward import FeatureReward
from irlign.reward.features import Features, LogisticHead
from irlign.reward.load import load_resident, load_reward

PROMPTS, TEXTS = ["the cat", "a dog", "the cat"], [" sat.", " ran home.", " sang!"]


@pytest.fixture
def ensemble(tmp_path):
    """Two heads on features of pi_SFT in folders of their own, and the likelihood under it: three members over one network."""
    import numpy as np

    make_tiny_policy(tmp_path / "policies/sft", seed=1)
    rng = np.random.default_rng(0)
    members = []
    for name in ("a", "b"):
        known = Features(tmp_path / "policies/sft", "none")
        x = known(PROMPTS, TEXTS).astype(float)
        FeatureReward(known, [LogisticHead(x, np.array([1, 0, 1]), rng.random(3), 0.1)], "mean", 0.0, name).save(
            tmp_path / "rewards" / name
        )
        about = {"kind": "features", "head": "logistic", "heads": 1, "aggregate": "mean", "variance_penalty": 0.0}
        write_json(
            tmp_path / "rewards" / name / "reward.json", {**about, "name": name, "encoder": "../../policies/sft", "chat_template": "none"}
        )
        members.append(f"../{name}")
    sides = {side: {"path": "../../policies/sft"} for side in ("sft", "init")}
    about = {"kind": "log-ratio", "name": "likelihood", "chat_template": "none", "normalise": True, "alone": True, "inputs": sides}
    write_json(tmp_path / "rewards/likelihood/reward.json", about)
    about = {"kind": "ensemble", "name": "all", "members": [*members, "../likelihood"], "aggregate": "mean", "variance_penalty": 0.0}
    write_json(tmp_path / "rewards/all/reward.json", about)
    return tmp_path / "rewards/all"


def test_each_network_once(ensemble, monkeypatch):
    loads = []
    for module in (features, log_ratio):
        real = module.load_policy

        def counted(path, name="policy", real=real):
            loads.append(path)
            return real(path, name)

        counted.__name__ = "load_policy"
        monkeypatch.setattr(module, "load_policy", counted)
    expected = load_reward(ensemble).score(PROMPTS, TEXTS)
    anew = len(loads)
    resident = load_resident(ensemble)
    first = resident.score(PROMPTS, TEXTS)
    assert len(loads) == anew + 1 == 3  # loaded anew, the likelihood has one of its own
    assert (resident.score(PROMPTS[::-1], TEXTS[::-1])[::-1] == pytest.approx(first)) and len(loads) == 3
    assert first == pytest.approx(expected) and len(set(expected.round(6))) == 3
    assert not any(resident.loader(member).features.known for member in resident.members[:2])  # nothing piles up

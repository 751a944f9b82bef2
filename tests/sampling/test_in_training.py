"""Answers between two steps of a training: those of the seeds that the global random state gives, each process its own, and the model as it was."""

import pytest
import torch
from tiny import make_tiny_policy

from irlign.policy.load import load_policy
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.in_training import draw_in_training


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(str(make_tiny_policy(tmp_path_factory.mktemp("policy"))))


def _draw(policy, process=0, context=64):
    torch.manual_seed(3)
    about = {"ends": [2], "pad_id": policy.pad_id, "context": context, "process": process}
    return draw_in_training(policy.model, [[1, 5, 6]] * 6 + [[1, 7]], SamplingSettings(max_new_tokens=12), **about)


def test_the_random_state_says_what_is_drawn_and_each_process_has_its_own(policy):
    policy.model.train()
    first, again, other = _draw(policy), _draw(policy), _draw(policy, process=1)
    assert policy.model.training and first == again != other and len({tuple(ids) for ids in first[:6]}) > 1
    assert all(2 not in ids[:-1] and (len(ids) == 12 or ids[-1] == 2) for ids in first)
    policy.model.eval()
    assert _draw(policy) == first and not policy.model.training


def test_no_answer_is_longer_than_the_context(policy):
    assert max(map(len, _draw(policy, context=8)[:6])) <= 5

"""log pi(y | x) against a plain sum, whatever the batch."""

import itertools

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy

from irlign import forward
from irlign.data.chat import Encoded, Format
from irlign.policy.likelihood import answer_log_probs, mean_nll, sequence_log_probs, token_log_probs
from irlign.policy.load import load_policy
from irlign.records import Prompt, Sample

PROMPTS = ["the cat", "The red bird sang on the mat.", "a", "the dog ran home and", "now"]
COMPLETIONS = [" sat.", " and the dog ran", " cat sat on the red mat. The bird sang now!", "", " the"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(str(make_tiny_policy(tmp_path_factory.mktemp("policy"))))


def _plain(policy, row: Encoded) -> float:
    """One row alone, one token at a time."""
    with torch.inference_mode():
        logprobs = policy.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[t - 1, row.ids[t]]) for t in range(len(row.prompt_ids), len(row)))


def test_it_is_the_sum_of_token_log_probabilities(policy):
    rows = Format(policy.tokenizer).encode(PROMPTS, COMPLETIONS)
    expected = [_plain(policy, row) for row in rows]
    assert sequence_log_probs(policy, rows) == pytest.approx(expected, abs=1e-4)
    tokens = sum(len(row.completion_ids) for row in rows)
    assert mean_nll(policy, rows) == pytest.approx(-sum(expected) / tokens, abs=1e-5)


def test_every_token_has_its_own_alone_and_with_others_after_the_same_prompt(policy):
    rows = Format(policy.tokenizer).encode([PROMPTS[0]] * 3, COMPLETIONS[:3])
    rows.append(Encoded(rows[0].prompt_ids, []))
    for row, own in zip(rows, token_log_probs(policy, rows), strict=True):
        with torch.inference_mode():
            logprobs = policy.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        expected = [float(logprobs[t - 1, row.ids[t]]) for t in range(len(row.prompt_ids), len(row))]
        assert own.shape == (len(row.completion_ids),) and own == pytest.approx(np.array(expected), abs=1e-4)


def test_the_batch_changes_nothing(policy, monkeypatch):
    rows = Format(policy.tokenizer).encode(PROMPTS, COMPLETIONS)
    together = sequence_log_probs(policy, rows)
    backwards = sequence_log_probs(policy, rows[::-1])[::-1]
    monkeypatch.setattr(forward, "CPU_TOKENS", 1)
    alone = sequence_log_probs(policy, rows)
    assert np.abs(together - alone).max() < 1e-4 and np.abs(together - backwards).max() < 1e-4


def test_completions_of_a_tiny_vocabulary_sum_to_one(policy):
    """All ways to go on for up to two tokens: ended now, ended after one, or any two tokens (no EOS first)."""
    size, eos = policy.model.config.vocab_size, 2
    prompt = Format(policy.tokenizer).prompt_ids("the cat")
    ended = [Encoded(prompt, [eos])]
    two = [Encoded(prompt, [a, b]) for a, b in itertools.product(range(size), repeat=2) if a != eos]
    assert np.exp(sequence_log_probs(policy, [*ended, *two])).sum() == pytest.approx(1, abs=1e-4)


def test_a_stored_answer_has_eos_only_where_it_ended_by_it(tmp_path):
    folder = make_tiny_policy(tmp_path)
    loaded = load_policy(str(folder))
    prompt = Prompt.of("the cat", "dev")
    samples = [Sample(prompt, i, " sat on", reason, 3, 0.0) for i, reason in enumerate(("eos", "length", "stop"))]
    row = Format(loaded.tokenizer).encode(["the cat"], [" sat on"])[0]
    expected = [_plain(loaded, row), *[_plain(loaded, Encoded(row.prompt_ids, row.completion_ids[:-1]))] * 2]
    assert answer_log_probs(folder, samples, chat_template="auto") == pytest.approx(expected, abs=1e-4)
    assert expected[0] < expected[1]


def test_a_row_longer_than_the_context_is_cut_to_it(tmp_path):
    """A model with learned positions has none beyond its context."""
    policy = load_policy(str(make_tiny_policy(tmp_path, architecture="gpt2")))
    row = Format(policy.tokenizer).encode(["the cat"], [" sat" * 70])[0]
    assert len(row) > 64
    assert sequence_log_probs(policy, [row])[0] == pytest.approx(_plain(policy, row.within(64)), abs=1e-4)

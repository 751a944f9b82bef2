"""Draws against the exact law: chi-square for every filter, small and large vocabularies, and the ends of the interval."""

import numpy as np
import pytest
import torch
from scipy import stats

from irlign.sampling.draw import BLOCK, NUCLEUS, draw_tokens
from irlign.sampling.engine import SamplingSettings


def _exact(logits, settings):
    """The law in NumPy, token by token: temperature, then the k likeliest, then the smallest set that reaches p."""
    law = np.exp(np.asarray(logits, dtype=float) / settings.temperature)
    law /= law.sum()
    order = np.argsort(-law)
    kept = order[: settings.top_k or len(law)]
    share = law[kept] / law[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(share), settings.top_p)) + 1]
    out = np.zeros_like(law)
    out[kept] = law[kept] / law[kept].sum()
    return out


SETTINGS = [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_p": 0.8}, {"top_k": 7}, {"top_k": 40, "top_p": 0.7, "temperature": 0.8}]


@pytest.mark.parametrize("vocabulary", [30, 2 * BLOCK, 7 * BLOCK + 1, NUCLEUS + 3 * BLOCK - 1])
@pytest.mark.parametrize("settings", [SamplingSettings(**s) for s in SETTINGS], ids=[str(s) for s in SETTINGS])
def test_draws_follow_the_law(vocabulary, settings):
    count, rng = 20_000, np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=vocabulary) * 1.5).float()
    tokens, logprobs = draw_tokens(logits.expand(count, -1), torch.from_numpy(rng.random(count)), settings)
    law = _exact(logits, settings)
    counts = np.bincount(tokens.numpy(), minlength=vocabulary)
    assert not counts[law == 0].any()
    order = np.argsort(-law)
    edges = np.flatnonzero(np.diff(np.floor(np.cumsum(law[order]) * 40), prepend=0.0))  # groups of tokens of 1/40 or more
    edges = edges[edges > 0]
    observed, expected = (np.add.reduceat(x[order], [0, *edges]) for x in (counts, law * count))
    observed, expected = observed[expected > 5], expected[expected > 5]
    expected *= observed.sum() / expected.sum()
    assert len(expected) > 3 and stats.chisquare(observed, expected).pvalue > 0.001
    assert stats.chisquare(observed, np.roll(expected, 1)).pvalue < 1e-6  # the test has power
    assert logprobs.numpy() == pytest.approx(logits.log_softmax(-1)[tokens].numpy(), abs=1e-5)


def test_the_blocks_invert_the_same_cumulative_sum():
    """Against one cumulative sum in float64 over 50,257 tokens: the same tokens, but for uniforms at a boundary."""
    rng = np.random.default_rng(2)
    logits, uniforms = torch.from_numpy(rng.normal(size=(500, 50_257)) * 3).float(), torch.from_numpy(rng.random(500))
    tokens, _ = draw_tokens(logits, uniforms, SamplingSettings())
    cumulative = np.cumsum(logits.double().softmax(-1).numpy(), axis=1)
    plain = [int(np.searchsorted(row, u, side="right")) for row, u in zip(cumulative, uniforms.numpy(), strict=True)]
    assert np.mean(tokens.numpy() == plain) > 0.99
    reached = cumulative[np.arange(500), tokens.numpy()]
    assert (reached > uniforms.numpy() - 1e-6).all()


def test_a_flat_law_needs_more_than_the_first_thousand():
    """Top-p keeps 3,000 of 4,000 equally likely tokens."""
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits = torch.zeros(4000) + torch.arange(4000) * 1e-7
    tokens, _ = draw_tokens(logits.expand(4000, -1), uniforms, SamplingSettings(top_p=0.75))
    assert len(set(tokens.tolist())) == pytest.approx(3000, abs=3)


LAW = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])  # in order: tokens 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 0.75}, {1, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 2, "top_p": 0.5}, {1}),  # of the two kept, token 1 has 4/7
        ({"top_k": 3, "top_p": 0.99}, {1, 3, 4}),
        ({"temperature": 0.2, "top_p": 0.75}, {1}),  # 0.4^5 is 76 % of the fifth powers
    ],
)
def test_the_filters_keep_the_right_tokens_in_the_right_shares(settings, kept):
    uniforms = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    settings = SamplingSettings(**settings)
    tokens, logprobs = draw_tokens(LAW.log().expand(2000, -1), uniforms, settings)
    assert set(tokens.tolist()) == kept
    tempered = LAW[0] ** (1 / settings.temperature)
    share = {t: float(tempered[t]) / sum(float(tempered[k]) for k in kept) for t in kept}
    for token in kept:
        assert (tokens == token).double().mean() == pytest.approx(share[token], abs=0.002)
    assert torch.allclose(logprobs, LAW[0, tokens].log(), atol=1e-6)  # of the whole law at temperature 1


def test_the_largest_uniform_never_draws_a_token_of_weight_0():
    top = torch.tensor([1 - 2.0**-53, 0.0], dtype=torch.float64)
    impossible_at_the_ends = torch.tensor([[-torch.inf, 0.0, 0.5, -torch.inf]]).expand(2, -1)
    assert draw_tokens(impossible_at_the_ends, top, SamplingSettings())[0].tolist() == [2, 1]
    assert draw_tokens(impossible_at_the_ends, top, SamplingSettings(top_k=1))[0].tolist() == [2, 2]


@pytest.mark.parametrize("vocabulary", [2 * BLOCK + 1, 5 * BLOCK])
def test_no_block_of_weight_0_is_drawn_from(vocabulary):
    logits = torch.full((3, vocabulary), -torch.inf)
    logits[:, [BLOCK + 3, 2 * BLOCK]] = torch.tensor([0.0, 1.0])
    uniforms = torch.tensor([0.0, 0.2, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits, uniforms, SamplingSettings())[0].tolist() == [BLOCK + 3, BLOCK + 3, 2 * BLOCK]

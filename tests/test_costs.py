"""The cost model against numbers worked by hand, and against a real model's parameters."""

import pytest

from irlign.costs import LOGITS, OPTIMIZED, SAVED, Shape, llama, member_share, pairs, steps

# 1,000 parameters: 200 are looked up, 200 are the output layer's, so 800 multiply, and 600 below the output layer
SMALL = Shape(1000, looked_up=200, head=200, layers=2, hidden=10, attention=8, kept=4, vocabulary=20)


def test_forward_by_hand():
    assert SMALL.forward(5, 0) == 5 * 2 * 800
    assert SMALL.forward(5, 0, head=False) == 5 * 2 * 600
    assert SMALL.forward(5, 3) == 5 * (1600 + 4 * 2 * 8 * 3)  # scores and values: 2 products of 2 operations, 2 layers, width 8
    assert SMALL.read(4, 6) == SMALL.forward(24, 3)


def test_training_by_hand():
    assert SMALL.trained(4, 6) == 3 * 24 * (1600 + 64 * 3)
    assert SMALL.trained(4, 6, adapter=True) == 2 * 24 * (1600 + 64 * 3)
    assert 3 * SMALL.forward(1, 0) == 6 * 800  # the familiar 6 N


def test_sampling_by_hand():
    """2 prompts of 6 tokens read once, 10 answers of 4 tokens that see 6 + 2 tokens on average: answers share their prompt."""
    assert SMALL.drawn(2, 10, 6, 4) == 12 * (1600 + 64 * 3) + 40 * (1600 + 64 * 8)


def test_memory_by_hand():
    assert SMALL.cache(7, 2) == 2 * 7 * 2 * 4 * 2
    assert SMALL.training_memory(3, 5, True, False) == 1000 * OPTIMIZED + 15 * (SAVED * 2 * 10 + LOGITS * 20)
    assert SMALL.training_memory(3, 5, False, True) == 4000 + 15 * SAVED * 20
    assert SMALL.sampling_memory(3, 5, 2) == 2000 + 2 * 15 * 2 * 4 * 2 + 3 * LOGITS * 20
    assert SMALL.scoring_memory(10, True) == 4000 + 10 * 4 * (80 + 40)


def test_counts_by_hand():
    assert steps(400, 16, 4) == 100 and steps(400, 16, 4, most=30) == 30 and steps(400, 16, 4, most=-1) == 100
    assert pairs(4, 8) == 8 and pairs(0, 8) == 0
    assert [member_share(k) for k in (1, 2, 4)] == [1, 1, 3]  # two members see half of the pairs each


@pytest.mark.parametrize("sizes", [(587, 96, 3, 4, 256), (100, 16, 1, 2, 32)])
def test_a_worlds_model_has_as_many_parameters(sizes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, layers, heads, intermediate = sizes
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        assert LlamaForCausalLM(config).num_parameters() == llama(*sizes).parameters

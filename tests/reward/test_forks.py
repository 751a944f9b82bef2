"""Pairs in one row: by hand, and the same rewards and gradients as rows of their own, for every family that shares prompts."""

import pytest
import torch
import transformers as t
from families import FAMILIES, IDS

from irlign.data.chat import Encoded, pad
from irlign.reward.forks import BETTER, NONE, SHARED, WORSE, can_fork, collate, read, visible

PAD = 3
PAIRS = [
    (Encoded([7, 8, 9], [10, 2]), Encoded([7, 8, 9], [11, 12, 13, 2])),
    (Encoded([7], [14, 15, 16, 2]), Encoded([7], [17, 2])),
    (Encoded([5, 6], [2]), Encoded([6], [20, 2])),  # one prompt was cut
]
EAGER = {"gemma2"}  # soft-capped scores: no attention that takes a mask of ours


def _model(family):
    config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return t.AutoModelForSequenceClassification.from_config(config(**IDS, **sizes, num_labels=2)).eval()


def _apart(model):
    ids, mask = pad([row.ids for side in zip(*PAIRS, strict=True) for row in side], PAD)
    return model(input_ids=ids, attention_mask=mask).logits


def test_the_batch_by_hand():
    batch = collate(PAIRS, PAD)
    assert batch["input_ids"].tolist()[1:] == [[7, 14, 15, 16, 2, 17, 2, 3, 3], [5, 6, 2, 6, 20, 2, 3, 3, 3]]
    assert batch["position_ids"].tolist()[1:] == [[0, 1, 2, 3, 4, 1, 2, 0, 0], [0, 1, 2, 0, 1, 2, 0, 0, 0]]
    assert batch["segments"].tolist()[1] == [SHARED] + [BETTER] * 4 + [WORSE] * 2 + [NONE] * 2
    assert batch["ends"].tolist() == [[4, 4, 2], [8, 6, 5]]
    assert batch["attention_mask"].sum() == sum(len(row) for pair in PAIRS for row in pair)


def test_what_a_token_sees_by_hand():
    seen = visible(torch.tensor([[SHARED, BETTER, WORSE, WORSE, NONE]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_those_of_rows_of_their_own(family):
    model = _model(family)
    longest = max(PAIRS, key=lambda pair: max(map(len, pair)))
    if not can_fork(model, longest, PAD):
        assert family in EAGER | {"mistral", "qwen2", "gemma3"}, "a family without a window can be forked"
        return
    gradients = []
    for logits in (read(model, collate(PAIRS, PAD)), _apart(model)):
        model.zero_grad()
        (logits**2).sum().backward()
        gradients.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-4)
    for own, apart in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(own, apart, rtol=1e-3, atol=1e-3 * max(1.0, float(apart.abs().max())))


def test_models_that_cannot_are_found_out():
    torch.manual_seed(0)
    bert = t.BertConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1)
    assert not can_fork(t.AutoModelForSequenceClassification.from_config(bert), PAIRS[0], PAD)
    far = (Encoded([7] * 8, [10, 11, 12, 2]), Encoded([7] * 8, [13, 14, 15, 2]))
    assert not can_fork(_model("mistral"), far, PAD), "a window of 5 does not reach over a row of 12"
    assert can_fork(_model("llama"), far, PAD)
    eager = _model("llama")
    eager.set_attn_implementation("eager")
    assert not can_fork(eager, far, PAD)
    assert can_fork(_model("gpt2").train(), far, PAD), "dropout is off while it is found out"

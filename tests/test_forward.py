"""Rows through a model: a shared prompt gives what the whole row gives, in whatever batches, and is read once."""

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from irlign import forward
from irlign.data.chat import Encoded
from irlign.errors import ModelError
from irlign.forward import each_batch, reads_alike

PROMPTS = [[1, 7, 8], [1, 9, 10, 11, 12, 7], [5], [1, 13, 14, 15], [8, 9]]
ANSWERS = [[20, 21, 2], [2], [22, 9, 10, 30, 2], [25, 2]]
ROWS = [Encoded(p, a) for a in ANSWERS for p in PROMPTS] + [Encoded([1, 30, 31], [22, 2])]


def batches(model, rows, pad_id, **most):
    found = []
    each_batch(model, rows, pad_id, found.append, where="the test", **most)
    return found


def _model(kind, folder):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.25}
    torch.manual_seed(0)
    if kind == "mistral":  # a window shorter than the texts
        heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
        return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes, state_size=8, use_cache=True)).eval()
    return AutoModelForCausalLM.from_pretrained(make_tiny_policy(folder, architecture=kind)).eval()


def _alone(model, row):
    """Logits of the answer and of the token before it, the row by itself."""
    return model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, len(row.prompt_ids) - 1 :]


@pytest.mark.parametrize("budget", [1, 12, 1024])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mamba"])
def test_every_row_once_and_as_it_is_alone(kind, budget, tmp_path, monkeypatch):
    model = _model(kind, tmp_path)
    monkeypatch.setattr(forward, "CPU_TOKENS", budget)
    seen = []
    with torch.inference_mode():
        for batch in batches(model, ROWS, pad_id=3):
            logits_B_T_V = model(**batch.inputs).logits
            for place, row, logits_T_V in zip(batch.places, batch.rows, logits_B_T_V, strict=True):
                assert row.completion_ids == ROWS[place].completion_ids and row.prompt_ids[-1] == ROWS[place].prompt_ids[-1]
                found = logits_T_V[len(row.prompt_ids) - 1 : len(row)]
                assert (found - _alone(model, ROWS[place])).abs().max() < 1e-4
                seen.append(place)
    assert sorted(seen) == list(range(len(ROWS)))


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("gpt2", True), ("mistral", True), ("mamba", False)])
def test_a_prompt_of_several_answers_is_read_once(kind, shares, tmp_path):
    model = _model(kind, tmp_path)
    with torch.inference_mode():
        read = [(place, row) for batch in batches(model, ROWS, pad_id=3) for place, row in zip(batch.places, batch.rows, strict=True)]
    for place, row in read:
        several = len(ROWS[place].prompt_ids) > 1 and place != len(ROWS) - 1  # the last row's prompt has one answer
        assert len(row.prompt_ids) == (1 if several and shares else len(ROWS[place].prompt_ids))


def test_a_short_prompts_long_answers_beside_a_long_prompt(tmp_path):
    """All in one batch of a model with 64 positions: 48 + 41 columns, of which each row has 54 at most."""
    model = _model("gpt2", tmp_path)
    rows = [Encoded([1, *[7] * (size - 1)], [*[20 + i] * (length - 1), 2]) for size, length in ((49, 5), (3, 40)) for i in range(2)]
    with torch.inference_mode():
        (batch,) = batches(model, rows, pad_id=3)
        assert sorted(batch.places) == [0, 1, 2, 3] and batch.inputs["attention_mask"].shape == (4, 48 + 41)
        for place, row, logits_T_V in zip(batch.places, batch.rows, model(**batch.inputs).logits, strict=True):
            assert (logits_T_V[: len(row)] - _alone(model, rows[place])).abs().max() < 1e-4


def test_memory_that_holds_no_row_names_the_text_as_it_is(tmp_path):
    def work(batch):
        raise RuntimeError("CUDA out of memory")

    rows = [Encoded([1] * 41, [20, 2]), Encoded([1] * 41, [21, 2])]  # each weighs 11: its own 3 tokens and the 40 before them, a fourth
    with torch.inference_mode(), pytest.raises(ModelError, match="out of memory with one text of 43 tokens"):
        each_batch(_model("llama", tmp_path), rows, 3, work, where="the test")


def test_a_batch_stays_within_its_tokens(tmp_path):
    model = _model("llama", tmp_path)
    rows = [Encoded([1] * 41, [*range(5, 5 + n), 2]) for n in range(1, 20)]
    with torch.inference_mode():
        sizes = [batch.inputs["attention_mask"].shape for batch in batches(model, rows, pad_id=3, most=60)]
        own = [batch.inputs["input_ids"].shape for batch in batches(model, rows, pad_id=3, most=60)]
    assert len(own) > 3 and np.prod(own, axis=1).max() <= 60 and np.prod(sizes, axis=1).max() <= 60 * forward.KEPT


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_ways_of_reading_by_hand(dtype, near, tmp_path):
    model, plain = _model("llama", tmp_path).to(dtype), torch.tensor([[8.0, -4.0], [0.0, 1.0]])
    for off, alike in ((0.9 * near, True), (1.1 * near, False)):  # the largest of the second row is 1, of the first 8
        assert reads_alike(model, lambda off=off: plain + torch.tensor([[0.0, 0.0], [off, 0.0]]), lambda: plain) is alike
    assert not reads_alike(model, lambda: plain[:1], lambda: plain), "another number of rows"
    assert not reads_alike(model, lambda: plain * float("nan"), lambda: plain)
    assert not reads_alike(model, lambda: model(nothing=1).logits, lambda: plain), "the model refuses"


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_ways_are_compared(training, tmp_path):
    model = _model("llama", tmp_path).train(training)
    assert reads_alike(model, lambda: torch.ones(1) * (1 + model.training), lambda: torch.ones(1))
    assert model.training is training

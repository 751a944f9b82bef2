"""Weights that are laid out once: the same numbers as the layer's own, and nothing of it left behind."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from irlign import packed as module
from irlign.packed import PAYS_FROM, pack, packed

WIDE = {"vocab_size": 600, "pad_token_id": 0}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=1, n_head=4, n_positions=32, **WIDE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=640, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **WIDE)),
}  # fmt: skip


def _large(model):
    return [layer for layer in model.modules() if module._fits(layer)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_same_logits_and_the_layers_are_as_before(name, dtype, near):
    """Where this torch has no such products the layers stay as they are, and this is trivially true."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    ids = torch.randint(1, 600, (3, 9))
    large = len(_large(model))
    assert large >= 4  # both layers of attention or more, of the feed-forward, and the output
    with torch.inference_mode():
        plain = model(ids).logits
        with packed(model):
            assert len(_large(model)) == (0 if module._works(dtype) else large)
            found, empty = model(ids).logits, model.lm_head(torch.zeros(0, 512, dtype=dtype))
            with packed(model):  # one inside another takes nothing back
                pass
            again = model(ids).logits
    assert len(_large(model)) == large and torch.equal(again, found) and empty.shape == (0, 600)
    assert (found - plain).abs().max() <= near * plain.abs().max()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)


def test_a_row_is_the_same_alone_and_among_others():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    ids = torch.randint(1, 600, (16, 9))
    with torch.inference_mode(), packed(model):
        assert model(ids).logits[5] == pytest.approx(model(ids[5:6]).logits[0], abs=1e-5)


def test_weights_that_change_are_laid_out_anew():
    """What is read before and after a training is never read with the weights of before."""
    model = MODELS["gpt2"]().eval()
    ids = torch.randint(1, 600, (1, 9))
    with torch.inference_mode(), packed(model):
        before = model(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with torch.inference_mode():
        plain = model(ids).logits
        with packed(model):
            assert (model(ids).logits - plain).abs().max() < 1e-3 < (plain - before).abs().max()


def test_where_it_does_not_pay_or_fit_nothing_changes(monkeypatch):
    model = MODELS["gpt2"]().eval()
    with packed(model, PAYS_FROM - 1):
        assert _large(model)
    monkeypatch.setattr(module, "total_memory", lambda: 4 * 2**20)
    assert pack(model) == [] and _large(model)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_works", lambda dtype: False)
    assert pack(model) == [] and _large(model)


def test_memory_that_runs_out_on_the_way_leaves_no_layer_packed(monkeypatch):
    model, lay_out, calls = MODELS["gpt2"]().eval(), module._lay_out, []

    def scarce(weight):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError
        return lay_out(weight)

    monkeypatch.setattr(module, "_works", lambda dtype: True)
    monkeypatch.setattr(module, "_lay_out", scarce)
    large = len(_large(model))
    assert pack(model) == [] and len(_large(model)) == large and len(calls) == 3


def test_a_torch_without_these_products_is_found_out(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operation")

    monkeypatch.setattr(module, "_lay_out", missing)
    assert module._works.__wrapped__(torch.float32) is False
    monkeypatch.setattr(module, "_lay_out", lambda weight: None)
    monkeypatch.setattr(module, "_product", lambda *a: torch.zeros(1, 3, 64))
    assert module._works.__wrapped__(torch.float32) is False


def test_under_autocast_torch_does_it_as_without():
    model = MODELS["llama"]().eval()
    ids = torch.randint(1, 600, (2, 9))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = model(ids).logits
        with packed(model):
            assert torch.equal(model(ids).logits, plain)

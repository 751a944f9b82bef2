"""The golden reward: a function, a checkpoint, and what is refused."""

import pytest
from tiny import make_tiny_tokenizer

from irlign.errors import ConfigError, GuardError, ModelError
from irlign.evaluate.golden import guard_golden, load_golden, score_golden

MODULE = """
def length(prompts, completions):
    return [len(c) for c in completions]
def short(prompts, completions):
    return [1.0]
def broken(prompts, completions):
    return [float("nan") for _ in completions]
def wrong(prompts):
    return []
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "golden_for_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_a_function_of_your_own(module):
    golden = load_golden("golden_for_test:length")
    assert score_golden(golden, ["p", "q"], ["a", "bcd"], "mine").tolist() == [1, 3]


@pytest.mark.parametrize(("name", "message"), [("short", "gave shape"), ("broken", "not finite"), ("wrong", "failed: ")])
def test_a_function_that_misbehaves(module, name, message):
    with pytest.raises(ConfigError, match=message):
        score_golden(load_golden(f"golden_for_test:{name}"), ["p", "q"], ["a", "b"], name)


def test_what_is_not_there(module, tmp_path):
    for spec, message in (("golden_for_test:none", "has no none"), ("no_such_module:f", "cannot be imported")):
        with pytest.raises(ConfigError, match=message):
            load_golden(spec)
    with pytest.raises(ModelError, match="no golden reward can be loaded"):
        load_golden(str(tmp_path))


@pytest.mark.parametrize("labels", [1, 2])
def test_a_checkpoint(tmp_path, labels):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 3}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=60, num_labels=labels, **shape)).eval()
    model.save_pretrained(tmp_path / "good")
    make_tiny_tokenizer().save_pretrained(tmp_path / "good")
    golden = load_golden(str(tmp_path / "good"))
    together = golden(["the cat", "a dog"], [" ran.", " sat on the mat."])
    assert together == pytest.approx([golden(["the cat"], [" ran."])[0], golden(["a dog"], [" sat on the mat."])[0]], abs=1e-5)
    with torch.no_grad():
        logits = model(**make_tiny_tokenizer()("the cat ran.", return_tensors="pt")).logits[0]
    assert together[0] == pytest.approx((logits[-1] - (logits[0] if labels == 2 else 0)).item(), abs=1e-5)
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **shape)).save_pretrained(tmp_path / "bad")
    make_tiny_tokenizer().save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match="has no trained head"):
        load_golden(str(tmp_path / "bad"))


def test_a_model_of_the_run_itself_is_refused(tmp_path):
    (tmp_path / "rewards/init-sft").mkdir(parents=True)
    with pytest.raises(GuardError, match="this very run"):
        guard_golden(str(tmp_path / "rewards/init-sft"), [tmp_path / "rewards"])
    guard_golden(str(tmp_path / "elsewhere"), [tmp_path / "rewards"])
    guard_golden(None, [tmp_path / "rewards"])

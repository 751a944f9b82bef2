"""Loading and saving policies, and what is refused."""

import json
import shutil

import pytest
import torch
from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign.errors import ModelError
from irlign.policy.load import check_causal, context_length, load_config, load_policy, save_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def _logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 10, 12, 14, 4]])).logits


def test_a_saved_policy_is_a_plain_checkpoint(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = load_policy(str(folder), "init")
    assert policy.name == "init" and not policy.model.training
    assert (policy.pad_id, policy.max_length) == (3, 64)
    save_policy(policy, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(_logits(again), _logits(policy.model))
    text = "The cat sat."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == policy.tokenizer(text)["input_ids"]


def test_eos_stands_in_for_a_missing_pad(tmp_path):
    tokenizer = make_tiny_tokenizer(special=False)
    tokenizer.eos_token = "</s>"
    assert load_policy(str(make_tiny_policy(tmp_path, tokenizer=tokenizer))).pad_id == 2


def test_context_length():
    from transformers import GPT2Config, LlamaConfig, MambaConfig

    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=33)) == 33
    assert context_length(MambaConfig()) == 2048  # states none


def test_a_missing_folder():
    with pytest.raises(ModelError, match="no such model folder") as caught:
        load_policy("/nowhere/at/all")
    assert caught.value.where == "/nowhere/at/all" and "Hub id" in str(caught.value)


def test_a_name_that_is_no_folder_was_asked_of_the_hub(monkeypatch):
    def refuse(*_, **__):
        raise OSError("cannot reach it")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"no folder has this name, so it was asked of the Hub") as caught:
        load_config("nomodel")
    assert "HF_HUB_OFFLINE" not in str(caught.value)  # it is set in the tests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError, match=r"asked of the Hub.*HF_HUB_OFFLINE=1"):
        load_config("nomodel")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no usable tokenizer"),
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint(folder, tmp_path, damage, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    damage(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(str(broken))
    assert caught.value.where == str(broken) and "\n" not in caught.value.what


def test_missing_weights_are_an_error_and_not_random(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="9 weights are missing"):
        load_policy(str(broken))


def test_a_classifier_is_no_policy(folder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, no causal language model"):
        load_policy(str(tmp_path))


def test_a_tokenizer_that_is_too_big(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "p")
    with pytest.raises(ModelError, match="44 tokens and the model only 43"):
        load_policy(str(tmp_path / "p"))


def test_a_checkpoint_with_sampling_fields_can_be_saved(folder, tmp_path):
    """Many published checkpoints carry temperature and top_p beside do_sample=false."""
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p/generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}))
    save_policy(load_policy(str(tmp_path / "p")), tmp_path / "out")
    assert load_policy(str(tmp_path / "out")).model.generation_config.eos_token_id == [2, 5]


def test_an_adapter_becomes_a_plain_model(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_policy(str(folder))
    adapted = peft.get_peft_model(base.model, peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    expected = _logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(str(tmp_path / "adapter"))
    assert torch.allclose(_logits(loaded.model), expected, atol=1e-5)
    assert not torch.allclose(expected, _logits(load_policy(str(folder)).model), atol=1e-2)
    save_policy(loaded, tmp_path / "plain")
    assert not (tmp_path / "plain/adapter_config.json").exists()
    assert torch.allclose(_logits(load_policy(str(tmp_path / "plain")).model), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "xlnet"])
def test_a_model_without_past_key_values_is_refused_by_its_configuration_alone(kind, tmp_path):
    from transformers import MambaConfig, XLNetConfig

    {"mamba": MambaConfig, "xlnet": XLNetConfig}[kind](architectures=["XLNetLMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{kind} models keep their past in another way") as error:
        check_causal(str(tmp_path))
    assert error.value.where == str(tmp_path) and "attention layers" in error.value.do


def test_a_model_with_linear_attention_in_some_layers_is_a_policy(tmp_path):
    from transformers import Lfm2Config

    Lfm2Config(architectures=["Lfm2ForCausalLM"]).save_pretrained(tmp_path)
    check_causal(str(tmp_path))

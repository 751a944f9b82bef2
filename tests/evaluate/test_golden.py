"""The golden reward: a function, a checkpoint, and what is refused."""

import sys

import pytest
from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign.errors import ConfigError, GuardError, ModelError
from irlign.evaluate.golden import golden_inputs, guard_golden, load_golden, score_golden

MODULE = """
def length(prompts, completions):
    return [len(c) for c in completions]
def short(prompts, completions):
    return [1.0]
def broken(prompts, completions):
    return [float("nan") for _ in completions]
def wrong(prompts):
    return []
def missing(prompts, completions):
    return {}["no such answer"]
def half(prompts, completions):
    assert len(completions) == 1, "one at a time"
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "golden_for_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "golden_for_test", raising=False)  # that of another test


def test_a_function_of_your_own(module):
    golden = load_golden("golden_for_test:length")
    assert score_golden(golden, ["p", "q"], ["a", "bcd"], "mine").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave shape"),
        ("broken", "not finite"),
        ("wrong", "failed: TypeError"),
        ("missing", "missing failed: KeyError: 'no such answer'"),
        ("half", "half failed: AssertionError: one at a time"),
    ],
)
def test_a_function_that_misbehaves(module, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        score_golden(load_golden(f"golden_for_test:{name}"), ["p", "q"], ["a", "b"], name)
    assert (caught.value.__cause__ is not None) == ("failed" in message)  # --debug shows it


def test_a_module_that_cannot_be_imported(module, tmp_path):
    for number, line in enumerate(("1 / 0", "import sys; sys.exit(3)", "def f(:")):
        (tmp_path / f"bad_for_test_{number}.py").write_text(line)
        with pytest.raises(ConfigError, match="cannot be imported: "):
            load_golden(f"bad_for_test_{number}:f")
    with pytest.raises(ConfigError, match="number in golden_for_test is no function"):
        load_golden("golden_for_test:number")


def test_what_it_depends_on(module, tmp_path):
    """The file behind a function, or the checkpoint: a stage that uses it runs again when that changes."""
    assert golden_inputs("golden_for_test:length") == {"golden_reward": str(tmp_path / "golden_for_test.py")}
    assert golden_inputs(str(tmp_path)) == {"golden_reward": str(tmp_path)}
    assert golden_inputs(None) == golden_inputs("no_such_module:f") == golden_inputs("no_such.module:f") == {}


def test_what_is_not_there(module, tmp_path):
    for spec, message in (("golden_for_test:none", "has no none"), ("no_such_module:f", "cannot be imported")):
        with pytest.raises(ConfigError, match=message):
            load_golden(spec)
    with pytest.raises(ModelError, match="no golden reward can be loaded"):
        load_golden(str(tmp_path))


def test_a_text_past_the_context_of_a_checkpoint_is_told(tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    monkeypatch.setenv("IRLIGN_QUIET", "0")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 3}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=60, num_labels=1, max_position_embeddings=8, **shape))
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    golden = load_golden(str(tmp_path))
    short, long, longer = golden(["the cat"] * 3, [" ran.", " ran" * 9, " ran" * 20])
    assert long == pytest.approx(longer) and short != long
    assert "2 of 3 texts are longer than its 8 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [1, 2])
def test_a_checkpoint(tmp_path, labels, monkeypatch):
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
    answers = [" ran.", " sat on the mat.", " ran home now.", " sat."]
    alone = [golden(["the cat"], [answer])[0] for answer in answers]
    with monkeypatch.context() as patch:  # the memory holds one row at a time
        forward = LlamaForSequenceClassification.forward

        def small(self, input_ids=None, **given):
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return forward(self, input_ids=input_ids, **given)

        patch.setattr(LlamaForSequenceClassification, "forward", small)
        assert golden(["the cat"] * 4, answers) == pytest.approx(alone, abs=1e-5)
    assert golden([], []) == []
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **shape)).save_pretrained(tmp_path / "bad")
    make_tiny_tokenizer().save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match="has no trained head"):
        load_golden(str(tmp_path / "bad"))


def test_a_reward_of_irlign_is_read_as_it_was_trained(tmp_path):
    """At EOS, under its own template: what `load_reward` gives, not the last token of the bare text."""
    from irlign.files import write_json
    from irlign.reward.load import load_reward
    from irlign.reward.model import Classifier

    Classifier.start(make_tiny_policy(tmp_path / "policy"), "hh", "init-sft").save(tmp_path / "mine")
    write_json(tmp_path / "mine/reward.json", {"kind": "classifier", "name": "init-sft", "chat_template": "hh"})
    asked = (["the cat", "a dog"], [" ran.", " sat on the mat."])
    assert load_golden(str(tmp_path / "mine"))(*asked) == pytest.approx(load_reward(tmp_path / "mine").score(*asked))


def test_a_copy_of_a_model_of_the_run_is_refused(tmp_path):
    for folder, weights in (("rewards/init-sft", b"own"), ("copy", b"own"), ("other", b"another's")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(GuardError, match="this very run"):
        guard_golden(str(tmp_path / "copy"), [tmp_path / "rewards"])
    guard_golden(str(tmp_path / "other"), [tmp_path / "rewards"])
    guard_golden("module:function", [tmp_path / "rewards"])


def test_a_model_of_the_run_itself_is_refused(tmp_path):
    (tmp_path / "rewards/init-sft").mkdir(parents=True)
    with pytest.raises(GuardError, match="this very run"):
        guard_golden(str(tmp_path / "rewards/init-sft"), [tmp_path / "rewards"])
    guard_golden(str(tmp_path / "elsewhere"), [tmp_path / "rewards"])
    guard_golden(None, [tmp_path / "rewards"])

"""Supervised fine-tuning: that it learns, from completion tokens only."""

import random

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy

from irlign.data.chat import IGNORED, Format
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.policy.sft import SFTSettings, train_sft
from irlign.policy.tuning import collate
from irlign.records import Demonstration, Prompt


def _demonstrations(count, seed):
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        animal, colour = generator.choice(["cat", "dog", "bird"]), generator.choice(["red", "blue"])
        prompt = Prompt.of(f"the {colour} {animal} {generator.choice(['sat', 'ran', 'sang'])}", "train")
        rows.append(Demonstration(prompt, f" and the {animal} ran home now."))
    return rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def _train(policy, folder, dev=None, seed=0, **settings):
    defaults = {"learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    return train_sft(
        policy,
        _demonstrations(40, 0),
        _demonstrations(12, 1) if dev is None else dev,
        SFTSettings(**{**defaults, **settings}),
        chat_template="none",
        folder=folder / "sft",
        checkpoints=folder / "checkpoints",
        seed=seed,
        report_to="none",
    )


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("peft", [False, True])
def test_it_learned(policy, tmp_path, peft):
    """Held-out demonstrations become likelier; a paired permutation over them says it is no accident."""
    if peft:
        pytest.importorskip("peft")
    log = _train(policy, tmp_path, **({"use_peft": True, "lora_r": 4, "learning_rate": 3e-2} if peft else {}))
    assert log["rows"] == 40 and log["steps"] == 15
    assert log["dev_nll"]["sft"] < 0.7 * log["dev_nll"]["initial"]
    assert not list((tmp_path / "sft").glob("adapter*"))  # a plain checkpoint either way
    before, after = load_policy(str(policy)), load_policy(str(tmp_path / "sft"))
    rows = Format(before.tokenizer, "none").encode(*zip(*[(d.prompt.content, d.completion) for d in _demonstrations(12, 1)], strict=True))
    gain = sequence_log_probs(after, rows) - sequence_log_probs(before, rows)
    flips = np.random.default_rng(0).choice([-1, 1], size=(2000, len(gain)))
    assert (1 + np.sum((flips * gain).mean(1) >= gain.mean())) / 2001 < 0.05
    tokens = sum(len(row.completion_ids) for row in rows)
    assert log["dev_nll"]["initial"] - log["dev_nll"]["sft"] == pytest.approx(gain.sum() / tokens, abs=1e-4)


def test_it_learns_to_end(policy, tmp_path):
    """EOS carries loss: after the demonstrations' last word it becomes the likeliest token."""
    _train(policy, tmp_path)
    tuned = load_policy(str(tmp_path / "sft"))
    row = Format(tuned.tokenizer, "none").encode(["the red cat sat"], [" and the cat ran home now."])[0]
    with torch.inference_mode():
        law = tuned.model(input_ids=torch.tensor([row.ids[:-1]])).logits[0, -1].softmax(-1)
    assert law.argmax() == tuned.tokenizer.eos_token_id and law.max() > 0.5


def test_only_completion_tokens_carry_loss(policy):
    """The loss is the mean over completion tokens by hand, and its gradient on logits at prompt positions is zero."""
    loaded = load_policy(str(policy))
    rows = Format(loaded.tokenizer, "none").encode(["the cat", "a red dog ran"], [" sat.", " home"])
    batch = collate([{"input_ids": r.ids, "labels": r.labels} for r in rows], loaded.pad_id)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(r.completion_ids) for r in rows]
    assert batch["labels"][batch["attention_mask"] == 0].tolist() == [IGNORED]
    out = loaded.model(**batch)
    total = sum(len(r.completion_ids) for r in rows)
    assert out.loss.item() == pytest.approx(-sequence_log_probs(loaded, rows).sum() / total, abs=1e-5)
    out.logits.retain_grad()
    out.loss.backward()
    touched = out.logits.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[:, :-1] = batch["labels"][:, 1:] != IGNORED  # position t predicts token t + 1
    assert torch.equal(touched, expected)


def test_accumulated_batches_average_over_tokens(policy, tmp_path):
    """One step over all rows is the same step whether they come as one batch or as five."""
    for name, size, steps in (("one", 40, 1), ("five", 8, 5)):
        _train(
            policy,
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            warmup_steps=0,
        )
    one, five = (load_policy(str(tmp_path / n / "sft")).model.state_dict() for n in ("one", "five"))
    start = load_policy(str(policy)).model.state_dict()
    moved = max(float((one[k] - start[k]).abs().max()) for k in one)
    assert moved > 1e-4
    assert np.mean([float((one[k] - five[k]).abs().mean()) for k in one]) < moved / 100


def test_no_dev_rows(policy, tmp_path):
    assert _train(policy, tmp_path, dev=[], max_steps=1)["dev_nll"] == {"initial": None, "sft": None}


def test_the_chat_template_is_published_with_the_policy(policy, tmp_path):
    train_sft(
        policy, _demonstrations(8, 0), [], SFTSettings(max_steps=1), chat_template="hh", folder=tmp_path / "sft",
        checkpoints=tmp_path / "c", seed=0, report_to="none",
    )  # fmt: skip
    assert "Human: " in load_policy(str(tmp_path / "sft")).tokenizer.chat_template


@pytest.mark.parametrize("peft", [False, True])
def test_bf16_weights_are_trained_in_float32_and_published_in_bf16(policy, tmp_path, monkeypatch, peft):
    """At a learning rate whose steps a bf16 weight would round away, the optimiser still sees them add up."""
    from irlign.policy import tuning
    from irlign.policy.load import Policy

    if peft:
        pytest.importorskip("peft")
    seen = {}

    def half(path, name):
        loaded = load_policy(path, name)
        return Policy(loaded.model.to(torch.bfloat16), loaded.tokenizer, name)

    def fit(trainer, *rest):
        seen["dtypes"] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        return real(trainer, *rest)

    real = tuning.fit
    monkeypatch.setattr(tuning, "load_policy", half)
    monkeypatch.setattr(tuning, "fit", fit)
    _train(policy, tmp_path, max_steps=2, use_peft=peft)
    assert seen["dtypes"] == {torch.float32}
    from safetensors.torch import load_file

    assert {w.dtype for w in load_file(tmp_path / "sft/model.safetensors").values()} == {torch.bfloat16}


def test_earlier_checkpoints_are_what_training_passed_through(policy, tmp_path):
    """The checkpoint after 2 of 4 steps at a constant rate is what 2 steps give, and the end is what it is without it."""
    still = {"lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 1, "max_steps": 4}
    _train(policy, tmp_path / "kept", keep_checkpoints=[0.5, 0.25], **still)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"sft", "sft-0.5", "sft-0.25", "checkpoints"}
    _train(policy, tmp_path / "half", **{**still, "max_steps": 2})
    _train(policy, tmp_path / "whole", **still)
    same = {"kept/sft-0.5": "half/sft", "kept/sft": "whole/sft"}
    for kept, alone in same.items():
        assert (tmp_path / kept / "model.safetensors").read_bytes() == (tmp_path / alone / "model.safetensors").read_bytes()
    rows = _demonstrations(12, 1)
    nll = {}
    for name in ("sft-0.25", "sft-0.5", "sft"):
        loaded = load_policy(str(tmp_path / "kept" / name))
        encoded = Format(loaded.tokenizer, "none").encode([d.prompt.content for d in rows], [d.completion for d in rows])
        nll[name] = -sequence_log_probs(loaded, encoded).mean()
    assert nll["sft"] < nll["sft-0.5"] < nll["sft-0.25"]


def test_an_earlier_checkpoint_of_an_adapter_is_a_plain_one(policy, tmp_path):
    pytest.importorskip("peft")
    _train(policy, tmp_path, keep_checkpoints=[0.5], use_peft=True, lora_r=4, learning_rate=3e-2)
    assert not list((tmp_path / "sft-0.5").glob("adapter*"))
    weights = [load_policy(str(path)).model.state_dict() for path in (policy, tmp_path / "sft-0.5", tmp_path / "sft")]
    key = next(name for name in weights[0] if "q_proj" in name)
    assert all(not torch.equal(a[key], b[key]) for a, b in ((weights[0], weights[1]), (weights[1], weights[2])))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("on_prompt", [False, True])
def test_logits_that_no_loss_needs_are_left_out(tmp_path, architecture, on_prompt):
    """The same loss and gradient from fewer positions: prompts of 2 and 4 tokens, so that one is skipped."""
    model = load_policy(str(make_tiny_policy(tmp_path, architecture=architecture))).model
    rows = [
        {"input_ids": ids, "labels": ids if on_prompt else [IGNORED] * n + ids[n:]}
        for n, ids in ((2, [1, 7, 8, 2]), (4, [1, 7, 9, 8, 10, 2]))
    ]
    found = []
    for skip in (False, True):
        batch = collate(rows, 3, skip=skip)
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        found.append((out.logits.shape[1], out.loss.item(), model.get_input_embeddings().weight.grad.clone()))
    (whole, loss, gradient), (kept, same, alike) = found
    assert (whole, kept) == (6, 6 if on_prompt else 5)
    assert same == pytest.approx(loss, abs=1e-6) and torch.allclose(alike, gradient, atol=1e-6)

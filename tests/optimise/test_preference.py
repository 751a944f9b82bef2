"""Preference methods: the pairs by hand, rows exactly as the format gives them, the loss of the formula, resume after a kill."""

import math

import numpy as np
import pytest

pytest.importorskip("trl")

from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign import training
from irlign.data.chat import IGNORED, Format
from irlign.errors import ConfigError
from irlign.optimise import preference
from irlign.optimise.preference import (
    PreferenceSettings,
    best_and_worst,
    demonstration_over_own,
    desirable_and_not,
    dpo_config,
    kto_config,
    labelled_batch,
    labelled_rows,
    pair_batch,
    pair_rows,
    train_dpo,
    train_kto,
)
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.records import Contrast, Demonstration, Prompt, Sample
from irlign.training import TrainerSettings

ASK, TALK = Prompt.of("the cat", "train"), Prompt.of("the dog", "train")
SGD = {"optim": "sgd", "max_grad_norm": 0, "logging_steps": 1}


def _pool(prompt, *answers):
    """Samples of (text, finish reason)."""
    return [Sample(prompt, i, text, reason, 3, -1.0) for i, (text, reason) in enumerate(answers)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


PAIRS = [
    Contrast(Prompt.of(f"the {colour} {animal}", "train"), " sat on the mat.", f" {verb}!")
    for colour in ("red", "blue")
    for animal in ("cat", "dog", "bird")
    for verb in ("ran", "sang")
]
DEV = [Demonstration(Prompt.of("a red cat", "dev"), " sat on the mat.")]


def _train(train, config, start, rows, folder, **settings):
    defaults = {"learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    places = {"folder": folder / "aligned", "checkpoints": folder / "checkpoints"}
    options = {"chat_template": "none", "seed": 0, "report_to": "none"}
    return train(start, rows, DEV, TrainerSettings(**{**defaults, **settings}), config=config, **options, **places)


def test_the_best_stands_over_the_worst_that_finished_and_says_something():
    samples = [
        *_pool(ASK, (" sat.", "eos"), (" ran.", "eos"), (" sang", "length"), ("  ", "eos"), (" now.", "stop")),
        *_pool(TALK, (" home.", "eos"), (" mat.", "eos")),
    ]
    scores = [0.0, 1.0, 9.0, -9.0, 0.5, -3.0, -2.0]  # the cut and the empty answer have the extreme scores
    assert best_and_worst(samples, scores) == [Contrast(ASK, " ran.", " sat."), Contrast(TALK, " mat.", " home.")]
    assert best_and_worst(samples, np.zeros(7)) == [] and best_and_worst(_pool(ASK, (" sat.", "eos"), (" sat.", "eos")), [1, 2]) == []


def test_demonstrations_stand_over_own_answers_in_turn():
    """Not over cut, empty or equal ones, and not where a prompt has no demonstration."""
    samples = [
        *_pool(ASK, (" sat.", "eos"), (" ran.", "eos"), (" sang", "length"), ("  ", "eos"), (" now. ", "eos"), (" red.", "stop")),
        *_pool(TALK, (" home.", "eos")),
    ]
    shown = [Demonstration(ASK, "now."), Demonstration(ASK, " blue.")]
    expected = [Contrast(ASK, "now.", " sat."), Contrast(ASK, " blue.", " ran."), Contrast(ASK, "now.", " red.")]
    assert demonstration_over_own(samples, shown) == expected
    own = [(ASK, text, False) for text in (" sat.", " ran.", " red.")]
    assert desirable_and_not(samples, shown) == [(ASK, "now.", True), (ASK, " blue.", True), *own]
    assert demonstration_over_own(samples[2:5], shown) == desirable_and_not(samples[2:5], shown) == []


@pytest.mark.parametrize("template", ["none", "hh", "chatml"])
def test_a_batch_is_what_the_format_gives(tmp_path, template):
    """Through DPOTrainer's own dataset preparation, with a special token in the user's text and a prompt over the limit."""
    from datasets import Dataset
    from trl import DPOTrainer

    tokenizer = make_tiny_tokenizer()
    model = load_policy(str(make_tiny_policy(tmp_path / "start", tokenizer=tokenizer))).model
    form = Format(tokenizer, template)
    pairs = [
        Contrast(Prompt.of("the </s> cat", "train"), "sat on the mat.", " ran"),
        Contrast(Prompt.of("a dog " * 9, "train"), " sat.", "!"),
    ]
    arguments = training.training_arguments(
        TrainerSettings(per_device_train_batch_size=2),
        tmp_path / "out",
        seed=0,
        bf16=False,
        report_to="none",
        config=dpo_config(PreferenceSettings()),
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pair_rows(form, pairs)),
        processing_class=tokenizer,
        data_collator=lambda batch: pair_batch(batch, 3, 16),
    )
    (batch,) = list(trainer.get_train_dataloader())
    found = {
        (tuple(ids[mask == 1].tolist()), tuple(ids[answer == 1].tolist()))
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    }
    encoded = form.encode([p.prompt.content for p in pairs for _ in range(2)], [text for p in pairs for text in (p.better, p.worse)])
    cut = [row.within(16) for row in encoded]
    assert found == {(tuple(r.ids), tuple(i for i in r.labels if i != IGNORED)) for r in cut}
    assert all(row[1][-1] == tokenizer.eos_token_id and row[1].count(tokenizer.eos_token_id) == 1 for row in found)
    first = batch["input_ids"][0].tolist()
    assert any(first[: len(r.ids)] == r.ids for r in cut[::2])  # the better answers come first


def test_dpo_takes_the_step_of_the_formula(tmp_path, policy):
    """One step of plain gradient descent moves the weights by the gradient of -log s(beta x the difference of log-ratios); the loss at
    the start is log 2."""
    import torch

    config = dpo_config(PreferenceSettings(beta=0.3))
    settings = {"learning_rate": 0.1, "max_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant", "trainer": SGD}
    log = _train(train_dpo, config, policy, PAIRS[:4], tmp_path, **settings)
    assert log["steps"] == 1 and log["rows"] == 4 and log["losses"] == [pytest.approx(math.log(2), abs=1e-3)]
    assert log["logged"]["rewards/margins"] == [pytest.approx(0, abs=1e-4)]
    start = load_policy(str(policy))
    nats = _nats(start, [(p.prompt, text) for p in PAIRS[:4] for text in (p.better, p.worse)])
    margins = torch.stack([better - worse for better, worse in zip(nats[::2], nats[1::2], strict=True)])
    (-torch.nn.functional.logsigmoid(0.3 * (margins - margins.detach()))).mean().backward()
    _moved_by_the_gradient(start, tmp_path / "aligned")


def _nats(policy, answers):
    """log pi(y | x) of each prompt and text, with its gradient."""
    import torch

    nats = []
    for prompt, text in answers:
        (row,) = Format(policy.tokenizer, "none").encode([prompt.content], [text])
        logits = policy.model(input_ids=torch.tensor([row.ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        nats.append(logits.log_softmax(-1).gather(1, torch.tensor(row.completion_ids)[:, None]).sum())
    return nats


def _moved_by_the_gradient(start, folder):
    import torch

    moved = load_policy(str(folder)).model.state_dict()
    for name, weight in start.model.named_parameters():
        assert torch.allclose(moved[name], weight.detach() - 0.1 * weight.grad, atol=2e-6), name
    assert max(float(w.grad.abs().max()) for w in start.model.parameters()) > 1e-3


def test_kto_takes_the_step_of_the_formula(tmp_path, policy):
    """Two desirable answers and four others: at the start h = z = 0, so a desirable one weighs 4 / 2 and the loss is (2 * 2 + 4) / 2 / 6."""
    import torch

    answers = [(p.prompt, text, text == p.better) for p in PAIRS[:4:2] for text in (p.better, p.worse, " now.")]
    settings = {"learning_rate": 0.1, "max_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant", "trainer": SGD}
    log = _train(train_kto, kto_config(PreferenceSettings(beta=0.3)), policy, answers, tmp_path, per_device_train_batch_size=6, **settings)
    assert log["steps"] == 1 and log["rows"] == 6 and log["losses"] == [pytest.approx(8 / 2 / 6, abs=1e-3)]
    start = load_policy(str(policy))
    gains = [h - h.detach() for h in _nats(start, [(prompt, text) for prompt, text, _ in answers])]
    losses = [
        2 * (1 - torch.sigmoid(0.3 * h)) if good else 1 - torch.sigmoid(-0.3 * h) for h, (_, _, good) in zip(gains, answers, strict=True)
    ]
    torch.stack(losses).mean().backward()
    _moved_by_the_gradient(start, tmp_path / "aligned")


def test_kto_learns_the_demonstrations(tmp_path, policy):
    answers = [(p.prompt, text, text == p.better) for p in PAIRS for text in (p.better, p.worse)]
    log = _train(train_kto, kto_config(PreferenceSettings()), policy, answers, tmp_path, trainer={"logging_steps": 6})
    assert log["steps"] == 18 and log["losses"][-1] < log["losses"][0] and log["logged"]["rewards/margins"][-1] > 0
    assert log["dev_nll"]["aligned"] < log["dev_nll"]["start"]


def test_a_kto_batch_is_what_the_format_gives(tmp_path):
    """Through KTOTrainer's own dataset preparation; the KL rows are each prompt before the answer of the row before it."""
    from datasets import Dataset
    from trl import KTOTrainer

    tokenizer = make_tiny_tokenizer()
    model = load_policy(str(make_tiny_policy(tmp_path / "start", tokenizer=tokenizer))).model
    form = Format(tokenizer, "chatml")
    answers = [(Prompt.of("the </s> cat", "train"), "sat.", True), (ASK, " ran", False), (TALK, " home", False)]
    settings = TrainerSettings(per_device_train_batch_size=3)
    options = {"seed": 0, "bf16": False, "report_to": "none", "config": kto_config(PreferenceSettings())}
    trainer = KTOTrainer(
        model=model,
        args=training.training_arguments(settings, tmp_path / "out", **options),
        train_dataset=Dataset.from_list(labelled_rows(form, answers)),
        processing_class=tokenizer,
        data_collator=lambda batch: labelled_batch(batch, 3, 64),
    )
    (batch,) = list(trainer.get_train_dataloader())
    texts = [text for _, text, _ in answers]
    for prefix, of in (("", texts), ("KL_", [texts[-1], *texts[:-1]])):
        encoded = form.encode([prompt.content for prompt, _, _ in answers], of)
        for i, row in enumerate(encoded):
            ids, mask, answer = (batch[prefix + key][i] for key in ("input_ids", "attention_mask", "completion_mask"))
            assert ids[mask == 1].tolist() == row.ids and ids[answer == 1].tolist() == row.completion_ids
    assert batch["label"].tolist() == [True, False, False]


@pytest.mark.parametrize("peft", [False, True])
def test_dpo_learns_the_pairs(tmp_path, policy, peft):
    settings = {"use_peft": peft, "lora_r": 4, "learning_rate": 3e-2 if peft else 1e-2, "trainer": {"logging_steps": 3}}
    log = _train(train_dpo, dpo_config(PreferenceSettings()), policy, PAIRS, tmp_path, **settings)
    assert log["steps"] == 9 and log["losses"][-1] < log["losses"][0] < 0.7 and len(log["logged"]["rewards/accuracies"]) == 3
    assert log["logged"]["rewards/margins"][-1] > 0 and not list((tmp_path / "aligned").glob("adapter*"))
    before, after = load_policy(str(policy)), load_policy(str(tmp_path / "aligned"))
    form = Format(before.tokenizer, "none")
    better, worse = (form.encode(["a red cat"], [text]) for text in (" sat on the mat.", " sang!"))
    gains = [sequence_log_probs(after, rows) - sequence_log_probs(before, rows) for rows in (better, worse)]
    assert gains[0] > gains[1] and log["dev_nll"]["start"] != log["dev_nll"]["aligned"]
    assert (after.tokenizer.pad_token, after.tokenizer.get_vocab()) == (before.tokenizer.pad_token, before.tokenizer.get_vocab())


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_dpo_goes_on_and_ends_the_same(tmp_path, policy, monkeypatch):
    """Three epochs of three steps, killed in step 8 and taken up in the middle of an epoch."""

    class Dying(training.Progress):
        def advance(self, n=1, note=""):
            super().advance(n, note)
            if self.done == 8 and n:
                raise Killed

    saving = {"trainer": {"save_strategy": "steps", "save_steps": 5, "logging_steps": 1}}
    config = dpo_config(PreferenceSettings())
    whole = _train(train_dpo, config, policy, PAIRS, tmp_path / "whole", **saving)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Dying)
        with pytest.raises(Killed):
            _train(train_dpo, config, policy, PAIRS, tmp_path / "cut", **saving)
    assert (tmp_path / "cut/checkpoints/checkpoint-5").is_dir() and not (tmp_path / "cut/aligned").exists()
    assert _train(train_dpo, config, policy, PAIRS, tmp_path / "cut", **saving) == whole
    weights = [(tmp_path / name / "aligned/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(preference, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'irlign\[optimise\]'"):
        dpo_config(PreferenceSettings())


def test_a_loss_that_trl_does_not_know_is_a_recipe_error(tmp_path, policy):
    pytest.importorskip("trl")
    with pytest.raises(ConfigError, match="optimise: the trainer refuses it: Unknown loss type: nonsense"):
        _train(train_dpo, dpo_config(PreferenceSettings()), policy, PAIRS, tmp_path, trainer={"loss_type": "nonsense"})

"""What training runs share: arguments that reach the Trainer, resume after a kill, and the stop on divergence."""

import pytest
import torch
from tiny import make_tiny_policy
from transformers import TrainingArguments

from irlign import training
from irlign.errors import ConfigError, ModelError
from irlign.policy.sft import SFTSettings, train_sft
from irlign.records import Demonstration, Prompt
from irlign.training import BF16_PAYS_FROM, TrainerSettings, bf16_pays, training_arguments

ANSWERS = [" sat.", " ran home now.", " sang on the mat and the dog sat.", " and the bird", "!", " the red mat.", " now, home."]
ROWS = [Demonstration(Prompt.of(f"the {c} {a}", "train"), y) for c in ("red", "blue") for a in ("cat", "dog", "bird") for y in ANSWERS]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"), attention_dropout=0.2)  # dropout: random state matters on resume


def _train(policy, folder, **settings):
    defaults = {"learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8}  # 12 steps
    return train_sft(
        policy, ROWS, [], SFTSettings(**{**defaults, **settings}), chat_template="none", folder=folder / "sft",
        checkpoints=folder / "checkpoints", seed=0, report_to="none",
    )  # fmt: skip


def test_settings_reach_the_trainer_and_the_mapping_wins(tmp_path):
    settings = TrainerSettings(
        learning_rate=1e-3, warmup_steps=0.1, lr_scheduler_type="linear", trainer={"optim": "adafactor", "weight_decay": 0.3}
    )
    arguments = training_arguments(settings, tmp_path, seed=11, bf16=False, report_to="none")
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.seed) == (1e-3, 0.1, 11)
    assert (arguments.lr_scheduler_type, arguments.optim, arguments.weight_decay) == ("linear", "adafactor", 0.3)
    assert arguments.use_cpu == (not torch.cuda.is_available()) and arguments.report_to == []


@pytest.mark.parametrize("trainer", [{"learning_rte": 1.0}, {"save_strategy": "sometimes"}, {"optim": "magic"}])
def test_what_training_arguments_refuse_is_a_recipe_error(tmp_path, trainer):
    with pytest.raises(ConfigError, match=str(next(iter(trainer.values()))) if "optim" in trainer else "TrainingArguments refuses"):
        training_arguments(TrainerSettings(trainer=trainer), tmp_path, seed=0, bf16=False, report_to="none")


def test_an_unknown_tracker_is_a_recipe_error(tmp_path):
    with pytest.raises(ConfigError, match="tensorbord"):
        training_arguments(TrainerSettings(), tmp_path, seed=0, bf16=False, report_to="tensorbord")


def test_bf16_only_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not bf16_pays(BF16_PAYS_FROM - 1) and bf16_pays(BF16_PAYS_FROM)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not bf16_pays(10 * BF16_PAYS_FROM)


class Killed(BaseException):
    """What a kill looks like from inside."""


def _kill_at(monkeypatch, step):
    class Dying(training.Progress):
        def advance(self, n=1, note=""):
            super().advance(n, note)
            if self.done == step and n:
                raise Killed

    monkeypatch.setattr(training, "Progress", Dying)


@pytest.mark.parametrize(("torn", "every", "at"), [(None, 4, 8), (None, 3, 8), (None, 3, 5), ("empty", 4, 8), ("half", 4, 8)])
def test_a_killed_training_goes_on_and_ends_the_same(policy, tmp_path, monkeypatch, torn, every, at):
    """Three epochs of six steps, killed in step 8 or 5: taken up in the middle of an epoch (4), at its end (6), between two logs (3)."""
    saving = {"num_train_epochs": 3, "trainer": {"save_strategy": "steps", "save_steps": every, "logging_steps": 2}}
    whole = _train(policy, tmp_path / "whole", **saving)
    with monkeypatch.context() as patch:
        _kill_at(patch, at)
        with pytest.raises(Killed):
            _train(policy, tmp_path / "cut", **saving)
    assert not (tmp_path / "cut/sft").exists()
    assert (tmp_path / "cut/checkpoints").joinpath(f"checkpoint-{(at - 1) // every * every}").is_dir()
    if torn:  # killed while it wrote the next checkpoint
        (tmp_path / "cut/checkpoints/checkpoint-10").mkdir()
        if torn == "half":
            (tmp_path / "cut/checkpoints/checkpoint-10/model.safetensors").write_bytes(b"\0" * 100)
    resumed = _train(policy, tmp_path / "cut", **saving)
    assert resumed == whole and whole["steps"] == 18 and len(whole["losses"]) == {4: 9, 3: 12}[every]
    assert (tmp_path / "cut/sft/model.safetensors").read_bytes() == (tmp_path / "whole/sft/model.safetensors").read_bytes()


def test_training_prints_nothing_on_standard_output(policy, tmp_path, capsys):
    _train(policy, tmp_path, trainer={"logging_steps": 1}, max_steps=2)
    assert capsys.readouterr().out == ""


def test_a_short_training_still_has_a_loss(policy, tmp_path):
    log = _train(policy, tmp_path, max_steps=3)  # fewer steps than logging_steps
    assert log["losses"] == [] and 0 < log["loss"] < 20


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_divergence_is_an_error_however_rarely_the_loss_is_logged(policy, tmp_path, logging_steps):
    with pytest.raises(ModelError, match="diverged") as caught:
        _train(policy, tmp_path, learning_rate=1e30, trainer={"logging_steps": logging_steps})
    assert caught.value.where == "sft" and "lower sft.learning_rate (now 1e+30) or set sft.trainer.max_grad_norm" in str(caught.value)
    assert not (tmp_path / "sft").exists()


def test_divergence_in_the_last_update_is_an_error(policy, tmp_path):
    """Its loss was still finite: only the weights tell."""
    with pytest.raises(ModelError, match="weight is no longer finite"):
        _train(policy, tmp_path, learning_rate=1e39, max_steps=1, warmup_steps=0, trainer={"logging_steps": 1})


def test_memory_that_runs_out_says_the_largest_batch_that_fits(policy, tmp_path, monkeypatch):
    """It is found by trying: here memory holds three rows."""
    from transformers import Trainer

    step, tried = Trainer.training_step, []

    def little_memory(self, model, inputs, *args):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", little_memory)
    with pytest.raises(ModelError, match="out of memory with per_device_train_batch_size=8; 2 fits") as caught:
        _train(policy, tmp_path, gradient_accumulation_steps=3)
    assert tried == [8, 4, 2] and "set it to 2 and gradient_accumulation_steps to 12" in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_before_its_update(policy, tmp_path, monkeypatch):
    """Step 6 goes wrong: the error names it, and the checkpoint of step 4 is the last, whole and finite."""
    from safetensors.torch import load_file
    from transformers import Trainer

    step = Trainer.training_step

    def poisoned(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step == 5:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(ModelError, match="a gradient is not finite at step 6"):
        _train(policy, tmp_path, trainer={"save_strategy": "steps", "save_steps": 2, "logging_steps": 100, "max_grad_norm": 0.0})
    kept = sorted((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert [folder.name for folder in kept] == ["checkpoint-2", "checkpoint-4"]
    assert all(bool(t.isfinite().all()) for folder in kept for t in load_file(folder / "model.safetensors").values())


def test_a_process_trains_on_one_gpu(tmp_path):
    class FourGPUs(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    about = {"seed": 0, "bf16": False, "report_to": "none"}
    arguments = training_arguments(TrainerSettings(per_device_train_batch_size=8), tmp_path, config=(FourGPUs, {}), **about)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 8


def test_memory_that_runs_out_is_an_error_with_a_remedy(policy, tmp_path, monkeypatch):
    from transformers import Trainer

    def no_memory(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "training_step", no_memory)
    with pytest.raises(ModelError, match="per_device_train_batch_size=8") as caught:
        _train(policy, tmp_path)
    assert "not one row fits" in str(caught.value)
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a shape is wrong")))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        _train(policy, tmp_path)

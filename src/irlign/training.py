"""What every training run here shares: settings that reach transformers' TrainingArguments, progress, and the stop on NaN.

SFT and reward training both hand rows that `data/chat.py` tokenized and masked to transformers' Trainer.
"""

import gc
import json
import math
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from irlign.config import PassOn, Settings
from irlign.errors import ConfigError, ModelError, out_of_memory
from irlign.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


Config = tuple[type, dict[str, Any]]  # a class derived from TrainingArguments, and the fields that a method sets in it
BF16_PAYS_FROM = 50_000_000  # parameters: on a CPU, bf16 autocast slows smaller models


class TrainerSettings(Settings):
    """The fields that most people set; every other field of TrainingArguments is reached through `trainer`."""

    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate (AdamW)")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the rows")
    max_steps: int = Field(-1, ge=-1, description="stop after this many steps; -1 = all epochs")
    per_device_train_batch_size: int = Field(16, ge=1, description="rows a step on each device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="steps whose gradients are added up")
    lr_scheduler_type: str = Field("cosine", description="learning-rate schedule")
    warmup_steps: float = Field(0.05, ge=0, description="warm-up: a number of steps, or a share below 1")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    use_peft: bool = Field(False, description="train a LoRA adapter (needs irlign[peft]); it is merged before it is published")
    lora_r: int = Field(32, ge=1, description="LoRA rank")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale numerator")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout")
    lora_target_modules: str | list[str] = Field("all-linear", description="which layers carry the adapter")
    trainer: PassOn = Field(default_factory=dict, description="any further field of transformers' TrainingArguments")

    @field_validator("max_steps")
    @classmethod
    def _some(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("no step trains nothing: give 1 or more, or -1 for all epochs")
        return steps


def bf16_pays(parameters: int) -> bool:
    """Whether bf16 is supported here and faster than float32 for a model of this size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return parameters >= BF16_PAYS_FROM and bool(torch.cpu._is_avx512_bf16_supported())


def precision(model: "PreTrainedModel", settings: TrainerSettings) -> bool:
    """Make the weights of a model float32 where they are trained themselves, since small steps are lost in bf16; returns whether computing
    in bf16 (autocast) pays all the same."""
    if not settings.use_peft:
        model.float()
    return bf16_pays(sum(p.numel() for p in model.parameters()))


def training_arguments(
    settings: TrainerSettings,
    folder: Path,
    *,
    seed: int,
    bf16: bool,
    report_to: str,
    config: Config | None = None,
    section: str | None = None,
) -> Any:
    """TrainingArguments from the settings, or a method's own kind of them, `config`: its class and the fields it sets.
    `settings.trainer` wins over everything said here.

    Raises ConfigError where the class refuses a field or a tracker is unknown or not installed; `section` is where the recipe has the settings.
    """
    import torch
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    kind, more = config or (TrainingArguments, {})
    own = set(TrainerSettings.model_fields) - {
        "trainer",
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
    }
    fields: dict[str, Any] = {
        **{name: getattr(settings, name) for name in own},
        "output_dir": str(folder),
        "seed": seed,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": report_to,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **more,
        **settings.trainer,
    }
    try:
        arguments = kind(**fields)
    except (TypeError, ValueError, ImportError) as error:
        said = re.sub(r"^\w+\.__init__\(\) got an unexpected keyword argument", "there is no field", str(error))
        do = "correct the field or leave it out; trainer={} clears what a recipe has stored for another method"
        raise ConfigError(f"{kind.__name__} refuses it: {said}", where=".".join(filter(None, (section, "trainer"))), do=do) from error
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"no such tracker here: {error}", where="report_to", do="install it, or use report_to=none") from error
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # a process has one: several in one would make a step of as many times the rows, and losses of another scale
    return arguments


def adapter(settings: TrainerSettings, task: str) -> Any:
    """peft's LoraConfig where `use_peft` asks for an adapter, else None; `task` is peft's task type."""
    if not settings.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("peft is not installed", where="use_peft", do="pip install 'irlign[peft]'") from error
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def with_adapter(model: "PreTrainedModel", settings: TrainerSettings, task: str) -> Any:
    """The model with a LoRA adapter where `use_peft` asks for one; `task` is peft's task type."""
    lora = adapter(settings, task)
    if lora is None:
        return model
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft asks for names that transformers has renamed: no news for a user
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


def merged(model: Any, settings: TrainerSettings) -> Any:
    """The plain model again, the adapter folded into its weights."""
    return model.merge_and_unload() if settings.use_peft else model


def fit(trainer: "Trainer", stage: str, checkpoints: Path) -> dict[str, Any]:
    """Train with a progress line; take up the last checkpoint of an interrupted attempt; stop on a loss that is not finite.

    Returns steps, tokens trained on (padding left out, every pass counts), final logged loss and the list of logged losses, and the number of
    `processes` where they are several (launch.py): all but the first end here. Raises ModelError on NaN or infinity, or when memory runs out.
    """
    from transformers.trainer_callback import PrinterCallback

    kind, several = type(trainer.model), trainer.args.world_size
    with trainer.args.main_process_first(local=False):
        last = _last_checkpoint(checkpoints)
    _order_as_one(trainer)
    trainer.remove_callback(PrinterCallback)
    with Progress(stage, None, "steps") as bar:
        trainer.add_callback(_watch(bar, stage))
        try:
            output = trainer.train(resume_from_checkpoint=last)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            output, failed = None, str(error)
    if output is None:  # outside of the block, whose error holds what has filled the memory
        raise _too_large(trainer, stage, failed)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(checkpoints / "whole"))  # every process has a part of it
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        raise SystemExit(0)  # its share is done; what follows is done, and written, once
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.model = kind.from_pretrained(checkpoints / "whole").float()  # type: ignore[union-attr]
    model: Any = trainer.model
    if not all(bool(p.isfinite().all()) for p in model.parameters()):  # the last update is in no loss
        raise _diverged("a weight is no longer finite", trainer.args, trainer.state, stage)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    counts = {"steps": trainer.state.global_step, "tokens": trainer.state.num_input_tokens_seen}
    log = {**counts, "loss": losses[-1] if losses else output.training_loss, "losses": losses}
    return {**log, "processes": several} if several > 1 else log


def _too_large(trainer: "Trainer", stage: str, failed: str) -> ModelError:
    """The error for a batch that does not fit, with the largest that does: halved and tried, forward and backward, until one fits."""
    size, least = trainer.args.per_device_train_batch_size, getattr(trainer, "least_rows", 1)
    fits = next((n for n in (size >> k for k in range(1, size.bit_length())) if n >= least and _fits(trainer, n)), None)
    what = f"out of memory with per_device_train_batch_size={size}" + ("" if fits is None else f"; {fits} fits")
    do = f"not {'one row fits' if least == 1 else f'{least} rows fit'}: shorten the longest (data.max_length), set use_peft=true, or trainer.gradient_checkpointing=true"
    if fits is not None:
        do = f"set it to {fits} and gradient_accumulation_steps to {math.ceil(size * trainer.args.gradient_accumulation_steps / fits)}"
    error = ModelError(what, where=stage, do=do)
    error.__cause__ = RuntimeError(failed)
    return error


def _fits(trainer: "Trainer", size: int) -> bool:
    """Whether a step on so many rows fits; the first batch of an epoch holds the longest (`group_by_length`). Weights stay what they are.

    Whatever else goes wrong with that size, such as answers in groups that it does not hold, says that it will not do either.
    """
    import torch

    trainer.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer._train_batch_size = trainer.args.per_device_train_batch_size = size
    try:
        kept = trainer.optimizer is not None and trainer.optimizer.state
        moments = [] if kept else [torch.empty_like(p) for p in trainer.model.parameters() if p.requires_grad for _ in "mv"]  # type: ignore[union-attr]
        trainer.training_step(trainer.model_wrapped, next(iter(trainer.get_train_dataloader())))
        del moments  # what AdamW keeps, which a failure in the first step has not seen yet
    except (RuntimeError, MemoryError, ValueError):
        return False
    return True


def _order_as_one(trainer: "Trainer") -> None:
    """The rows of a step are those of one process with as many rows a step: the Trainer groups rows of like length over the batches of one
    process, and here over those of all. Where the rows do not fill an epoch's last step, accelerate fills it with first ones again. A trainer with
    an order of its own keeps it."""
    from transformers import Trainer
    from transformers.trainer_pt_utils import LengthGroupedSampler

    args, rows, own = trainer.args, trainer.train_dataset, type(trainer)._get_train_sampler
    if args.world_size > 1 and own is Trainer._get_train_sampler and args.train_sampling_strategy == "group_by_length":
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        order: Any = LengthGroupedSampler(size, dataset=rows)  # type: ignore[arg-type]
        trainer._get_train_sampler = lambda train_dataset=None: order  # type: ignore[method-assign]


def logged(trainer: "Trainer", names: Sequence[str]) -> dict[str, list[float]]:
    """What a trainer logged beside its loss, each name with its values in order; names that it did not log are left out."""
    found = {name: [e[name] for e in trainer.state.log_history if e.get(name) is not None] for name in names}
    return {name: values for name, values in found.items() if values}


def _last_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end (the Trainer writes trainer_state.json last); torn ones are removed."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            return str(folder)
    return None


def _diverged(what: str, args: Any, state: Any, stage: str, ahead: int = 0) -> ModelError:
    return ModelError(
        f"{what} at step {state.global_step + ahead}, so training has diverged",
        where=stage,
        do=f"lower {stage}.learning_rate (now {args.learning_rate:g}) or set {stage}.trainer.max_grad_norm; "
        "what was published before is untouched",
    )


def _watch(bar: Progress, stage: str) -> Any:
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Moves the progress line, stops before the first update that is not finite, logs before every checkpoint, and seeds every epoch.

        The loss since the last log is in no checkpoint, so a resume would report another. The Trainer orders an epoch's rows by the global random state, which a resume in its middle does not have: so the
        state at the start of an epoch is a function of the seed, in a checkpoint taken right before it too.
        """

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.manual_seed(args.seed + 1_000_003 * math.floor((state.epoch or 0) + 1e-6))

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.total = state.max_steps
            bar.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            loss = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), None)
            bar.advance(1, f"loss {loss:.3f}" if loss is not None else "")
            control.should_log |= control.should_save
            if abs(state.epoch - round(state.epoch)) < 1e-6:
                self.on_epoch_begin(args, state, control)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if args.fp16:  # its scaler skips such updates, and lowers the scale
                return
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if grads and not bool(torch.stack([n.to(grads[0].device) for n in torch._foreach_norm(grads)]).isfinite().all()):
                raise _diverged("a gradient is not finite", args, state, stage, ahead=1)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            for name in ("loss", "grad_norm"):
                value = (logs or {}).get(name)
                if value is not None and not math.isfinite(value):
                    raise _diverged(f"the {name.replace('_', ' ')} is {value}", args, state, stage)

    return Watch()

"""What the training of a policy is around its method: loaded, measured on unseen demonstrations, trained, saved as a plain checkpoint, measured
again. A method's own file holds what stands between: its rows and its loss."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.data.chat import IGNORED, Format, pad
from irlign.policy.likelihood import mean_nll
from irlign.policy.load import Policy, load_policy, save_policy
from irlign.records import Demonstration
from irlign.training import Config, TrainerSettings, adapter, fit, logged, merged, precision, training_arguments, with_adapter

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


class Tuning:
    """One training of the policy in the folder `start`, from the seed on: `policy`, read under `form`. `was` and `becomes` name the two
    ends in the log, `stage` is what progress and errors call it; `kept` are folders beside `folder`, by the share of the steps after which the policy is
    saved there too; `kept_apart`: not where that is the last step, or that of another."""

    def __init__(
        self,
        start: Path,
        dev: Sequence[Demonstration],
        settings: TrainerSettings,
        *,
        chat_template: str,
        folder: Path,
        checkpoints: Path,
        seed: int,
        report_to: str,
        was: str = "start",
        becomes: str = "aligned",
        stage: str = "optimise",
        kept: Mapping[str, float] | None = None,
        kept_apart: bool = True,
    ):
        from transformers import set_seed

        set_seed(seed)
        self.settings, self.folder, self.checkpoints, self.seed, self.report_to = settings, folder, checkpoints, seed, report_to
        self.was, self.becomes, self.stage = was, becomes, stage
        self.kept, self.kept_apart = kept or {}, kept_apart
        self.policy = load_policy(str(start), was)
        self.form = Format(self.policy.tokenizer, chat_template)
        self.dev_rows = self.form.encode([d.prompt.content for d in dev], [d.completion for d in dev])
        self.before, self.stored = self._dev_nll(self.policy), self.policy.model.dtype

    def arguments(self, config: Config | None = None) -> Any:
        """TrainingArguments, or a method's own kind of them (`config`); from here on weights that are trained themselves are float32."""
        bf16 = precision(self.policy.model, self.settings)
        return training_arguments(
            self.settings, self.checkpoints, seed=self.seed, bf16=bf16, report_to=self.report_to, config=config, section=self.stage
        )

    def trainer(
        self,
        arguments: Any,
        rows: Sequence[dict[str, Any]],
        batch: Callable[..., dict[str, Any]] | None = None,
        loss: Callable[..., "torch.Tensor"] | None = None,
    ) -> "Trainer":
        """transformers' Trainer on rows with `input_ids` and `labels`, which `batch(rows, pad_id)` makes into tensors (`collate`); `loss` takes
        the outputs, the labels and `num_items_in_batch`, by default it is the model's own."""
        from transformers import Trainer

        make, pad_id = batch or collate, self.policy.pad_id
        return Trainer(
            model=with_adapter(self.policy.model, self.settings, "CAUSAL_LM"),
            args=arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=lambda of: make(of, pad_id),
            compute_loss_func=loss,
        )

    def for_trl(self, arguments: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What every trainer of TRL's takes: the policy, the rows as a Dataset, and the adapter, which it puts on itself."""
        from datasets import Dataset

        return {
            "model": self.policy.model,
            "args": arguments,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": copy.deepcopy(self.policy.tokenizer),  # TRL gives it a pad token
            "peft_config": adapter(self.settings, "CAUSAL_LM"),
        }

    def finish(self, trainer: "Trainer", metrics: Sequence[str] | None = None) -> dict[str, Any]:
        """Train, and save the policy in `folder` as a plain transformers checkpoint. Returns steps, losses, what the trainer logged of `metrics`,
        and the loss on the dev demonstrations (nats a completion token) before and after. Raises ModelError on divergence."""
        if self.kept:
            trainer.add_callback(
                _keep({self.folder.parent / name: share for name, share in self.kept.items()}, self.kept_apart, self.plain)
            )
        log = fit(trainer, self.stage, self.checkpoints)
        log |= {} if metrics is None else {"logged": logged(trainer, metrics)}
        tuned = self.plain(trainer.model)
        save_policy(tuned, self.folder)
        return {**log, "dev_nll": {self.was: self.before, self.becomes: self._dev_nll(tuned)}}

    def plain(self, model: Any) -> Policy:
        """The policy of a model as it is trained: without its adapter, and in the number format of the checkpoint that it started from."""
        return Policy(merged(model, self.settings).to(self.stored).eval(), self.policy.tokenizer, self.becomes)

    def _dev_nll(self, policy: Policy) -> float | None:
        return mean_nll(policy, self.dev_rows) if self.dev_rows else None


def _keep(targets: Mapping[Path, float], apart: bool, as_policy: Callable[[Any], Policy]) -> Any:
    """Saves a copy of the model in each target once its share of the steps is done, for which memory, not the card's, holds it twice for that moment;
    `apart`: not at the last step, and at any other once."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            now = [target for target, share in targets.items() if max(1, round(share * state.max_steps)) == state.global_step]
            if apart:
                now = now[:1] if state.global_step < state.max_steps else []
            for target in now if state.is_world_process_zero else []:
                if not target.exists():
                    building = target.with_name(f".{target.name}")
                    save_policy(as_policy(_copy(model)), building)
                    os.replace(building, target)

    return Keep()


def _copy(model: Any) -> Any:
    """A copy of a model that is being trained, in the memory of the CPU."""
    import torch

    known: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach().cpu().clone(), p.requires_grad) for p in model.parameters()}
    known |= {id(b): b.detach().cpu().clone() for b in model.buffers()}
    return copy.deepcopy(model, known)


def collate(batch: Sequence[dict[str, Any]], pad_id: int, *, skip: bool = False) -> dict[str, Any]:
    """A dict of `input_ids_B_T`, `attention_mask_B_T`, `labels_B_T`, right-padded; padding carries no loss. `skip`: no logits for the
    positions before the first that any row has a loss at, since the output layer is a third of a small model: `labels_B_K`, and K."""
    ids_B_T, mask_B_T = pad([row["input_ids"] for row in batch], pad_id)
    labels_B_T, _ = pad([row["labels"] for row in batch], IGNORED)
    inputs = {"input_ids": ids_B_T, "attention_mask": mask_B_T}
    if not skip:
        return {**inputs, "labels": labels_B_T}
    start = max(int((labels_B_T != IGNORED).any(0).int().argmax()) - 1, 0)  # the token before an answer tells its first
    return {**inputs, "labels": labels_B_T[:, start:], "logits_to_keep": labels_B_T.shape[1] - start}

"""Supervised fine-tuning: forward KL over trajectories, `max_pi E_D[sum_t log pi(y_t | s_t)]` (method.md section 2)."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from irlign.data.chat import template_in_words
from irlign.policy.tuning import Tuning, collate
from irlign.records import Demonstration
from irlign.training import TrainerSettings

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [alignment-from-demonstrations]
---
# sft: a policy that imitates demonstrations

Fine-tuned by irlign {version} from {start} on {rows} demonstrations of {data}{how}: {steps} steps of {batch} rows, peak learning rate {rate:g}.
Loss on unseen demonstrations: {loss}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForCausalLM, AutoTokenizer))
```
Prompts are read in {template}.

Limits: it imitates what it was shown, mistakes and style included. Nothing in its training asked for answers that are true or safe; the report of
its run says how they compare with those of the initial policy and of the demonstrations.
"""


class SFTSettings(TrainerSettings):
    """Supervised fine-tuning on the train demonstrations."""

    loss_on_prompt: bool = Field(False, description="also learn the prompt's tokens: a baseline, no part of the method")
    keep_checkpoints: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list, description="shares of the steps, [0.5]: pi_SFT after them is a further worse side of the contrasts with pi_0"
    )

    @property
    def kept(self) -> dict[str, float]:
        """The earlier checkpoints by name: `sft-0.5` after half of the steps."""
        return {f"sft-{share:g}": share for share in sorted(self.keep_checkpoints)}


def train_sft(
    init: Path, train: Sequence[Demonstration], dev: Sequence[Demonstration], settings: SFTSettings, **about: Any
) -> dict[str, Any]:
    """Fine-tune the policy in `init` on demonstrations and save it in `folder` as a plain transformers checkpoint, the earlier
    checkpoints that the settings keep beside it, under their names.

    `about` is what `Tuning` takes further: chat_template, folder, checkpoints, seed, report_to. Returns steps, losses, and the dev loss
    (nats a completion token) before and after. Raises ModelError on divergence.
    """
    tuning = Tuning(init, dev, settings, was="initial", becomes="sft", stage="sft", kept=settings.kept, kept_apart=False, **about)
    encoded = tuning.form.encode([d.prompt.content for d in train], [d.completion for d in train])
    rows = [{"input_ids": r.ids, "labels": r.ids if settings.loss_on_prompt else r.labels} for r in encoded]
    skip = "logits_to_keep" in inspect.signature(tuning.policy.model.forward).parameters
    trainer = tuning.trainer(tuning.arguments(), rows, partial(collate, skip=skip))
    return {**tuning.finish(trainer), "rows": len(rows)}


def publish_card(
    folder: Path, log: Mapping[str, Any], settings: SFTSettings, *, start: str, data: str, chat_template: str, version: str
) -> None:
    """README.md beside the policy that `train_sft` saved in `folder`; `log` is what it returned, `start` and `data` name pi_0 and the data."""
    before, after = (log["dev_nll"][side] for side in ("initial", "sft"))
    text = CARD.format(
        version=version,
        start=start,
        rows=log["rows"],
        data=data,
        how=f", as a LoRA adapter of rank {settings.lora_r}, merged" if settings.use_peft else "",
        steps=log["steps"],
        batch=settings.per_device_train_batch_size * settings.gradient_accumulation_steps * log.get("processes", 1),
        rate=settings.learning_rate,
        loss="not measured" if after is None else f"{before:.3f} nats a token before, {after:.3f} after",
        template=template_in_words(chat_template),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")

"""A discriminator of single tokens: what an answer's next token says for the better side, after all that stands before it.

`min_h E_better[sum_t -log s(h(s_t, a_t))] + E_worse[sum_t -log s(-h(s_t, a_t))]`, every token weighing the same. At the best h
`h = log rho_better(s, a) - log rho_worse(s, a)` but for a constant, rho being the occupancies (method.md section 2), so what is made better by it
is every step and not the whole answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from irlign.data.chat import IGNORED, Encoded, Format, context_length, pad
from irlign.errors import ModelError
from irlign.files import write_json
from irlign.forward import Batch, each_batch
from irlign.records import Contrast
from irlign.training import TrainerSettings, bf16_pays, fit, merged, training_arguments, with_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOG = "tokens.json"  # in the folder of a discriminator once it is there
SIDES = (1.0, 0.0)  # the label of a better answer's tokens, and of a worse one's


class TokenDiscriminator:
    """An `AutoModelForTokenClassification` with one logit a token."""

    def __init__(self, model: "PreTrainedModel", form: Format):
        self.model, self.format, self.pad_id = model, form, int(form.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path, chat_template: str) -> "TokenDiscriminator":
        """One that has been trained, or a fresh head over the policy in the folder. Raises ModelError where its architecture has none."""
        import torch
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"no discriminator of tokens can start from it: {line}", where=folder, do="on_policy.dense=log-ratio needs none") from error  # fmt: skip
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), Format(tokenizer, chat_template))

    def logits(self, rows: Sequence[Encoded]) -> list[np.ndarray]:
        """h of each token of each row's completion. `rows` arrays of shape [tokens], a row longer than the model's context being cut to it."""
        import torch

        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        limit = context_length(self.model.config)

        def read(batch: Batch) -> None:
            logits_B_T = self.model(**batch.inputs).logits[:, :, 0].double().cpu().numpy()
            for place, row, own_T in zip(batch.places, batch.rows, logits_B_T, strict=True):
                found[place] = own_T[len(row.prompt_ids) : len(row)]

        with torch.inference_mode():
            each_batch(self.model, [row.within(limit) for row in rows], self.pad_id, read, where="scoring tokens")
        return found


def train_tokens(
    backbone: Path,
    train: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: TrainerSettings,
    *,
    folder: Path,
    checkpoints: Path,
    chat_template: str,
    seed: int,
    report_to: str,
) -> dict[str, Any]:
    """Train a discriminator, from the policy in `backbone`, on all tokens of the pairs, and save it in `folder` as a plain transformers checkpoint.

    Returns what tokens.json holds: steps, losses (log 2 knows nothing), the number of pairs, and of the dev pairs the share of `tokens` that are on the side that their
    logit says, and of `pairs` whose better answer has the higher mean logit. Raises ModelError on divergence.
    """
    from transformers import Trainer, set_seed

    set_seed(seed)
    own = TokenDiscriminator.load(backbone, chat_template)
    rows = [
        {"input_ids": row.ids, "labels": [IGNORED] * len(row.prompt_ids) + [side] * len(row.completion_ids)}
        for side, encoded in zip(SIDES, _encoded(own, train), strict=True)
        for row in encoded
    ]
    bf16 = bf16_pays(sum(p.numel() for p in own.model.parameters()))
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16, report_to=report_to)
    trainer = Trainer(
        model=with_adapter(own.model, settings, "TOKEN_CLS"),
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda batch: _collate(batch, own.pad_id),
        compute_loss_func=token_loss,
    )
    log = fit(trainer, "optimise.discriminator", checkpoints)
    own.model = merged(trainer.model, settings).eval()
    own.model.save_pretrained(folder)
    own.format.tokenizer.save_pretrained(folder)
    log |= {"pairs": {"train": len(train), "dev": len(dev)}, "dev": _told_apart(own, dev)}
    write_json(folder / LOG, log)
    return log


def token_loss(outputs: Any, labels: "torch.Tensor", num_items_in_batch: Any = None) -> "torch.Tensor":
    """`-log s(h)` of tokens with label 1 and `-log s(-h)` of those with label 0, summed and over the number of tokens in the step."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    counts = labels != IGNORED
    total = binary_cross_entropy_with_logits(outputs.logits[:, :, 0][counts].float(), labels[counts].float(), reduction="sum")
    return total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


def _collate(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    ids_B_T, mask_B_T = pad([row["input_ids"] for row in batch], pad_id)
    return {"input_ids": ids_B_T, "attention_mask": mask_B_T, "labels": pad([row["labels"] for row in batch], IGNORED)[0]}


def _encoded(own: TokenDiscriminator, pairs: Sequence[Contrast]) -> tuple[list[Encoded], list[Encoded]]:
    """The better and the worse answers, no longer than the model reads."""
    limit, prompts = context_length(own.model.config), [pair.prompt.content for pair in pairs]
    sides = [pair.better for pair in pairs], [pair.worse for pair in pairs]
    better, worse = ([row.within(limit) for row in own.format.encode(prompts, side)] for side in sides)
    return better, worse


def _told_apart(own: TokenDiscriminator, pairs: Sequence[Contrast]) -> dict[str, float] | None:
    if not pairs:
        return None
    better, worse = (own.logits(side) for side in _encoded(own, pairs))
    tokens = np.concatenate([*better, *(-h for h in worse)]) > 0
    return {"tokens": float(tokens.mean()), "pairs": float(np.mean([b.mean() > w.mean() for b, w in zip(better, worse, strict=True)]))}

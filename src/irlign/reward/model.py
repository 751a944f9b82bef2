"""The classifier reward: a sequence-classification head with one logit over a policy's backbone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from irlign.data.batches import blocks
from irlign.data.chat import Encoded, Format, context_length
from irlign.data.pairs import PAIR, PairFormat
from irlign.errors import ModelError
from irlign.forward import Batch, each_batch
from irlign.progress import Progress
from irlign.records import PromptContent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardModel(Protocol):
    """Whatever scores answers: `score` gives one finite number for each prompt and completion, better is high."""

    name: str

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Rewards of shape [len(prompts)]; the order and the batch never change a score by more than rounding."""
        ...


def _format(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> Format | PairFormat:
    """How texts become tokens: as policies read them, or for an encoder as a text pair."""
    return PairFormat(tokenizer, context_length(model.config)) if chat_template == PAIR else Format(tokenizer, chat_template)


class Classifier:
    """`RewardModel` over an `AutoModelForSequenceClassification` with one logit, read where its architecture reads it: at the last token
    (EOS) of a causal model, at the first of an encoder."""

    def __init__(self, model: "PreTrainedModel", form: Format | PairFormat, name: str):
        pad_id = form.tokenizer.pad_token_id
        if pad_id is None or pad_id == form.tokenizer.eos_token_id:
            raise ModelError(
                "the reward model's pad token is missing or equals EOS, so its reward would be read at the wrong token",
                where=name,
                do="save it with a pad token of its own",
            )
        self.model, self.format, self.name, self.pad_id = model, form, name, int(pad_id)

    @classmethod
    def start(cls, backbone: Path, chat_template: str, name: str, heads: int = 1) -> "Classifier":
        """A fresh head (or several, reward/heads.py) over the backbone of a policy folder, with a pad token that differs from EOS."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                backbone, num_labels=heads, problem_type="regression", dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"no reward model can start from it: {line}", where=backbone, do="see reward.backbone") from error
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
        if heads == 1:
            model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
        return cls(model, _format(model, tokenizer, chat_template), name)

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any]) -> "Classifier":
        """The reward published in `rewards/NAME`."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = (
                AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(device).eval()
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"the reward model cannot be loaded: {line}", where=folder, do="run the stage reward again") from error
        return cls(model, _format(model, tokenizer, reward["chat_template"]), reward["name"])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.format.tokenizer.save_pretrained(folder)

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """The logit, length-sorted batches, right padding. Shape [len(prompts)]. Raises ModelError when one is not finite."""
        return self.logits_of(prompts, completions)[:, 0]

    def logits_of(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """All logits of the head, one for a plain classifier. Shape [len(prompts), K]."""
        with Progress(f"score {self.name}", len(prompts), "answers") as bar:
            found = [self.logits(self.format.encode(prompts[of], completions[of]), bar) for of in blocks(len(prompts))]
        return np.concatenate(found) if found else self.logits([])

    def logits(self, rows: Sequence[Encoded], progress: Progress | None = None) -> np.ndarray:
        """The same of tokenized answers. Shape [rows, K]."""
        import torch

        limit = context_length(self.model.config)
        rows = [row.within(limit) for row in rows]
        rewards = np.zeros((len(rows), int(self.model.config.num_labels or 1)))

        def score(batch: Batch) -> None:
            rewards[batch.places] = self.model(**batch.inputs).logits.double().cpu().numpy()
            if progress is not None:
                progress.advance(len(batch.rows))

        with torch.inference_mode():
            each_batch(self.model, rows, self.pad_id, score, where=f"score {self.name}")
        if not np.isfinite(rewards).all():
            raise ModelError(
                f"{int((~np.isfinite(rewards)).sum())} rewards are not finite",
                where=self.name,
                do="train it again with a lower learning rate",
            )
        return rewards

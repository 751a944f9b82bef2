"""The golden reward: what an answer is truly worth, by something that training and selection never saw."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.errors import ConfigError, GuardError, ModelError
from irlign.records import PromptContent

Golden = Callable[[Sequence[PromptContent], Sequence[str]], Sequence[float]]
BATCH = 32


def load_golden(spec: str) -> Golden:
    """`module:function` (taking prompts and completions, giving one number each) or a sequence-classification checkpoint."""
    if Path(spec).expanduser().is_dir() or ":" not in spec:
        return _Checkpoint(os.path.expanduser(spec)).score
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(f"{spec!r} cannot be imported: {error}", where="evaluation.golden_reward", do="write module:function") from error
    except AttributeError:
        raise ConfigError(f"{module_name} has no {name}", where="evaluation.golden_reward", do="write module:function") from None
    finally:
        sys.path.remove(os.getcwd())
    return function


def guard_golden(spec: str | None, trained: Sequence[Path]) -> None:
    """Error where the golden reward is something that this run trained: it would be judging itself."""
    path = Path(spec).expanduser().resolve() if spec else None
    if path is not None and any(path == folder or path.is_relative_to(folder) for folder in trained):
        raise GuardError(
            "the golden reward is a model of this very run",
            where="evaluation.golden_reward",
            do="give a reward that the run never trained",
        )


def score_golden(golden: Golden, prompts: Sequence[PromptContent], completions: Sequence[str], name: str) -> np.ndarray:
    """One finite number for each answer, shape [len(prompts)]. Raises ConfigError where the function gives anything else."""
    try:
        values = np.asarray(list(golden(prompts, completions)), dtype=float)
    except (TypeError, ValueError) as error:
        do = "it takes a list of prompts and a list of completions and gives one number each"
        raise ConfigError(f"{name} failed: {error}", where="evaluation.golden_reward", do=do) from error
    if values.shape != (len(prompts),) or not np.isfinite(values).all():
        what = (
            f"gave shape {values.shape} for {len(prompts)} answers"
            if values.shape != (len(prompts),)
            else "gave a value that is not finite"
        )
        raise ConfigError(f"{name} {what}", where="evaluation.golden_reward")
    return values


class _Checkpoint:
    """A sequence-classification checkpoint: one logit, or the second logit minus the first."""

    def __init__(self, path: str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)  # type: ignore[misc]
        except Exception as error:  # transformers raises many kinds
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"no golden reward can be loaded: {line}", where=path, do="give module:function or a checkpoint's folder"
            ) from error
        if info["missing_keys"] or model.config.num_labels > 2 or self.tokenizer.pad_token_id is None:
            what = (
                "has no trained head"
                if info["missing_keys"]
                else "has no pad token"
                if model.config.num_labels <= 2
                else "has more than two labels"
            )
            raise ModelError(f"the checkpoint {what}, so it is no golden reward", where=path)
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval()

    def text(self, prompt: PromptContent, completion: str) -> str:
        """Prompt and answer in the checkpoint's own chat template, or joined as plain text."""
        if self.tokenizer.chat_template is None:
            return (prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt) + "\n\n") + completion
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        return str(self.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion}], tokenize=False))

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> list[float]:
        import torch

        texts = [self.text(p, c) for p, c in zip(prompts, completions, strict=True)]
        plain = self.tokenizer.chat_template is None  # a template writes its own BOS
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True, "add_special_tokens": plain}
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = self.tokenizer(texts[start : start + BATCH], **options)
                logits = self.model(**batch).logits.float()
                scores += (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).tolist()
        return scores

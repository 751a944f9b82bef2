"""The golden reward: what an answer is truly worth, by something that training and selection never saw."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.batches import in_batches
from irlign.data.chat import context_length
from irlign.errors import ConfigError, GuardError, IrlignError, ModelError
from irlign.files import hash_path
from irlign.machine import has_cuda
from irlign.progress import say
from irlign.records import PromptContent
from irlign.reward.features import CPU_TOKENS, GPU_TOKENS
from irlign.reward.load import load_reward

Golden = Callable[[Sequence[PromptContent], Sequence[str]], Sequence[float] | np.ndarray]
OWN = ("*.safetensors", "reward.json")  # the files that tell one reward from another


def load_golden(spec: str) -> Golden:
    """`module:function` (taking prompts and completions, giving one number each), a reward of irlign's, or a
    sequence-classification checkpoint. Raises ConfigError or ModelError where it cannot be loaded.
    """
    if not is_function(spec):
        path = Path(spec).expanduser()
        return load_reward(path).score if (path / "reward.json").is_file() else _Checkpoint(str(path)).score
    module_name, _, name = spec.partition(":")
    try:
        with _working_directory():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: importing it may do anything
        what = f"{spec!r} cannot be imported: {_said(error)}"
        raise ConfigError(what, where="evaluation.golden_reward", do="write module:function") from error
    if not callable(function := getattr(module, name, None)):
        what = f"{name} in {module_name} is no function" if hasattr(module, name) else f"{module_name} has no {name}"
        raise ConfigError(what, where="evaluation.golden_reward", do="write module:function")
    return function


def is_function(spec: str) -> bool:
    """Whether the golden reward is a `module:function`, and no checkpoint."""
    return ":" in spec and not Path(spec).expanduser().is_dir()


def golden_inputs(spec: str | None) -> dict[str, str]:
    """What the golden reward depends on, as inputs of a stage: the file that holds the function, or the checkpoint."""
    if not spec:
        return {}
    if not is_function(spec):
        return {"golden_reward": os.path.expanduser(spec)}
    try:
        with _working_directory():
            found = importlib.util.find_spec(spec.partition(":")[0])
    except (Exception, SystemExit):  # `load_golden` says what is wrong with it
        return {}
    return {"golden_reward": found.origin} if found and found.has_location and found.origin else {}


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Imports look into the working directory too, as with `python -m`."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def guard_golden(spec: str | None, trained: Sequence[Path]) -> None:
    """Error where the golden reward is something that this run trained, or a copy of it: it would be judging itself."""
    if not spec:
        return
    path = Path(spec).expanduser().resolve()
    inside = any(path == folder or path.is_relative_to(folder) for folder in trained)
    if inside or ((own := _contents([path])) and own & _contents(trained)):
        raise GuardError(
            "the golden reward is a model of this very run",
            where="evaluation.golden_reward",
            do="give a reward that the run never trained",
        )


def _contents(folders: Sequence[Path]) -> set[str]:
    """The hashes of everything below the folders that makes a reward what it is: weights, and reward.json."""
    return {hash_path(file) for folder in folders for pattern in OWN for file in folder.rglob(pattern)}


def score_golden(golden: Golden, prompts: Sequence[PromptContent], completions: Sequence[str], name: str) -> np.ndarray:
    """One finite number for each answer, shape [len(prompts)]. Raises ConfigError where the function gives anything else."""
    try:
        values = np.asarray(list(golden(prompts, completions)), dtype=float)
    except IrlignError:
        raise
    except Exception as error:  # the function is the user's: it may raise anything
        do = "it takes a list of prompts and a list of completions and gives one number each; --debug shows where it failed"
        raise ConfigError(f"{name} failed: {_said(error)}", where="evaluation.golden_reward", do=do) from error
    if values.shape != (len(prompts),) or not np.isfinite(values).all():
        what = (
            f"gave shape {values.shape} for {len(prompts)} answers"
            if values.shape != (len(prompts),)
            else "gave a value that is not finite"
        )
        raise ConfigError(f"{name} {what}", where="evaluation.golden_reward")
    return values


def _said(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


class _Checkpoint:
    """A sequence-classification checkpoint: one logit, or the second logit minus the first."""

    def __init__(self, path: str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options: dict[str, Any] = {"output_loading_info": True}
            model, info = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False, **options)
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
        self.model = model.to("cuda" if has_cuda() else "cpu").eval()

    def text(self, prompt: PromptContent, completion: str) -> str:
        """Prompt and answer in the checkpoint's own chat template, or joined as plain text."""
        if self.tokenizer.chat_template is None:
            return (prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt) + "\n\n") + completion
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        return str(self.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion}], tokenize=False))

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> list[float]:
        """Says aloud how many texts lost their end at the checkpoint's context."""
        import torch

        if not prompts:
            return []
        texts = [self.text(p, c) for p, c in zip(prompts, completions, strict=True)]
        limit = min(self.tokenizer.model_max_length, context_length(self.model.config))
        options: dict[str, Any] = {"add_special_tokens": self.tokenizer.chat_template is None}  # a template writes its own BOS
        rows = self.tokenizer(texts, verbose=False, **options)
        if long := sum(len(ids) > limit for ids in rows["input_ids"]):
            say(f"golden reward: {long} of {len(texts)} texts are longer than its {limit} tokens, and lose their end")
            rows = self.tokenizer(texts, truncation=True, max_length=limit, **options)
        scores, where = np.zeros(len(texts)), self.model.device
        budget = GPU_TOKENS if where.type == "cuda" else CPU_TOKENS

        def read(batch: list[int]) -> None:
            padded = self.tokenizer.pad({key: [of[i] for i in batch] for key, of in rows.items()}, return_tensors="pt")
            logits = self.model(**padded.to(where)).logits.float()
            scores[batch] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).cpu().numpy()

        with torch.inference_mode():
            in_batches([len(ids) for ids in rows["input_ids"]], budget, read, where="golden reward")
        return scores.tolist()

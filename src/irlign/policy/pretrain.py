"""pi_0 for a world: a small Llama and a word-level tokenizer, trained on the world's corpus and cached by content hash.

From `policies/init` on, nothing knows that the world is synthetic.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from irlign.data.chat import Format
from irlign.files import remove, sync
from irlign.machine import versions
from irlign.policy.load import Policy, save_policy
from irlign.policy.tuning import collate
from irlign.progress import say
from irlign.records import PromptContent
from irlign.training import TrainerSettings, fit, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9\s]|\s"


class PretrainSettings(TrainerSettings):
    """The small model of a world and how it is trained."""

    learning_rate: float = Field(4e-3, gt=0, description="peak learning rate (AdamW)")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the corpus")
    per_device_train_batch_size: int = Field(32, ge=1, description="lines a step")
    hidden_size: int = Field(96, ge=8, description="width; with 3 layers about 0.4 million parameters")
    num_hidden_layers: int = Field(3, ge=1, description="layers")
    num_attention_heads: int = Field(4, ge=1, description="heads; they divide the width")
    intermediate_size: int = Field(256, ge=8, description="width of the feed-forward layers")
    max_position_embeddings: int = Field(256, ge=32, description="context in tokens")


def pretrain(
    corpus: Sequence[tuple[PromptContent, str]],
    vocabulary: Iterable[str],
    settings: PretrainSettings,
    *,
    chat_template: str = "none",
    folder: Path,
    checkpoints: Path,
    seed: int,
) -> dict[str, Any]:
    """Train a policy on `(prompt, answer)` lines, the loss on the answers, and save it in `folder` with its chat template.

    A policy of the same corpus, settings and seed is taken from the cache (`IRLIGN_CACHE`, else ~/.cache/irlign).
    Returns parameters, steps, losses and whether the cache had it.
    """
    words = sorted(set(vocabulary))
    key = _content_hash([corpus, words, settings.model_dump(mode="json"), chat_template, seed, versions()])
    stored = Path(os.environ.get("IRLIGN_CACHE") or Path.home() / ".cache/irlign").expanduser() / "pretrained" / key
    if (stored / "log.json").is_file():
        remove(folder)  # what a killed attempt may have left
        shutil.copytree(stored / "policy", folder)
        say(f"pretrain: taken from the cache ({key})")
        return {**json.loads((stored / "log.json").read_text(encoding="utf-8")), "cached": True}
    log = _train(corpus, words, settings, chat_template, folder, checkpoints, seed)
    try:
        _store(folder, log, stored)
    except OSError as error:
        say(f"pretrain: not cached: {error.strerror}")
    return {**log, "cached": False}


def _store(policy: Path, log: dict[str, Any], stored: Path) -> None:
    """Put a policy with its log into the cache, whole or not at all. One process stores at a time, so what lies in `.building` was left by a
    killed one."""
    stored.parent.mkdir(parents=True, exist_ok=True)
    with (stored.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        building = stored.parent / ".building"
        remove(building)
        if stored.exists():
            return
        try:
            shutil.copytree(policy, building / "policy")
            (building / "log.json").write_text(json.dumps(log), encoding="utf-8")
            sync(building)
            os.replace(building, stored)
        finally:
            remove(building)


def _train(
    corpus: Sequence[tuple[PromptContent, str]],
    words: Sequence[str],
    settings: PretrainSettings,
    chat_template: str,
    folder: Path,
    checkpoints: Path,
    seed: int,
) -> dict[str, Any]:
    from transformers import Trainer, set_seed

    set_seed(seed)
    tokenizer = word_tokenizer(words, settings.max_position_embeddings)
    model = _small_llama(tokenizer, settings)
    rows = Format(tokenizer, chat_template).encode([prompt for prompt, _ in corpus], [answer for _, answer in corpus])
    policy = Policy(model, tokenizer, "init")
    trainer = Trainer(
        model=model,
        args=training_arguments(settings, checkpoints, seed=seed, bf16=False, report_to="none"),
        train_dataset=[{"input_ids": row.ids, "labels": row.labels} for row in rows],  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch, policy.pad_id),
    )
    log = fit(trainer, "pretrain", checkpoints)
    model.eval()
    save_policy(policy, folder)
    return {**log, "parameters": sum(p.numel() for p in model.parameters()), "rows": len(rows)}


def _word_split() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(WORDS), "isolated")


def word_count(text: str) -> int:
    """How many tokens the words, marks and spaces of a text are."""
    return len(_word_split().pre_tokenize_str(text))


def word_tokens(texts: Iterable[str]) -> list[str]:
    """The vocabulary of `word_tokenizer`, in the order of its ids."""
    split = _word_split()
    pieces = {piece.strip() for text in texts for piece, _ in split.pre_tokenize_str(text)} - {""}
    return ["<pad>", "<eos>", "<unk>", " ", "\n", *sorted(pieces), *sorted(f" {p}" for p in pieces if p.isalnum())]


def word_tokenizer(texts: Iterable[str], max_length: int) -> "PreTrainedTokenizerBase":
    """A token for each word and number, with and without the space before it, for each mark of punctuation and the newline; no BOS."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = word_tokens(texts)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _word_split()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _small_llama(tokenizer: "PreTrainedTokenizerBase", settings: PretrainSettings) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings.model_dump(
        include={"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"}
    )
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids))


def _content_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]

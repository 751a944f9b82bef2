"""A policy and an encoder small enough for every test: random two-layer models and a word-level tokenizer that keeps every space."""

import json
from pathlib import Path
from typing import Any

WORDS = ("the", "The", "a", "cat", "dog", "bird", "sat", "ran", "sang", "on", "mat", "and", "red", "blue", "home", "now")
MARKS = (".", "!", "?", "\n", ",", ":")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def make_tiny_tokenizer(special: bool = True, chat_template: str | None = None) -> Any:
    """Words with and without a leading space, punctuation alone, BOS in front. `special=False`: no EOS and no pad."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *MARKS, *WORDS, *(f"▁{word}" for word in WORDS), "▁"]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    marks = pre_tokenizers.Split(Regex(r"[.!?,:\n]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.Metaspace(prepend_scheme="never")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>"} if special else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", **names)
    fast.chat_template = chat_template
    return fast


def make_tiny_policy(folder: Path, seed: int = 0, *, tokenizer: Any = None, architecture: str = "llama", **config: Any) -> Path:
    """Save a random-weight causal language model and its tokenizer in `folder`, about 20,000 parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tiny_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(seed)
    if architecture == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **(sizes | config)))
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.25}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ids, **(sizes | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Save a random two-layer BERT with segment ids and a tokenizer that frames pairs, as `AutoModel` would; 24 tokens fit."""
    import torch
    from tokenizers import processors
    from transformers import BertConfig, BertModel

    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_max_length = 24
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=3, initializer_range=0.3, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": names}))
    return folder

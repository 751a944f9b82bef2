"""Random causal language models of a few thousand parameters, one for each family that shares prompts, and some with layers that do not."""

from typing import Any

import torch
import transformers as t

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
WINDOW = {"sliding_window": 5, "head_dim": 8}

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (t.LlamaConfig, SIZES),
    "mistral": (t.MistralConfig, SIZES | WINDOW),
    "qwen2": (t.Qwen2Config, SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": (t.Qwen3Config, SIZES | {"head_dim": 16}),
    "gemma": (t.GemmaConfig, SIZES | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (t.Gemma2Config, SIZES | WINDOW | {"attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 4}),
    "gemma3": (t.Gemma3TextConfig, SIZES | WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": (t.GPT2Config, {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}),
}

LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
BOTH = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
HYBRIDS: dict[str, tuple[Any, dict[str, Any]]] = {  # a convolution, linear attention, both kinds in one layer
    "lfm2": (t.Lfm2Config, SIZES | {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (
        t.Qwen3NextConfig,
        SIZES | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]} | LINEAR | EXPERTS,
    ),
    "falcon_h1": (t.FalconH1Config, SIZES | {"head_dim": 8} | BOTH),
}


def make_model(family: str, seed: int = 0) -> Any:
    """The family's model with random weights, in evaluation mode."""
    config, sizes = (FAMILIES | HYBRIDS)[family]
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(config(**IDS, **sizes)).eval()

"""Policies: a causal language model, its tokenizer and a name, from a folder, an adapter or a Hub id."""

import inspect
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.data.chat import context_length
from irlign.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """`model` in eval mode on its device, the tokenizer it was trained with, and a name for messages."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str

    @property
    def device(self) -> "torch.device":
        return self.model.device

    @property
    def pad_id(self) -> int:
        """Any id will do where an attention mask says what is padding; EOS stands in where the tokenizer has no pad."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]

    @property
    def max_length(self) -> int:
        """The longest prompt plus completion, in tokens, that the model can read."""
        return context_length(self.model.config)


def device() -> "torch.device":
    """The accelerator where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder or at a Hub id, or a `ModelError` that says what is missing."""
    from transformers import AutoTokenizer

    _must_exist(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        remedy = "save the model's tokenizer beside it" if Path(path).is_dir() else "give the folder that holds config.json, or a Hub id"
        raise ModelError(f"no usable tokenizer: {_first_line(error)}", where=path, do=remedy) from error


def load_config(path: str) -> Any:
    """The model configuration in a folder (an adapter's: that of its base) or at a Hub id. Raises ModelError."""
    from transformers import AutoConfig

    _must_exist(path)
    try:
        if Path(path, "adapter_config.json").is_file():
            from peft import PeftConfig

            path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"no readable model configuration: {_first_line(error)}", where=path, do=_install_peft(error) or _no_folder(path)
        ) from error


def has_token_head(path: str) -> bool:
    """Whether transformers has a token classifier for the model in a folder or at a Hub id. Raises ModelError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

    return load_config(path).model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES


def check_causal(path: str) -> None:
    """Raises ModelError where the checkpoint in a folder or at a Hub id is no causal language model, or one that keeps its past in a way of
    its own (Mamba, RWKV, XLNet), by its configuration alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(path)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if known else None
    if known and "past_key_values" not in inspect.signature(model.forward).parameters:
        what = f"answers are drawn from a model's past_key_values, and {config.model_type} models keep their past in another way"
        raise ModelError(what, where=path, do="give one with attention layers, all of them or some (Llama, Qwen, LFM2, ...)")
    if Path(path, "adapter_config.json").is_file():
        return
    wrong_head = [a for a in (config.architectures or []) if "CausalLM" not in a and "LMHead" not in a and "ConditionalGeneration" not in a]
    if not known or wrong_head:
        kind = ", ".join(config.architectures or [config.model_type])
        raise ModelError(f"this checkpoint is {kind}, no causal language model", where=path, do="give a model that generates text")


def count_parameters(path: str) -> int:
    """The parameters of a checkpoint without reading a weight: from the headers of its safetensors files, else of a model built from
    its configuration on the meta device. Raises ModelError."""
    files = sorted(Path(path).glob("model*.safetensors")) if Path(path).is_dir() else []
    if files and not Path(path, "adapter_config.json").is_file():
        return sum(_header_numbers(file) for file in files)
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    try:
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters())
    except Exception as error:
        raise ModelError(f"no model can be built from its configuration: {_first_line(error)}", where=path) from error


def _header_numbers(file: Path) -> int:
    """Numbers in a safetensors file: 8 bytes say how long the JSON is that says every tensor's shape."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def load_policy(path: str, name: str = "policy") -> Policy:
    """The causal language model in a folder or at a Hub id; an adapter's folder (needs peft) gives the merged model.

    Raises ModelError where it cannot generate text, lacks weights, or does not fit its tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    adapter = Path(path, "adapter_config.json").is_file()
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    info: dict[str, Any] = {}
    if not adapter:
        check_causal(path)
    try:
        if adapter:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).merge_and_unload()
        else:
            options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
            model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)  # type: ignore[misc]
    except Exception as error:
        raise ModelError(f"the model cannot be loaded: {_first_line(error)}", where=path, do=_install_peft(error)) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(f"{len(missing)} weights are missing, {missing[0]} first", where=path, do="fetch the whole checkpoint again")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {model.get_input_embeddings().num_embeddings}",
            where=path,
            do="use the tokenizer that the model was trained with",
        )
    model.config.use_cache = True
    return Policy(model.to(device()).eval(), tokenizer, name)  # type: ignore[arg-type]


def save_policy(policy: Policy, folder: Path) -> None:
    """A plain transformers folder: safetensors, configuration, tokenizer (with the chat template in force)."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _must_exist(path: str) -> None:
    """A path that looks local must be there; anything else is left to the Hub client."""
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).exists()
    if looks_local and not Path(path).is_dir():
        raise ModelError("no such model folder", where=path, do="give the folder that holds config.json, or a Hub id")
    if Path(path).is_dir() and not any(Path(path, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError("there is no config.json in this folder, so it holds no model", where=path, do="give a checkpoint's folder")


def _install_peft(error: BaseException) -> str | None:
    return "pip install 'irlign[peft]'" if isinstance(error, ImportError) and error.name == "peft" else None


def _no_folder(path: str) -> str | None:
    if Path(path).is_dir():
        return None
    asked = "no folder has this name, so it was asked of the Hub: check the path, or the id and the network"
    return (
        asked
        if os.environ.get("HF_HUB_OFFLINE")
        else f"{asked}. HF_HUB_OFFLINE=1 asks only what was downloaded before, and so answers at once"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]

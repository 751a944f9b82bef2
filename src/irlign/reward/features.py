"""Frozen features of a policy, of any encoder or of the words alone, and a logistic head on them: a few dozen answers train it."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from irlign.data.batches import blocks, in_batches
from irlign.data.chat import Encoded, Format, check_pairs, context_length, pad
from irlign.data.pairs import plain_text
from irlign.errors import ModelError
from irlign.files import hash_path, replacing
from irlign.policy.load import Policy, device, load_config, load_policy, load_tokenizer
from irlign.progress import Progress
from irlign.records import PromptContent, prompt_identity

CPU_TOKENS, GPU_TOKENS = 4096, 32768  # padded tokens a batch
WORDS, WIDTH = "words", 8192  # the backbone that is none: hashed words, and into how many columns


def policy_features(
    policy: Path,
    prompts: Sequence[PromptContent],
    completions: Sequence[str],
    *,
    chat_template: str,
    name: str,
    loader: Callable[[str, str], Policy] = load_policy,
) -> np.ndarray:
    """Each answer as the policy reads it after its prompt: the last hidden state, averaged over the answer's tokens (EOS
    included) and at EOS alone. Shape [len(prompts), 2H], float32; nothing is trained. An answer past the context is cut.
    """
    import torch

    loaded = loader(str(policy), name)
    form = Format(loaded.tokenizer, chat_template)
    body, width = loaded.model.base_model, int(loaded.model.config.get_text_config().hidden_size)
    found = np.zeros((len(prompts), 2 * width), dtype=np.float32)
    budget = GPU_TOKENS if loaded.device.type == "cuda" else CPU_TOKENS
    with torch.inference_mode(), Progress(f"features {name}", len(prompts), "answers") as bar:
        for of in blocks(len(prompts)):
            rows = [row.within(loaded.max_length) for row in form.encode(prompts[of], completions[of])]

            def read(batch: list[int], rows: Sequence[Encoded] = rows, first: int = of.start) -> None:
                ids_B_T, mask_B_T = (t.to(loaded.device) for t in pad([rows[i].ids for i in batch], loaded.pad_id))
                hidden_B_T_H = body(input_ids=ids_B_T, attention_mask=mask_B_T).last_hidden_state.float()
                for row, i in enumerate(batch):
                    answer_T_H = hidden_B_T_H[row, len(rows[i].prompt_ids) : len(rows[i])]
                    found[first + i] = torch.cat([answer_T_H.mean(0), answer_T_H[-1]]).cpu().numpy()
                bar.advance(len(batch))

            in_batches([len(row) for row in rows], budget, read, where=f"features {name}")
    return found


def encoder_features(
    encoder: Path | str,
    prompts: Sequence[PromptContent],
    completions: Sequence[str],
    *,
    name: str,
    loader: Callable[[str], tuple[Any, Any]] | None = None,
) -> np.ndarray:
    """Each answer as an encoder (`AutoModel`) reads it beside its prompt: the last hidden state, averaged over the answer's tokens
    and over all tokens. Shape [len(prompts), 2H], float32. A conversation is its turns as plain text; a pair past the context loses
    the end of its longer side. Raises ModelError where the encoder cannot be loaded.
    """
    import torch

    tokenizer, model = (loader or load_encoder)(str(encoder))
    texts = [plain_text(p) for p in prompts]
    limit = min(tokenizer.model_max_length, context_length(model.config))
    rows = tokenizer(texts, list(completions), truncation="longest_first", max_length=limit)
    fills = {key: tokenizer.pad_token_id or 0 if key == "input_ids" else 0 for key in rows if key != "attention_mask"}
    found = np.zeros((len(texts), 2 * int(model.config.get_text_config().hidden_size)), dtype=np.float32)
    budget = GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    with torch.inference_mode(), Progress(f"features {name}", len(texts), "answers") as bar:

        def read(batch: list[int]) -> None:
            _, mask_B_T = pad([rows["input_ids"][i] for i in batch], 0)
            given = {key: pad([rows[key][i] for i in batch], fill)[0].to(model.device) for key, fill in fills.items()}
            hidden_B_T_H = model(**given, attention_mask=mask_B_T.to(model.device)).last_hidden_state.float()
            for row, i in enumerate(batch):
                state_T_H, sides = hidden_B_T_H[row, : len(rows["input_ids"][i])], rows.sequence_ids(i)
                answer = [t for t, side in enumerate(sides) if side == 1] or [len(sides) - 1]  # an empty answer: the last token
                found[i] = torch.cat([state_T_H[answer].mean(0), state_T_H.mean(0)]).cpu().numpy()
            bar.advance(len(batch))

        in_batches([len(ids) for ids in rows["input_ids"]], budget, read, where=f"features {name}")
    return found


def load_encoder(path: str) -> tuple[Any, Any]:
    """The tokenizer and the encoder (`AutoModel`, in eval mode on its device) in a folder or at a Hub id. Raises ModelError."""
    import torch
    from transformers import AutoModel

    tokenizer = load_tokenizer(path)
    try:
        model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(f"the encoder cannot be loaded: {line}", where=path, do="see reward.backbone") from error
    return tokenizer, (model.get_encoder() if model.config.is_encoder_decoder else model).to(device()).eval()


def is_policy(path: Path | str) -> bool:
    """Whether a checkpoint is a causal language model (or an adapter of one), by its configuration."""
    names = load_config(str(path)).architectures or []
    return Path(path, "adapter_config.json").is_file() or any("CausalLM" in name or "LMHead" in name for name in names)


def word_features(texts: Sequence[str]) -> np.ndarray:
    """Hashed words and word pairs, `log(1 + count)`, each answer at length 1 so that longer is not larger. Shape [len(texts), WIDTH]."""
    x_B_F = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        for term in [*words, *map(" ".join, pairwise(words))]:
            x_B_F[row, crc32(term.encode("utf-8", "surrogatepass")) % WIDTH] += 1
    x_B_F = np.log1p(x_B_F)
    return x_B_F / np.maximum(np.linalg.norm(x_B_F, axis=1, keepdims=True), 1e-9)


def features_of(
    checkpoint: Path | str,
    prompts: Sequence[PromptContent],
    completions: Sequence[str],
    *,
    chat_template: str,
    name: str,
    policy_loader: Callable[[str, str], Policy] = load_policy,
    encoder_loader: Callable[[str], tuple[Any, Any]] = load_encoder,
) -> np.ndarray:
    """The features of answers under a policy, which reads them in its own format, any other checkpoint, which reads plain text, or WORDS,
    which sees the answer alone."""
    if str(checkpoint) == WORDS:
        return word_features(completions)
    if is_policy(checkpoint):
        return policy_features(Path(checkpoint), prompts, completions, chat_template=chat_template, name=name, loader=policy_loader)
    return encoder_features(checkpoint, prompts, completions, name=name, loader=encoder_loader)


def is_encoder(path: Path | str) -> bool:
    """Whether a checkpoint is no policy and of a kind that is trained to fill masks (BERT and its like), by its configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return not is_policy(path) and load_config(str(path)).model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


class Features:
    """The features of answers under one frozen checkpoint, each computed once: `features(prompts, completions)`, shape [B, F].

    What was computed is kept, and `save` and `take` carry it from one reward, or one run of a stage, to the next.
    """

    def __init__(self, checkpoint: Path | str, chat_template: str, name: str = "features"):
        self.checkpoint, self.chat_template, self.name = checkpoint, chat_template, name
        self.known: dict[str, np.ndarray] = {}
        self.policy_loader: Callable[[str, str], Policy] = load_policy
        self.encoder_loader: Callable[[str], tuple[Any, Any]] = load_encoder
        self.remembers = True  # whether what was computed is kept from call to call

    def __call__(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        check_pairs(prompts, completions)
        keys = [_answer_identity(p, c) for p, c in zip(prompts, completions, strict=True)]
        missing = list({key: i for i, key in enumerate(keys) if key not in self.known}.values())
        if missing:
            wanted: tuple[list[Any], list[str]] = ([prompts[i] for i in missing], [completions[i] for i in missing])
            about: dict[str, Any] = {"policy_loader": self.policy_loader, "encoder_loader": self.encoder_loader}
            found = features_of(self.checkpoint, *wanted, chat_template=self.chat_template, name=self.name, **about)
            self.known |= {keys[i]: row for i, row in zip(missing, found, strict=True)}
        found_B_F = np.stack([self.known[key] for key in keys])
        if not self.remembers:
            self.known.clear()
        return found_B_F

    def identity(self) -> str:
        """What the features depend on besides the answers: the checkpoint's content (its name on the Hub) and the template."""
        place = Path(self.checkpoint)
        return json.dumps([hash_path(place) if place.is_dir() else str(place), self.chat_template])

    def save(self, path: Path, prompts: Sequence[PromptContent], completions: Sequence[str]) -> None:
        """The features of these answers as safetensors: `features` [N, F], `answers` [N, 16] (the bytes of a hash), beside `identity`."""
        from safetensors.numpy import save_file

        keys = sorted({_answer_identity(p, c) for p, c in zip(prompts, completions, strict=True)})
        answers = np.array([list(bytes.fromhex(key)) for key in keys], dtype=np.uint8)
        with replacing(path) as temporary:
            save_file(
                {"features": np.stack([self.known[key] for key in keys]), "answers": answers}, temporary, {"identity": self.identity()}
            )

    def take(self, path: Path) -> bool:
        """Take over what `save` stored, where the same checkpoint made it and the file is whole. Returns whether it did."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("identity") != self.identity():
                    return False
                answers, features = file.get_tensor("answers"), file.get_tensor("features")
        except (OSError, SafetensorError):
            return False
        self.known |= {bytes(key).hex(): row for key, row in zip(answers, features, strict=True)}
        return True


def known_features(checkpoint: Path | str, chat_template: str, rewards: Path) -> Features:
    """The features of a checkpoint with all that the rewards in the folder `rewards` have stored of them."""
    features = Features(checkpoint, chat_template)
    for stored in sorted(rewards.glob("*/features.safetensors")):
        features.take(stored)
    return features


def _answer_identity(prompt: PromptContent, completion: str) -> str:
    """32 hex digits that name an answer to a prompt."""
    return hashlib.sha256(f"{prompt_identity(prompt)}\n{completion}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


class LogisticHead:
    """`logit = w . (x - mean) / (scale sqrt(width)) + b`, fitted by weighted logistic regression with a ridge on w."""

    def __init__(self, x_B_F: np.ndarray, better_B: np.ndarray, weight_B: np.ndarray, ridge: float):
        """`better_B` is 1 or 0; weights count within the sum of all. Raises ValueError where one side is missing."""
        from scipy.optimize import minimize
        from scipy.special import expit

        if not (weight_B[better_B == 1].sum() > 0 and weight_B[better_B == 0].sum() > 0):
            raise ValueError("a logistic head needs answers on both sides")
        self.mean_F = x_B_F.mean(0, dtype=np.float64)
        self.scale_F = (x_B_F.std(0, dtype=np.float64) + 1e-6) * np.sqrt(x_B_F.shape[1])
        z_B_F, share_B = (x_B_F - self.mean_F) / self.scale_F, weight_B / weight_B.sum()

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            """The logistic loss of reward/objectives.py with its gradient in closed form."""
            logit_B = z_B_F @ theta[:-1] + theta[-1]
            residual_B = share_B * (expit(logit_B) - better_B)
            value = float(share_B @ np.logaddexp(0.0, np.where(better_B == 1, -logit_B, logit_B)) + ridge * theta[:-1] @ theta[:-1])
            return value, np.append(residual_B @ z_B_F + 2 * ridge * theta[:-1], residual_B.sum())

        fit = minimize(loss, np.zeros(x_B_F.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
        self.weight_F, self.bias = fit.x[:-1], float(fit.x[-1])

    def __call__(self, x_B_F: np.ndarray) -> np.ndarray:
        """Logits, better is high. Shape [B]."""
        return ((x_B_F - self.mean_F) / self.scale_F) @ self.weight_F + self.bias

    def arrays(self) -> dict[str, np.ndarray]:
        """The head as named arrays; `of` reads them back."""
        return {"mean": self.mean_F, "scale": self.scale_F, "weight": self.weight_F, "bias": np.array([self.bias])}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "LogisticHead":
        head = cls.__new__(cls)
        head.mean_F, head.scale_F, head.weight_F = (arrays[name] for name in ("mean", "scale", "weight"))
        head.bias = float(arrays["bias"][0])
        return head

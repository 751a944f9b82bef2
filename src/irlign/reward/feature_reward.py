"""The cheap reward: a logistic or MLP head, or several, on frozen features; trained in seconds and usable for black-box policies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.errors import ModelError
from irlign.records import Contrast, PromptContent
from irlign.reward.ensemble import combine
from irlign.reward.features import WORDS, Features, LogisticHead
from irlign.reward.objectives import LOSSES
from irlign.reward.train import RewardSettings, accuracy_and_margin, fold_of_pairs

HEAD, STORE = "heads.safetensors", "features.safetensors"
LEARNING_RATE, BATCH, EPOCHS, PATIENCE = 1e-3, 64, 200, 10  # of the MLP: AdamW; it stops after so many epochs without a better dev loss


class MlpHead:
    """`logit = w2 . relu(W1 z + b1) + b2` with `z = (x - mean) / scale`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.values = dict(arrays)

    def __call__(self, x_B_F: np.ndarray) -> np.ndarray:
        """Logits, better is high. Shape [B]."""
        v = self.values
        hidden_B_H = np.maximum(((x_B_F - v["mean"]) / v["scale"]) @ v["hidden.weight"].T + v["hidden.bias"], 0)
        return hidden_B_H @ v["out.weight"][0] + v["out.bias"][0]

    def arrays(self) -> dict[str, np.ndarray]:
        return self.values

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "MlpHead":
        return cls(arrays)


Head = LogisticHead | MlpHead
Sides = tuple[np.ndarray, np.ndarray, np.ndarray]  # better_P_F, worse_P_F, weight_P


def fit_logistic(train: Sides, dev: Sides | None, settings: RewardSettings, seed: int) -> Head:
    """The ridge-regularised head at the minimum of its loss; nothing is left to chance and dev is not needed.

    Bradley-Terry of a linear reward is logistic regression on the differences, each pair both ways round, so that the bias is 0.
    """
    better_P_F, worse_P_F, weight_P = train
    sides = [better_P_F, worse_P_F] if settings.loss == "logistic" else [better_P_F - worse_P_F, worse_P_F - better_P_F]
    labels_B = np.repeat([1, 0], len(weight_P))
    return LogisticHead(np.concatenate(sides), labels_B, np.tile(weight_P, 2), settings.ridge)


def fit_mlp(train: Sides, dev: Sides | None, settings: RewardSettings, seed: int) -> Head:
    """One hidden layer, AdamW, the weights of the epoch with the lowest dev loss. Without dev pairs the last tenth of the train
    pairs stands in.
    """
    import torch

    if dev is None:
        cut = max(1, len(train[2]) // 10)
        train, dev = (tuple(x[:-cut] for x in train), tuple(x[-cut:] for x in train)) if len(train[2]) > 1 else (train, train)  # type: ignore[assignment]
    mean_F, scale_F = (f(np.concatenate(train[:2]), 0) for f in (np.mean, np.std))
    scale_F = scale_F + 1e-6

    def tensors(sides: Sides) -> list[torch.Tensor]:
        scaled = [(x - mean_F) / scale_F for x in sides[:2]]
        return [torch.tensor(x, dtype=torch.float32) for x in (*scaled, sides[2])]

    order, loss = torch.Generator().manual_seed(seed), LOSSES[settings.loss]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden, out = torch.nn.Linear(len(mean_F), settings.hidden_size), torch.nn.Linear(settings.hidden_size, 1)
    net = torch.nn.Sequential(hidden, torch.nn.ReLU(), out)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    rows, held, best, kept, waited = tensors(train), tensors(dev), np.inf, net.state_dict(), 0  # type: ignore[arg-type]
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows[2]), generator=order).split(BATCH):
            better_B, worse_B = (net(x[batch])[:, 0] for x in rows[:2])
            optimizer.zero_grad()
            loss(better_B, worse_B, rows[2][batch]).backward()
            optimizer.step()
        with torch.no_grad():
            now = float(loss(net(held[0])[:, 0], net(held[1])[:, 0], held[2]))
        best, kept, waited = (now, {k: v.clone() for k, v in net.state_dict().items()}, 0) if now < best else (best, kept, waited + 1)
        if waited == PATIENCE:
            break
    names = {"0.weight": "hidden.weight", "0.bias": "hidden.bias", "2.weight": "out.weight", "2.bias": "out.bias"}
    return MlpHead({"mean": mean_F, "scale": scale_F, **{names[key]: value.double().numpy() for key, value in kept.items()}})


HEADS: dict[str, tuple[Any, Any]] = {
    "logistic": (LogisticHead, fit_logistic),
    "mlp": (MlpHead, fit_mlp),
}  # reward.head: its class, and how it is fitted


class FeatureReward:
    """`RewardModel` over frozen features: one head, or several combined by `aggregate`."""

    def __init__(self, features: Features, heads: Sequence[Head], aggregate: str, penalty: float, name: str):
        self.features, self.heads, self.aggregate, self.penalty, self.name = features, list(heads), aggregate, penalty, name

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any]) -> "FeatureReward":
        """The reward published in `rewards/NAME`; `reward["encoder"]` is a Hub id or a path, relative to the folder. Raises ModelError."""
        from safetensors.numpy import load_file

        local = (folder / reward["encoder"]).resolve()
        features = Features(local if local.is_dir() else reward["encoder"], reward["chat_template"], reward["name"])
        try:
            arrays = load_file(folder / HEAD)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"the heads cannot be loaded: {line}", where=folder, do="run the stage reward again") from error
        kind, count = HEADS[reward["head"]][0], reward["heads"]
        own = [{name.partition(".")[2]: x for name, x in arrays.items() if name.startswith(f"{k}.")} for k in range(count)]
        return cls(features, [kind.of(of) for of in own], reward["aggregate"], reward["variance_penalty"], reward["name"])

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"{k}.{name}": x for k, head in enumerate(self.heads) for name, x in head.arrays().items()}, folder / HEAD)

    def member_scores(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Every head's logit. Shape [K, len(prompts)]."""
        if not len(prompts):
            return np.zeros((len(self.heads), 0))
        x_B_F = self.features(prompts, completions).astype(np.float64)
        return np.stack([head(x_B_F) for head in self.heads])

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Shape [len(prompts)]."""
        return combine(self.member_scores(prompts, completions), self.aggregate, self.penalty)


def train_features(
    backbone: Path | str,
    pairs: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: RewardSettings,
    *,
    chat_template: str,
    folder: Path,
    seed: int,
    features: Features | None = None,
    encoder: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fit `settings.members` heads on the frozen features of `backbone` and save them in `folder`, the features beside them.

    Every head sees the fold of the pairs that an ensemble's member would. `features` may hold what is known already (several
    rewards on the same answers share it); `encoder` is what reward.json says of the checkpoint's place. Returns what reward.json
    says: `kind`, `head`, `heads`, `encoder`, dev accuracy.
    """
    features = features or Features(backbone, chat_template)
    known = {side: _sides(features, of) for side, of in (("train", pairs), ("dev", dev)) if of}
    stop_on = None if any("demo" in contrast for contrast in settings.weights) else known.get("dev")  # dev demonstrations are the judge's
    fit, heads = HEADS[settings.head][1], []
    for k in range(settings.members):
        own = np.array(fold_of_pairs(range(len(pairs)), k, settings.members))
        better, worse, weight = (x[own] for x in known["train"])
        heads.append(fit((better, worse, weight), stop_on, settings, seed + 1009 * k))
    reward = FeatureReward(features, heads, settings.aggregate, settings.variance_penalty, settings.name)
    reward.save(folder)
    if str(backbone) != WORDS:  # those are computed faster than they are read
        features.save(folder / STORE, *_answers([*pairs, *dev]))
    local = str(backbone) != WORDS and Path(backbone).is_dir()
    place = encoder or (str(Path(backbone).resolve()) if local else str(backbone))
    return {
        "kind": "features",
        "head": settings.head,
        "heads": settings.members,
        "aggregate": settings.aggregate,
        "variance_penalty": settings.variance_penalty,
        "encoder": place,
        "pairs": {"train": len(pairs), "dev": len(dev)},
        "dev": accuracy_and_margin(reward, dev),
    }


def _answers(pairs: Sequence[Contrast]) -> tuple[list[PromptContent], list[str]]:
    """The prompts and answers of both sides, better ones first."""
    return [p.prompt.content for p in pairs] * 2, [*(p.better for p in pairs), *(p.worse for p in pairs)]


def _sides(features: Features, pairs: Sequence[Contrast]) -> Sides:
    x_B_F = features(*_answers(pairs)).astype(np.float64)
    return x_B_F[: len(pairs)], x_B_F[len(pairs) :], np.array([p.weight for p in pairs])

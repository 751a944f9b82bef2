"""Contrasts become a reward model, through transformers' Trainer, with either loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from irlign.data.chat import context_length, pad
from irlign.records import Contrast
from irlign.reward.contrasts import ContrastName
from irlign.reward.forks import Pair, can_fork, collate, fork_trainer
from irlign.reward.model import Classifier, RewardModel
from irlign.reward.objectives import LOSSES
from irlign.training import TrainerSettings, bf16_pays, fit, merged, training_arguments, with_adapter

Row = TypeVar("Row")


class RewardSettings(TrainerSettings):
    """Which answers are better than which, and how the reward learns it."""

    contrast: ContrastName = Field("init-sft", description="better over worse")
    mixture: dict[ContrastName, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="several contrasts in one reward, each row's loss times its weight; in the place of contrast"
    )
    ensemble: list[ContrastName] = Field(
        default_factory=list, description="one member for each contrast, standardised and combined by aggregate; in the place of contrast"
    )
    loss: Literal["logistic", "bradley-terry"] = Field("logistic", description="logistic (unpaired) or bradley-terry (paired)")
    kind: Literal["classifier", "heads", "features"] = Field(
        "classifier",
        description="classifier: trained whole; heads: the members are heads over one backbone; features: the backbone is frozen",
    )
    backbone: str = Field(
        "sft",
        description="what the reward model starts from or reads: sft, init, a checkpoint's folder or Hub id, or (kind=features) words: hashed words and word pairs of the answer, no model at all",
    )
    head: Literal["logistic", "mlp"] = Field("logistic", description="kind=features: what is trained on the features")
    ridge: float = Field(1e-4, gt=0, description="head=logistic: penalty on the squared weights")
    hidden_size: int = Field(64, ge=1, description="head=mlp: width of its hidden layer")
    ending: Literal["match", "keep"] = Field("match", description="match: one ending rule and one length a pair; keep: as drawn")
    max_leak_accuracy: float = Field(0.75, ge=0.5, le=1, description="guard: error when length or ending alone tells more pairs apart")
    members: int = Field(1, ge=1, le=64, description="rewards trained on different samples with different seeds; 1 is no ensemble")
    aggregate: Literal["mean", "min", "mean-variance", "weight-average"] = Field("mean", description="how members become one reward")
    variance_penalty: float = Field(0.5, ge=0, description="lambda of mean-variance: mean - lambda * variance over the members")
    log_ratio: bool = Field(
        True, description="also publish the rewards without training, log pi_SFT - log pi_0 whole and a token, as baselines"
    )

    @field_validator("mixture", mode="before")
    @classmethod
    def _dashes(cls, value: Any) -> Any:
        """`reward.mixture.init-sft=1` on the command line arrives with underscores, as every key does."""
        return {str(key).replace("_", "-"): weight for key, weight in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_way(self) -> "RewardSettings":
        if self.mixture and self.ensemble:
            raise ValueError("give mixture (one reward of several contrasts) or ensemble (one reward for each), not both")
        if self.mixture and not any(self.mixture.values()):
            raise ValueError("every weight of the mixture is 0")
        if len(set(self.ensemble)) < len(self.ensemble) or len(self.ensemble) == 1 or (self.ensemble and self.members > 1):
            raise ValueError("ensemble names two or more different contrasts, one member each: leave members at 1")
        if self.backbone == "words" and self.kind != "features":
            raise ValueError("backbone=words is no model that could be trained: use kind=features")
        if self.kind == "heads" and self.members == 1:
            raise ValueError("kind=heads needs members of 2 or more")
        if self.aggregate == "weight-average" and (self.kind != "classifier" or self.ensemble):
            raise ValueError(
                "weight-average is for members of one contrast with kind=classifier; for heads over one backbone it is the mean"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The contrasts that pairs are needed of, with their weights; a weight of 0 is none."""
        given = self.mixture or dict.fromkeys(self.ensemble or [self.contrast], 1.0)
        return {contrast: weight for contrast, weight in given.items() if weight > 0}

    @property
    def name(self) -> str:
        """What the reward is called, and its folder: its contrast, or `mixture` or `ensemble` where it has several."""
        return next(iter(self.weights)) if len(self.weights) == 1 else "ensemble" if self.ensemble else "mixture"

    @property
    def about_contrast(self) -> str:
        """The contrast in words: `init-sft`, `1 init-sft + 0.5 init-demo`, or `init-sft, init-demo` for an ensemble."""
        if self.mixture and len(self.weights) > 1:
            return " + ".join(f"{weight:g} {contrast}" for contrast, weight in self.weights.items())
        return ", ".join(self.weights)


def train_reward(
    backbone: Path,
    train: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: RewardSettings,
    *,
    folder: Path,
    **options: Any,
) -> dict[str, Any]:
    """Train a classifier on the pairs (`fit_classifier` takes the options) and save it in `folder`. Returns steps, losses, and on
    the dev pairs TRL's `accuracy` and `margin`.
    """
    reward, log = fit_classifier(backbone, train, settings, **options)
    reward.save(folder)
    return {**log, "pairs": {"train": len(train), "dev": len(dev)}, "dev": accuracy_and_margin(reward, dev)}


def fit_classifier(
    backbone: Path,
    train: Sequence[Contrast],
    settings: RewardSettings,
    *,
    chat_template: str,
    checkpoints: Path,
    seed: int,
    report_to: str,
    head_seed: int | None = None,
    heads: int = 1,
    section: str = "reward",
) -> tuple[Classifier, dict[str, Any]]:
    """A classifier trained on the pairs, and its steps and losses. A row of the Trainer is a pair; both losses see the same batches.
    `head_seed` (by default `seed`) is what the fresh head is drawn from; of several `heads` each sees its own fold of the pairs. `section` of the recipe is
    where the settings come from, as progress and errors say it.
    """
    from transformers import Trainer, set_seed

    set_seed(seed if head_seed is None else head_seed)
    reward = Classifier.start(backbone, chat_template, settings.name, heads)
    pairs = _encode(reward, train)
    parameters = sum(p.numel() for p in reward.model.parameters())
    arguments = training_arguments(settings, checkpoints, seed=seed, bf16=bf16_pays(parameters), report_to=report_to)
    weight_P_K = fold_weights(len(train), heads) * np.array([[pair.weight] for pair in train])
    longest = max(pairs, key=lambda pair: max(map(len, pair)))
    forked = arguments.world_size == 1 and can_fork(reward.model, longest, reward.pad_id)
    trainer = (fork_trainer if forked else Trainer)(
        model=with_adapter(reward.model, settings, "SEQ_CLS"),
        args=arguments,
        train_dataset=[
            {"input_ids": pair[0].ids, "pair": pair, "weights": of} for pair, of in zip(pairs, weight_P_K.tolist(), strict=True)
        ],
        data_collator=lambda batch: _collate(batch, reward.pad_id, forked),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: _loss(settings.loss, outputs, labels, num_items_in_batch),
    )
    log = fit(trainer, section, checkpoints)
    reward.model = merged(trainer.model, settings).eval()
    return reward, log


def _loss(name: str, outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """Logits and labels (the weights) of shape [2B, K], better answers first; scaled so that accumulated batches average."""
    (better_B_K, worse_B_K), weight_B_K = outputs.logits.float().chunk(2), labels.chunk(2)[0]
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return LOSSES[name](better_B_K, worse_B_K, weight_B_K) * labels.numel() / count


def fold_weights(pairs: int, heads: int) -> np.ndarray:
    """How much each pair counts for each head: all alike but for the fold that the head does not see, 1 on average. Shape [P, K]."""
    seen_P_K = np.ones((pairs, heads)) if heads == 1 else np.arange(pairs)[:, None] % heads != np.arange(heads)
    return seen_P_K * (1.0 if heads == 1 else heads / (heads - 1))


def fold_of_pairs(pairs: Sequence[Row], member: int, members: int) -> list[Row]:
    """The pairs of one member: all but every `members`-th, so that no two see the same samples; all of them for one member."""
    return [pair for i, pair in enumerate(pairs) if members == 1 or i % members != member]


def accuracy_and_margin(reward: RewardModel, pairs: Sequence[Contrast]) -> dict[str, float] | None:
    """Share of pairs whose better answer scores higher (a tie counts half), and the mean difference, by the pairs' weights; None
    without pairs."""
    if not pairs:
        return None
    contents = [p.prompt.content for p in pairs]
    scores = reward.score([*contents, *contents], [*(p.better for p in pairs), *(p.worse for p in pairs)])
    margin = scores[: len(pairs)] - scores[len(pairs) :]
    weight = [p.weight for p in pairs]
    right = (margin > 0) + 0.5 * (margin == 0)
    return {"accuracy": float(np.average(right, weights=weight)), "margin": float(np.average(margin, weights=weight))}


def _encode(reward: Classifier, pairs: Sequence[Contrast]) -> list[Pair]:
    contents, limit = [p.prompt.content for p in pairs], context_length(reward.model.config)
    sides = [reward.format.encode(contents, texts) for texts in ([p.better for p in pairs], [p.worse for p in pairs])]
    return [(better.within(limit), worse.within(limit)) for better, worse in zip(*sides, strict=True)]


def _collate(rows: list[dict[str, Any]], pad_id: int, forked: bool) -> dict[str, Any]:
    """Better answers, then worse ones: `input_ids` and `attention_mask` of shape [2B, T], or both of a pair in one row (reward/forks.py);
    `labels` [2B, K], a pair's weights twice."""
    import torch

    pairs = [row["pair"] for row in rows]
    weight_B_K = torch.tensor([row["weights"] for row in rows])
    labels = torch.cat([weight_B_K, weight_B_K])
    if forked:
        return {**collate(pairs, pad_id), "labels": labels}
    ids, mask = pad([row.ids for side in zip(*pairs, strict=True) for row in side], pad_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

"""The cheap ensemble: K heads over one backbone, trained together, each on its own fold of the pairs; one pass scores all of them.

The mean of K linear heads is one linear head, so the folder is a plain classifier whose logit is the mean; the heads themselves
lie beside it, for the minimum and for mean less variance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from irlign.errors import ModelError
from irlign.launch import ProcessSettings, launch
from irlign.records import Contrast, PromptContent
from irlign.reward.ensemble import combine
from irlign.reward.model import Classifier
from irlign.reward.train import RewardSettings, accuracy_and_margin, fit_classifier

if TYPE_CHECKING:
    import torch

HEADS = "heads.safetensors"  # `weight` [K, H] and, where the architecture has one, `bias` [K]


class SharedHeads:
    """`RewardModel` over a classifier with K logits, combined by `aggregate`."""

    def __init__(self, classifier: Classifier, aggregate: str, penalty: float):
        self.classifier, self.aggregate, self.penalty, self.name = classifier, aggregate, penalty, classifier.name

    @classmethod
    def load(cls, folder: Path, reward: dict[str, Any]) -> "SharedHeads":
        """The reward published in `rewards/NAME`: the classifier there, its one head replaced by the K. Raises ModelError."""
        from safetensors.torch import load_file

        classifier = Classifier.load(folder, reward)
        try:
            heads = load_file(folder / HEADS)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"the heads cannot be loaded: {line}", where=folder, do="run the stage reward again") from error
        _replace_head(classifier, heads)
        return cls(classifier, reward["aggregate"], reward["variance_penalty"])

    def save(self, folder: Path) -> None:
        """The classifier with the mean head, loadable by `AutoModelForSequenceClassification`, and the heads beside it."""
        from safetensors.torch import save_file

        heads = {name: value.detach().clone().contiguous() for name, value in _head(self.classifier)[1].named_parameters()}
        _replace_head(self.classifier, {name: value.mean(0, keepdim=True) for name, value in heads.items()})
        self.classifier.save(folder)
        save_file({name: value.cpu() for name, value in heads.items()}, folder / HEADS)
        _replace_head(self.classifier, heads)

    def member_scores(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Every head's logit. Shape [K, len(prompts)]."""
        return self.classifier.logits_of(prompts, completions).T

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
        """Shape [len(prompts)]."""
        return combine(self.member_scores(prompts, completions), self.aggregate, self.penalty)


def _head(classifier: Classifier) -> tuple[str, "torch.nn.Linear"]:
    """The last linear layer with one row for each logit, and its name. Raises ModelError where the architecture ends in something else."""
    import torch

    found = [
        (name, module)
        for name, module in classifier.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == classifier.model.config.num_labels
    ]
    if not found:
        raise ModelError("the classifier does not end in a linear layer", where=classifier.name, do="use reward.kind=classifier")
    return found[-1]


def _replace_head(classifier: Classifier, head: dict[str, "torch.Tensor"]) -> None:
    """Put a head of other rows in the place of the classifier's; the configuration follows."""
    import torch

    name, old = _head(classifier)
    rows, width = head["weight"].shape
    new = torch.nn.Linear(width, rows, bias="bias" in head, device=old.weight.device, dtype=old.weight.dtype)
    new.load_state_dict(head)
    model = classifier.model
    model.set_submodule(name, new)
    model.config.num_labels = model.num_labels = rows  # type: ignore[assignment]
    if rows == 1:
        model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}


def train_heads(
    backbone: Path,
    pairs: Sequence[Contrast],
    dev: Sequence[Contrast],
    settings: RewardSettings,
    *,
    processes: ProcessSettings = ProcessSettings(),
    **options: Any,
) -> dict[str, Any]:
    """Train `settings.members` heads and their one backbone (`fit_classifier` takes the options) and save them in the folder that the
    options name. Returns what reward.json says: `kind` (a plain classifier where the aggregate is the mean), `heads`, the training log, dev accuracy.
    """
    return launch(processes, _train, backbone, pairs, dev, settings, **options)


def _train(
    backbone: Path, pairs: Sequence[Contrast], dev: Sequence[Contrast], settings: RewardSettings, *, folder: Path, **options: Any
) -> dict[str, Any]:
    classifier, log = fit_classifier(backbone, pairs, settings, heads=settings.members, **options)
    reward = SharedHeads(classifier, settings.aggregate, settings.variance_penalty)
    reward.save(folder)
    return {
        "kind": "classifier" if settings.aggregate == "mean" else "heads",
        "heads": settings.members,
        "aggregate": settings.aggregate,
        "variance_penalty": settings.variance_penalty,
        "pairs": {"train": len(pairs), "dev": len(dev)},
        "dev": accuracy_and_margin(reward, dev),
        "training": log,
    }

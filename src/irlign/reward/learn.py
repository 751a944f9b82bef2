"""One entry to every learned reward: pairs of one contrast or several become what the settings describe, ready for `load_reward`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.pairs import PAIR
from irlign.files import read_json, write_json
from irlign.launch import ProcessSettings
from irlign.records import Contrast
from irlign.reward.contrasts import weighted
from irlign.reward.ensemble import Ensemble, train_ensemble
from irlign.reward.feature_reward import train_features
from irlign.reward.features import Features, is_encoder
from irlign.reward.heads import train_heads
from irlign.reward.load import member_loader
from irlign.reward.train import RewardSettings, accuracy_and_margin

TRAINERS: dict[str, Callable[..., dict[str, Any]]] = {"classifier": train_ensemble, "heads": train_heads, "features": train_features}
Pairs = Mapping[str, Sequence[Contrast]]  # by contrast


def train_reward_of(
    settings: RewardSettings,
    backbone: Path | str,
    pairs: Pairs,
    dev: Pairs,
    *,
    folder: Path,
    checkpoints: Path,
    chat_template: str = "auto",
    seed: int = 0,
    report_to: str = "none",
    features: Features | None = None,
    encoder: str | None = None,
    processes: ProcessSettings = ProcessSettings(),
    section: str = "reward",
) -> dict[str, Any]:
    """Train the reward of `settings` on the pairs of its contrasts (`settings.weights` names them) and save it in `folder`.

    `backbone` is a policy's folder or an encoder's, which reads prompt and answer as a text pair (data/pairs.py); `features` of it that are known already are not computed
    again, and `encoder` is its place as reward.json states it (relative to `folder`; by default the whole path). `processes` train each network; `section` of the recipe has the
    settings, as errors say it. Returns what reward.json says; `load_reward(folder)` reads it.
    """
    if settings.kind != "features" and is_encoder(backbone):
        chat_template = PAIR
    options: dict[str, Any] = {"folder": folder, "checkpoints": checkpoints, "chat_template": chat_template, "seed": seed}
    own = {"features": features, "encoder": encoder} if settings.kind == "features" else {"processes": processes, "section": section}
    options |= {"report_to": report_to, **own}
    if settings.ensemble:
        log = train_contrasts(settings, backbone, pairs, dev, **options)
    else:
        sides = (weighted(of, settings.weights) for of in (pairs, dev))
        log = TRAINERS[settings.kind](backbone, *sides, settings, **options)
    about = {
        "name": settings.name,
        "contrast": settings.about_contrast,
        "loss": settings.loss,
        "chat_template": chat_template,
        "seed": seed,
    }
    write_json(folder / "reward.json", {**about, **log})
    return {**about, **log}


def trained_tokens(training: Any) -> int:
    """Tokens that a reward was trained on, from `training` in its reward.json, its members' together; 0 where features were."""
    return sum(map(trained_tokens, training)) if isinstance(training, list) else (training or {}).get("tokens", 0)


def train_contrasts(
    settings: RewardSettings, backbone: Path | str, pairs: Pairs, dev: Pairs, *, folder: Path, checkpoints: Path, seed: int, **options: Any
) -> dict[str, Any]:
    """An ensemble with one member for each contrast, in folders of their own; what is there already is kept.

    Each member has a scale of its own, so it is standardised before they are combined: less the mean and over the standard
    deviation of its scores on one common set, the answers on both sides of all members' dev pairs (train pairs where there are none).
    """
    logs = []
    if settings.kind == "features":
        options["features"] = options["features"] or Features(backbone, options["chat_template"])
    for k, contrast in enumerate(settings.ensemble):
        own = settings.model_copy(update={"ensemble": [], "contrast": contrast})
        places = {"folder": folder / contrast, "checkpoints": checkpoints / contrast}
        if options.get("encoder") and not Path(options["encoder"]).is_absolute():
            places["encoder"] = f"../{options['encoder']}"  # type: ignore[assignment]
        if not (folder / contrast / "reward.json").exists():
            train_reward_of(own, backbone, pairs, dev, seed=seed + 1009 * k, **{**options, **places})
        logs.append(read_json(folder / contrast / "reward.json"))
    common = [pair for contrast in settings.ensemble for pair in dev.get(contrast) or ()]
    common = common or [pair for contrast in settings.ensemble for pair in pairs[contrast]]
    ensemble = Ensemble(
        [folder / contrast for contrast in settings.ensemble],
        member_loader(options.get("features")),
        settings.aggregate,
        settings.variance_penalty,
        settings.name,
    )
    contents = [p.prompt.content for p in common]
    scores_K_B = ensemble.member_scores([*contents, *contents], [*(p.better for p in common), *(p.worse for p in common)])
    ensemble.scales = np.stack([scores_K_B.mean(1), scores_K_B.std(1)], axis=1)
    held_out = [pair for contrast in settings.ensemble for pair in dev.get(contrast) or ()]
    return {
        "kind": "ensemble",
        "members": settings.ensemble,
        "aggregate": settings.aggregate,
        "variance_penalty": settings.variance_penalty,
        "scales": ensemble.scales.tolist(),
        "pairs": {side: sum(log["pairs"][side] for log in logs) for side in ("train", "dev")},
        "dev": accuracy_and_margin(ensemble, held_out),
        "dev_of_members": {contrast: log["dev"] for contrast, log in zip(settings.ensemble, logs, strict=True)},
        "training": [log.get("training") for log in logs],
    }

"""Policies from better and worse answers, no reward at inference: DPO, SPIN and KTO through TRL's trainers.

`dpo`: the best over the worst of a prompt's own answers under the reward. `spin`: the demonstration over the policy's own answer. `kto`:
demonstrations desirable, own answers undesirable, unpaired. TRL gets rows that data/chat.py tokenized: what it makes of text itself differs
from the format of SFT and sampling (a second BOS, EOS after a cut answer, special tokens in the user's text).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from irlign.config import Settings
from irlign.data.chat import IGNORED, Encoded, Format
from irlign.errors import ConfigError
from irlign.optimise.distill import winners
from irlign.policy.tuning import Tuning, collate
from irlign.records import Contrast, Demonstration, Prompt, Sample
from irlign.reward.controls import by_prompt
from irlign.training import Config, TrainerSettings

METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
UNKNOWN = "Unknown loss type"  # as TRL says it
Labelled = tuple[Prompt, str, bool]  # a prompt, an answer, whether it is desirable


class PreferenceSettings(Settings):
    """dpo, spin, ditto, kto, gsil. The loss of the first four is TRL's `loss_type`, through `optimise.trainer`."""

    beta: float = Field(
        0.1, gt=0, description="how hard the policy is held to the one it starts from; log-ratios times beta are the rewards"
    )
    shift: float = Field(
        0.0, description="gsil: added to a reward before it says demonstration or own; above 0 pushes own answers down more"
    )


def best_and_worst(samples: Sequence[Sample], scores: Sequence[float] | np.ndarray) -> list[Contrast]:
    """For each prompt the answer with the highest score over the one with the lowest, both finished and saying something; of equal ones
    the first drawn. A prompt whose answers are one text, or all score the same, has no pair."""
    values = np.asarray(scores, dtype=float)
    sides = zip(winners(samples, values), winners(samples, -values), strict=True)
    return [Contrast(best.prompt, best.completion, worst.completion) for best, worst in sides if best.completion != worst.completion]


def unlike(samples: Sequence[Sample], demonstrations: Sequence[Demonstration]) -> list[Sample]:
    """The answers that demonstrations of the same prompt can stand against: finished, saying something, and none of them itself."""
    shown = by_prompt(demonstrations)
    worth = (s for s in samples if s.finished and s.completion.strip() and s.prompt.prompt_id in shown)
    return [s for s in worth if s.completion.strip() not in {text.strip() for text in shown[s.prompt.prompt_id]}]


def demonstration_over_own(samples: Sequence[Sample], demonstrations: Sequence[Demonstration]) -> list[Contrast]:
    """Each own answer under a demonstration of its prompt, the demonstrations of a prompt in turn (SPIN, arXiv 2401.01335, section 4)."""
    turns = {prompt_id: cycle(texts) for prompt_id, texts in by_prompt(demonstrations).items()}
    return [Contrast(s.prompt, next(turns[s.prompt.prompt_id]), s.completion) for s in unlike(samples, demonstrations)]


def desirable_and_not(samples: Sequence[Sample], demonstrations: Sequence[Demonstration]) -> list[Labelled]:
    """Every demonstration, desirable, and every own answer, undesirable (KTO, arXiv 2402.01306); nothing where there is no own answer."""
    own = [(s.prompt, s.completion, False) for s in unlike(samples, demonstrations)]
    return [*((d.prompt, d.completion, True) for d in demonstrations), *own] if own else []


def pair_rows(form: Format, pairs: Sequence[Contrast]) -> list[dict[str, Any]]:
    """The rows of a Dataset for DPOTrainer, tokens of the one format in columns of ours; its own text columns stay empty, since it
    tokenizes them however the rows are batched (`pair_batch`)."""
    better, worse = (
        form.encode([p.prompt.content for p in pairs], texts) for texts in ([p.better for p in pairs], [p.worse for p in pairs])
    )
    text = {"prompt": "", "chosen": "", "rejected": ""}
    return [
        {**text, "asked": b.prompt_ids, "better": b.completion_ids, "worse": w.completion_ids} for b, w in zip(better, worse, strict=True)
    ]


def labelled_rows(form: Format, answers: Sequence[Labelled]) -> list[dict[str, Any]]:
    """The same for KTOTrainer (`labelled_batch`)."""
    encoded = form.encode([prompt.content for prompt, _, _ in answers], [text for _, text, _ in answers])
    text = {"prompt": "", "completion": ""}
    labels = [desirable for _, _, desirable in answers]
    return [{**text, "label": y, "asked": e.prompt_ids, "answered": e.completion_ids} for e, y in zip(encoded, labels, strict=True)]


def pair_batch(batch: Sequence[dict[str, Any]], pad_id: int, limit: int) -> dict[str, Any]:
    """What DPOTrainer computes on: `input_ids`, `attention_mask`, `completion_mask`, all [2 B, T], the better answers first; and the
    reference's log-probabilities where it computed them beforehand."""
    encoded = [Encoded(row["asked"], row[side]).within(limit) for side in ("better", "worse") for row in batch]
    return {**_tensors(encoded, pad_id), **_given(batch, "ref_chosen_logps", "ref_rejected_logps")}


def labelled_batch(batch: Sequence[dict[str, Any]], pad_id: int, limit: int) -> dict[str, Any]:
    """What KTOTrainer computes on: the same tensors [B, T] with `label` [B], and once more as `KL_...` with each prompt before the answer
    of the row before it, from which the KL is estimated (arXiv 2402.01306, section 4.1)."""
    answers = [row["answered"] for row in batch]
    matched, shifted = (
        _tensors([Encoded(row["asked"], ids).within(limit) for row, ids in zip(batch, of, strict=True)], pad_id)
        for of in (answers, [answers[-1], *answers[:-1]])
    )
    return {**matched, **{f"KL_{key}": of for key, of in shifted.items()}, **_given(batch, "label", "ref_logps", "ref_KL_logps")}


def _tensors(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    found = collate([{"input_ids": e.ids, "labels": e.labels} for e in encoded], pad_id)
    labels_B_T = found.pop("labels")
    return {**found, "completion_mask": (labels_B_T != IGNORED).long()}


def _given(batch: Sequence[dict[str, Any]], *names: str) -> dict[str, Any]:
    import torch

    return {name: torch.tensor([row[name] for row in batch]) for name in names if name in batch[0]}


@contextmanager
def refused(beginning: str = "") -> Iterator[None]:
    """What a trainer of TRL's, or peft below it, says against its arguments, as a ConfigError; only what begins so: UNKNOWN is said at the first step."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(beginning):
            raise
        raise ConfigError(
            f"the trainer refuses it: {error}", where="optimise", do="correct the key (those of optimise.trainer are its own)"
        ) from error


def need_trl() -> None:
    """Raises ConfigError where TRL is not installed."""
    if find_spec("trl") is None:
        raise ConfigError("trl is not installed", where="optimise.method", do="pip install 'irlign[optimise]'")


def dpo_config(settings: PreferenceSettings) -> Config:
    """TRL's arguments for dpo and spin. Rows are cut by data/chat.py, and transformers' own default says whether activations are kept."""
    need_trl()
    from trl import DPOConfig

    return DPOConfig, {"beta": settings.beta, "max_length": None, "gradient_checkpointing": False, "train_sampling_strategy": "random"}


def kto_config(settings: PreferenceSettings) -> Config:
    """TRL's arguments for kto, which reads its rows in the order they have."""
    need_trl()
    from trl import KTOConfig

    return KTOConfig, {"beta": settings.beta, "max_length": None, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}


def train_dpo(
    start: Path, train: Sequence[Contrast], dev: Sequence[Demonstration], settings: TrainerSettings, *, config: Config, **about: Any
) -> dict[str, Any]:
    """Train the policy in `start`, which is also the reference, on pairs, and save it as a plain transformers checkpoint:
    `-log s(beta (log pi/pi_start(better) - log pi/pi_start(worse)))` a pair (arXiv 2305.18290, equation 7).

    `about` is what `Tuning` takes further. Returns steps, losses, what TRL logged, and the loss on the dev demonstrations (nats
    a completion token) before and after. Raises ModelError on divergence.
    """
    from trl import DPOTrainer

    return _train(DPOTrainer, start, lambda form: pair_rows(form, train), pair_batch, dev, settings, config=config, **about)


def train_kto(
    sft: Path,
    train: Sequence[Labelled],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    config: Config,
    seed: int,
    **about: Any,
) -> dict[str, Any]:
    """The same on single answers: `w (1 - s(beta (h - z)))` for a desirable one and `1 - s(beta (z - h))` for another, with `h` its log-ratio
    to the start, `z` the KL estimated over the batch (arXiv 2402.01306, equation 8), and `w` such that both kinds weigh the same in all.

    TRL reads the rows in the order they have, since `z` rests on neighbours: they are shuffled here, once for all passes.
    """
    from trl import KTOTrainer

    shuffled = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    desirable = sum(label for _, _, label in train)
    config = (config[0], {"desirable_weight": (len(train) - desirable) / desirable, **config[1]})
    return _train(
        KTOTrainer,
        sft,
        lambda form: labelled_rows(form, shuffled),
        labelled_batch,
        dev,
        settings,
        config=config,
        seed=seed,
        least=2,
        **about,
    )


def _train(
    kind: Any,
    start: Path,
    rows_of: Callable[[Format], list[dict[str, Any]]],
    batch_of: Callable[[Sequence[dict[str, Any]], int, int], dict[str, Any]],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    config: Config,
    least: int = 1,
    **about: Any,
) -> dict[str, Any]:
    """A trainer of TRL's, `kind`, on rows that `batch_of` makes into tensors, `least` in a batch."""
    tuning = Tuning(start, dev, settings, **about)
    rows, pad_id, limit = rows_of(tuning.form), tuning.policy.pad_id, tuning.policy.max_length
    shared = tuning.for_trl(tuning.arguments(config), rows)
    with refused():
        trainer = kind(**shared, data_collator=lambda batch: batch_of(batch, pad_id, limit))
    trainer.least_rows = least
    with refused(UNKNOWN):
        return {**tuning.finish(trainer, METRICS), "rows": len(rows)}

"""How likely an answer is under a policy: token log-probabilities and their sums, in length-sorted batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from irlign.data.chat import IGNORED, Encoded, Format, pad
from irlign.forward import Batch, each_batch
from irlign.policy.load import Policy, load_policy
from irlign.records import Sample

if TYPE_CHECKING:
    import torch

LOGITS = 2**30  # at most so many numbers in one batch of logits, whatever the vocabulary: 4 GiB


def sequence_log_probs(policy: Policy, rows: Sequence[Encoded], progress=None) -> np.ndarray:
    """log pi(y | x) of each row in nats, EOS included: `sum_t log pi(y_t | x, y_<t)` (method.md section 1). Shape [rows].

    A row longer than the model's context is cut to it.
    """
    result = np.zeros(len(rows))

    def total(batch: Batch, nll_B_T: "torch.Tensor") -> None:
        result[batch.places] = -nll_B_T.sum(1).double().cpu().numpy()
        if progress is not None:
            progress.advance(len(batch.rows))

    _read(policy, rows, total)
    return result


def token_log_probs(policy: Policy, rows: Sequence[Encoded]) -> list[np.ndarray]:
    """log pi(y_t | x, y_<t) of each token of each row's completion, in nats. `rows` arrays of shape [tokens], a row longer than the model's
    context being cut to it."""
    result: list[np.ndarray] = [np.zeros(0)] * len(rows)

    def each(batch: Batch, nll_B_T: "torch.Tensor") -> None:
        for place, row, own_T in zip(batch.places, batch.rows, nll_B_T.double().cpu().numpy(), strict=True):
            first = len(row.prompt_ids) - 1  # position t predicts token t + 1
            result[place] = -own_T[first : first + len(row.completion_ids)]

    _read(policy, rows, each)
    return result


def _read(policy: Policy, rows: Sequence[Encoded], take: Callable[[Batch, "torch.Tensor"], None]) -> None:
    """`take(batch, nll_B_T)` on every row once, in nats, 0 where no completion token is predicted."""
    import torch

    rows = [row.within(policy.max_length) for row in rows]
    vocabulary = int(policy.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    def read(batch: Batch) -> None:
        logits_B_T_V = policy.model(**batch.inputs).logits[:, :-1].float()
        targets_B_T = pad([row.labels for row in batch.rows], IGNORED)[0][:, 1:].to(policy.device)
        take(batch, torch.nn.functional.cross_entropy(logits_B_T_V.transpose(1, 2), targets_B_T, ignore_index=IGNORED, reduction="none"))

    with torch.inference_mode():
        each_batch(policy.model, rows, policy.pad_id, read, where=f"scoring with {policy.name}", most=LOGITS // vocabulary)


def mean_nll(policy: Policy, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood a completion token, in nats: the SFT loss over all rows together."""
    return float(-sequence_log_probs(policy, rows).sum() / sum(len(r.completion_ids) for r in rows))


def answer_log_probs(policy: Path, samples: Sequence[Sample], *, chat_template: str) -> np.ndarray:
    """log pi(y | x) of stored answers under the policy in a folder, in nats: EOS included where they finished, and only there. Shape
    [len(samples)]."""
    loaded = load_policy(str(policy))
    rows = Format(loaded.tokenizer, chat_template).encode([s.prompt.content for s in samples], [s.completion for s in samples])
    drawn = [row if s.finished else Encoded(row.prompt_ids, row.completion_ids[:-1]) for s, row in zip(samples, rows, strict=True)]
    return sequence_log_probs(loaded, drawn)

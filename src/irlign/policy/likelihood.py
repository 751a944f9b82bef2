"""How likely an answer is under a policy: summed token log-probabilities, in length-sorted batches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from irlign.data.chat import IGNORED, Encoded, Format, pad
from irlign.forward import Batch, each_batch
from irlign.policy.load import Policy, load_policy
from irlign.records import Sample

LOGITS = 2**30  # at most so many numbers in one batch of logits, whatever the vocabulary: 4 GiB


def sequence_log_probs(policy: Policy, rows: Sequence[Encoded], progress=None) -> np.ndarray:
    """log pi(y | x) of each row in nats, EOS included: `sum_t log pi(y_t | x, y_<t)` (method.md section 1). Shape [rows].

    A row longer than the model's context is cut to it.
    """
    import torch

    result = np.zeros(len(rows))
    rows = [row.within(policy.max_length) for row in rows]
    vocabulary = int(policy.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    def read(batch: Batch) -> None:
        logits_B_T_V = policy.model(**batch.inputs).logits[:, :-1].float()
        targets_B_T = pad([row.labels for row in batch.rows], IGNORED)[0][:, 1:].to(policy.device)
        nll = torch.nn.functional.cross_entropy(logits_B_T_V.transpose(1, 2), targets_B_T, ignore_index=IGNORED, reduction="none")
        result[batch.places] = -nll.sum(1).double().cpu().numpy()
        if progress is not None:
            progress.advance(len(batch.rows))

    with torch.inference_mode():
        each_batch(policy.model, rows, policy.pad_id, read, where=f"scoring with {policy.name}", most=LOGITS // vocabulary)
    return result


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

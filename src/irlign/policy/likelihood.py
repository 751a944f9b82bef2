"""How likely an answer is under a policy: token log-probabilities and their sums, in length-sorted batches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from irlign.data.chat import Encoded, Format
from irlign.forward import Batch, each_batch
from irlign.policy.load import Policy, load_policy
from irlign.records import Sample

LOGITS = 2**30  # at most so many numbers in one batch of logits, whatever the vocabulary: 4 GiB


def sequence_log_probs(policy: Policy, rows: Sequence[Encoded], progress=None) -> np.ndarray:
    """log pi(y | x) of each row in nats, EOS included: `sum_t log pi(y_t | x, y_<t)` (method.md section 1). Shape [rows].

    A row longer than the model's context is cut to it.
    """
    return np.array([own_T.sum() for own_T in token_log_probs(policy, rows, progress)])


def token_log_probs(policy: Policy, rows: Sequence[Encoded], progress=None) -> list[np.ndarray]:
    """log pi(y_t | x, y_<t) of each token of each row's completion, in nats. `rows` arrays of shape [tokens], a row longer than the model's
    context being cut to it."""
    import torch

    rows = [row.within(policy.max_length) for row in rows]
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    vocabulary = int(policy.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    def read(batch: Batch) -> None:
        logits_B_T_V, own = policy.model(**batch.inputs).logits, list[torch.Tensor]()
        for logits_T_V, row in zip(logits_B_T_V, batch.rows, strict=True):  # row by row, and of the prompt nothing: faster than all at once
            first = len(row.prompt_ids) - 1  # position t predicts token t + 1
            logits_K_V = logits_T_V[first : first + len(row.completion_ids)].float()
            chosen_K_1 = torch.tensor(row.completion_ids, dtype=torch.long, device=logits_K_V.device)[:, None]
            own.append(logits_K_V.gather(1, chosen_K_1)[:, 0] - logits_K_V.logsumexp(-1))
        ends = np.cumsum([len(row.completion_ids) for row in batch.rows])[:-1]
        for place, own_K in zip(batch.places, np.split(torch.cat(own).double().cpu().numpy(), ends), strict=True):
            found[place] = own_K
        if progress is not None:
            progress.advance(len(batch.rows))

    with torch.inference_mode():
        each_batch(policy.model, rows, policy.pad_id, read, where=f"scoring with {policy.name}", most=LOGITS // vocabulary)
    return found


def mean_nll(policy: Policy, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood a completion token, in nats: the SFT loss over all rows together."""
    return float(-sequence_log_probs(policy, rows).sum() / sum(len(r.completion_ids) for r in rows))


def answer_log_probs(policy: Path, samples: Sequence[Sample], *, chat_template: str) -> np.ndarray:
    """log pi(y | x) of stored answers under the policy in a folder, in nats: EOS included where they ended by it, and only there (of a stop string nothing is:
    no tokens of it are stored). Shape [len(samples)]."""
    loaded = load_policy(str(policy))
    rows = Format(loaded.tokenizer, chat_template).encode([s.prompt.content for s in samples], [s.completion for s in samples])
    drawn = [
        row if s.finish_reason == "eos" else Encoded(row.prompt_ids, row.completion_ids[:-1]) for s, row in zip(samples, rows, strict=True)
    ]
    return sequence_log_probs(loaded, drawn)

"""Frozen features of a policy, and a logistic head on them: what a few dozen answers are enough to train."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from irlign.data.chat import Format, length_sorted_batches, pad
from irlign.policy.load import load_policy
from irlign.progress import Progress
from irlign.records import PromptContent

CPU_TOKENS, GPU_TOKENS = 4096, 32768  # padded tokens a batch


def policy_features(
    policy: Path, prompts: Sequence[PromptContent], completions: Sequence[str], *, chat_template: str, name: str
) -> np.ndarray:
    """Each answer as the policy reads it after its prompt: the last hidden state, averaged over the answer's tokens (EOS
    included) and at EOS alone. Shape [len(prompts), 2H], float32; nothing is trained. An answer past the context is cut.
    """
    import torch

    loaded = load_policy(str(policy), name)
    rows = [row.within(loaded.max_length) for row in Format(loaded.tokenizer, chat_template).encode(prompts, completions)]
    body, width = loaded.model.base_model, int(loaded.model.config.get_text_config().hidden_size)
    found = np.zeros((len(rows), 2 * width), dtype=np.float32)
    budget = GPU_TOKENS if loaded.device.type == "cuda" else CPU_TOKENS
    with torch.inference_mode(), Progress(f"features {name}", len(rows), "answers") as bar:
        for batch in length_sorted_batches([len(row) for row in rows], budget):
            ids_B_T, mask_B_T = pad([rows[i].ids for i in batch], loaded.pad_id)
            hidden_B_T_H = body(input_ids=ids_B_T.to(loaded.device), attention_mask=mask_B_T.to(loaded.device)).last_hidden_state.float()
            for row, i in enumerate(batch):
                answer_T_H = hidden_B_T_H[row, len(rows[i].prompt_ids) : len(rows[i])]
                found[i] = torch.cat([answer_T_H.mean(0), answer_T_H[-1]]).cpu().numpy()
            bar.advance(len(batch))
    return found


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

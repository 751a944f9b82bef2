"""Occupancy weights: the loss by hand, against the exact module, and through the Trainer."""

import math

import pytest
import torch
from tiny import make_tiny_policy

from irlign.data.chat import IGNORED
from irlign.exact.tabular import SequenceMDP, step_log_probs, tokens_remaining_loss, trajectory_log_law
from irlign.optimise.weighted_sft import occupancy_loss, step_constant, train_weighted_sft
from irlign.policy.load import load_policy
from irlign.records import Demonstration, Prompt
from irlign.training import TrainerSettings


def test_the_sum_by_hand():
    """A prompt token, then three and one completion tokens; the policy gives each the probabilities written here."""
    given = [[0.5, 0.25, 0.8], [0.1, 0.9, 0.9]]  # of token 1, at each position; the second row ends after its first
    logits = torch.tensor([[[1 - p, p] for p in row] + [[0.5, 0.5]] for row in given]).log()
    labels = torch.tensor([[IGNORED, 1, 1, 1], [IGNORED, 1, IGNORED, IGNORED]])
    first = 3 * -math.log(0.5) + 2 * -math.log(0.25) + 1 * -math.log(0.8)
    assert occupancy_loss(logits, labels, 7.0).item() == pytest.approx((first + 1 * -math.log(0.1)) / 7.0)
    assert step_constant([3, 1], 16) == 16 * (6 + 1) / 2
    uniform = torch.zeros(2, 4, 2)
    assert occupancy_loss(uniform, labels, step_constant([3, 1], 2)).item() == pytest.approx(math.log(2))  # nats a token, as SFT's


def test_it_is_the_loss_of_the_exact_module():
    """Over every answer of an enumerable MDP, each weighed by its law, the batch form gives what the enumeration gives."""
    mdp = SequenceMDP((0.4, 0.6), 3, 3)
    beta, policy = (torch.randn(len(mdp.states()), 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2))
    states, actions, mask = mdp.tables()
    law = trajectory_log_law(mdp, beta).exp()
    labels = torch.where(mask > 0, actions, IGNORED)
    shifted = torch.cat([torch.full((len(law), 1), IGNORED), labels], dim=1)
    logits = torch.cat([policy[states], torch.zeros(len(law), 1, 3, dtype=torch.float64)], dim=1)
    total = sum(law[y] * occupancy_loss(logits[y : y + 1], shifted[y : y + 1], 1.0) for y in range(len(law)))
    assert float(total) == pytest.approx(float(tokens_remaining_loss(mdp, law, policy)), rel=1e-6)
    assert float(total) > -float((law[:, None] * step_log_probs(mdp, policy)).sum())  # more than SFT's: longer answers weigh more


@pytest.mark.parametrize(("size", "steps"), [(6, 1), (2, 3)])
def test_the_trainer_takes_the_step_of_the_formula(tmp_path, size, steps):
    """One step of plain gradient descent moves the weights by the gradient of the loss over all rows, however they are batched."""
    start = make_tiny_policy(tmp_path / "start")
    rows = [Demonstration(Prompt.of(f"the {a} cat", "train"), " sat" + " on the mat" * n + ".") for a in ("red", "blue") for n in range(3)]
    settings = TrainerSettings(
        learning_rate=1e-1,
        max_steps=1,
        warmup_steps=0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        trainer={"optim": "sgd", "max_grad_norm": 0},
    )
    places = {"folder": tmp_path / "aligned", "checkpoints": tmp_path / "checkpoints"}
    log = train_weighted_sft(start, rows, rows[:1], settings, chat_template="none", seed=0, report_to="none", **places)
    assert log["steps"] == 1 and log["dev_nll"]["aligned"] != log["dev_nll"]["initial"]
    from irlign.data.chat import Format
    from irlign.policy.tuning import collate

    policy = load_policy(str(start))
    encoded = Format(policy.tokenizer, "none").encode([d.prompt.content for d in rows], [d.completion for d in rows])
    batch = collate([{"input_ids": r.ids, "labels": r.labels} for r in encoded], policy.pad_id)
    labels = batch.pop("labels")
    constant = step_constant([len(r.completion_ids) for r in encoded], 6)
    occupancy_loss(policy.model(**batch).logits, labels, constant).backward()
    moved = load_policy(str(tmp_path / "aligned")).model.state_dict()
    for name, weight in policy.model.named_parameters():
        assert torch.allclose(moved[name], weight.detach() - 0.1 * weight.grad, atol=2e-6), name
    assert max(float(w.grad.abs().max()) for w in policy.model.parameters()) > 1e-2

"""GSIL: the sum by hand, the step of the formula through the Trainer, and the demonstrations learned."""

import math

import pytest
import torch
from tiny import make_tiny_policy

from irlign.data.chat import Format
from irlign.optimise.gsil import answer_nats, gsil_loss, train_gsil
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.policy.tuning import collate
from irlign.records import Demonstration, Prompt
from irlign.training import TrainerSettings

PROMPTS = [Prompt.of(f"the {colour} {animal}", "train") for colour in ("red", "blue") for animal in ("cat", "dog")]
ROWS = [(p, " sat on the mat.", True) for p in PROMPTS] + [(p, text, False) for p in PROMPTS for text in (" ran!", " sang and ran now.")]
DEV = [Demonstration(Prompt.of("a red cat", "dev"), " sat on the mat.")]


def _train(start, folder, **settings):
    places = {"folder": folder / "aligned", "checkpoints": folder / "checkpoints"}
    about = {"chat_template": "none", "seed": 0, "report_to": "none", "beta": 0.5, "shift": 0.2}
    return train_gsil(start, ROWS, DEV, TrainerSettings(**settings), **about, **places)


def test_the_sum_by_hand():
    """A demonstration of weight 2 whose log-ratio is 1, own answers at 0.4 and -2; f = 0.5 h + 0.1."""
    s = lambda f: 1 / (1 + math.exp(-f))  # noqa: E731
    by_hand = -2 * math.log(s(0.6)) - math.log(1 - s(0.3)) - math.log(1 - s(-0.9))
    found = gsil_loss(torch.tensor([1.0, 0.4, -2.0]), torch.tensor([2.0, -1.0, -1.0]), 0.5, 0.1, 4.0)
    assert found.item() == pytest.approx(by_hand / 4)


def test_at_the_optimum_the_log_ratio_is_that_of_the_demonstrator():
    """Over a law of three answers the loss is least where log pi/pi_before is log pi_shown/pi_before (beta 1): the policy is the demonstrator."""
    before, shown = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        ratio = theta.log_softmax(0) - before.log()
        descent.zero_grad()
        value = gsil_loss(torch.cat([ratio, ratio]), torch.cat([shown, -before]), 1.0, 0.0, 1.0)
        value.backward()
        return value

    descent.step(loss)
    assert torch.allclose(theta.softmax(0), shown, atol=1e-5)


@pytest.mark.parametrize(("size", "steps"), [(12, 1), (4, 3)])
def test_the_trainer_takes_the_step_of_the_formula(tmp_path, size, steps):
    """One step of plain gradient descent, however the rows are batched: both kinds weigh the same, and at the start the log-ratio is 0."""
    start = make_tiny_policy(tmp_path / "start")
    sgd = {"optim": "sgd", "max_grad_norm": 0}
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    log = _train(start, tmp_path, learning_rate=1e-1, max_steps=1, warmup_steps=0, lr_scheduler_type="constant", trainer=sgd, **batch)
    policy = load_policy(str(start))
    encoded = Format(policy.tokenizer, "none").encode([p.content for p, _, _ in ROWS], [text for _, text, _ in ROWS])
    assert (log["steps"], log["rows"], log["tokens"]) == (1, 12, sum(map(len, encoded)))
    given = collate([{"input_ids": r.ids, "labels": r.labels} for r in encoded], policy.pad_id)
    labels = given.pop("labels")
    nats = answer_nats(policy.model(**given).logits, labels)
    assert nats.tolist() == pytest.approx(sequence_log_probs(policy, encoded).tolist(), abs=1e-4)
    ratio = nats - nats.detach()
    f = 0.5 * ratio + 0.2
    loss = (-2 * f[:4].sigmoid().log().sum() - (1 - f[4:].sigmoid()).log().sum()) / 16
    assert loss.item() == pytest.approx(log["loss"], rel=1e-4)
    loss.backward()
    moved = load_policy(str(tmp_path / "aligned")).model.state_dict()
    for name, weight in policy.model.named_parameters():
        assert torch.allclose(moved[name], weight.detach() - 0.1 * weight.grad, atol=2e-6), name
    assert max(float(w.grad.abs().max()) for w in policy.model.parameters()) > 1e-3


def test_it_learns_the_demonstrations(tmp_path):
    start = make_tiny_policy(tmp_path / "start")
    log = _train(start, tmp_path, learning_rate=1e-2, num_train_epochs=8, per_device_train_batch_size=4)
    assert log["losses"] and log["dev_nll"]["aligned"] < log["dev_nll"]["start"] - 0.3

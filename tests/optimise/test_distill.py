"""Distillation: who wins, and that the policy learns to answer like the winners, from pi_SFT on."""

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.data.chat import Format
from irlign.optimise.distill import train_distill, winners
from irlign.policy.likelihood import mean_nll
from irlign.policy.load import load_policy
from irlign.records import Demonstration, Prompt, Sample
from irlign.training import TrainerSettings

ASK, TALK = Prompt.of("the cat", "train"), Prompt.of("the dog", "train")


def _pool(prompt, *answers):
    """Samples of (text, finish reason)."""
    return [Sample(prompt, i, text, reason, 3, -1.0) for i, (text, reason) in enumerate(answers)]


def test_the_winner_is_the_best_finished_answer_of_each_prompt():
    samples = [
        *_pool(ASK, (" sat.", "eos"), (" ran.", "eos"), (" sang", "length"), ("  ", "eos"), (" ran.", "eos")),
        *_pool(TALK, (" home.", "stop"), (" mat.", "eos")),
    ]
    scores = [0.0, 1.0, 9.0, 8.0, 1.0, -3.0, -2.0]  # the cut and the empty answer have the highest scores
    assert winners(samples, scores) == [samples[1], samples[6]]
    assert winners(samples, scores, 2) == [samples[1], samples[0], samples[6], samples[5]]  # " ran." once
    assert winners(samples, np.array(scores), 9) == winners(samples, scores, 2)


def test_of_equal_answers_the_first_drawn_wins_whatever_the_order():
    samples = _pool(ASK, (" sat.", "eos"), (" ran.", "eos"), (" sat.", "eos"))
    assert winners(samples[::-1], [5.0, 5.0, 5.0]) == [samples[0]]
    assert winners(samples[::-1], [5.0, 5.0, 4.0], 2) == [samples[1], samples[2]]


def test_a_prompt_whose_answers_are_all_cut_has_no_winner():
    assert winners(_pool(ASK, (" sat", "length"), (" ran", "length")), [1.0, 2.0]) == []


ANIMALS = ("cat", "dog", "bird")
PROMPTS = [
    Prompt.of(f"the {colour} {animal} {verb}", "train") for colour in ("red", "blue") for animal in ANIMALS for verb in ("sat", "ran")
]


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("peft", [False, True])
def test_it_learns_the_winners(tmp_path, peft):
    """Unseen prompts' answers of the winners' kind become likelier than those of the losers' kind; the checkpoint is a plain one."""
    if peft:
        pytest.importorskip("peft")
    start = make_tiny_policy(tmp_path / "start")
    samples = [s for p in PROMPTS[2:] for s in _pool(p, (" and sang on the mat.", "eos"), (" now.", "eos"))]
    scores = [float(s.index == 0) for s in samples]
    dev = [Demonstration(p, " and sang on the mat.") for p in PROMPTS[:2]]
    log = train_distill(
        start,
        winners(samples, scores),
        dev,
        TrainerSettings(learning_rate=3e-2 if peft else 1e-2, num_train_epochs=8, per_device_train_batch_size=5, use_peft=peft, lora_r=4),
        chat_template="none",
        folder=tmp_path / "aligned",
        checkpoints=tmp_path / "checkpoints",
        seed=0,
        report_to="none",
    )
    assert log["rows"] == 10 and log["steps"] == 16 and log["dev_nll"]["aligned"] < 0.5 * log["dev_nll"]["sft"]
    assert not list((tmp_path / "aligned").glob("adapter*"))
    before, after = load_policy(str(start)), load_policy(str(tmp_path / "aligned"))
    form = Format(before.tokenizer, "none")
    won, lost = (form.encode([d.prompt.content for d in dev], [text] * 2) for text in (" and sang on the mat.", " now."))
    assert mean_nll(after, won) == pytest.approx(log["dev_nll"]["aligned"], abs=1e-4)
    assert mean_nll(before, won) - mean_nll(after, won) > mean_nll(before, lost) - mean_nll(after, lost)

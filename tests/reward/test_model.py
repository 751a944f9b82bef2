"""The classifier reward: one score for one answer whatever the batch and the padding, and a checkpoint anyone can load."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign import forward
from irlign.data.chat import Format, pad
from irlign.errors import DataError, ModelError
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.progress import QUIET
from irlign.reward import log_ratio
from irlign.reward.load import load_reward, score_all
from irlign.reward.log_ratio import LogRatio
from irlign.reward.model import Classifier
from irlign.reward.publish import LOG_RATIOS, publish_log_ratios

PROMPTS = ["the cat", "The red bird sang on the mat.", "a", "the dog ran home and", "now", "home", "a blue dog", "the bird"]
COMPLETIONS = [
    " sat.",
    " and the dog ran",
    " cat sat on the red mat. The bird sang now!",
    "",
    " the",
    " ran, sat.",
    " sang!",
    " a",
]
CARD = {"kind": "classifier", "name": "init-sft", "chat_template": "none"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def published(request, tmp_path_factory):
    """A reward folder with a random head, as the stage publishes it."""
    policy = make_tiny_policy(tmp_path_factory.mktemp("policy"), architecture=request.param)
    torch.manual_seed(1)
    reward = Classifier.start(policy, "none", "init-sft")
    folder = tmp_path_factory.mktemp("rewards") / "init-sft"
    reward.save(folder)
    (folder / "reward.json").write_text(json.dumps(CARD))
    return folder


def test_prompts_and_answers_come_in_pairs(published):
    for asked, message in (((["a", "b"], [" x"]), "2 prompts and 1 answers"), (("a", [" x"]), "this is one text")):
        with pytest.raises(DataError, match=message):
            load_reward(published).score(*asked)


def test_the_python_face_is_quiet_too(published):
    """No bar of the libraries below, even where they were imported first."""
    code = f"import transformers, irlign; irlign.load_reward({str(published)!r}).score(['the cat'], [' sat.'])"
    given = {k: v for k, v in os.environ.items() if k not in QUIET} | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True).stderr == ""


def test_the_batch_and_the_padding_change_no_score(published, monkeypatch):
    reward = load_reward(published)
    eight = reward.score(PROMPTS, COMPLETIONS)
    assert eight.shape == (8,) and len(set(eight.round(4))) == 8  # eight different answers, eight scores
    one = np.concatenate([reward.score([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert np.abs(eight - one).max() < 1e-4
    assert np.abs(reward.score(PROMPTS[::-1], COMPLETIONS[::-1])[::-1] - eight).max() < 1e-4
    monkeypatch.setattr(forward, "CPU_TOKENS", 1)
    assert np.abs(reward.score(PROMPTS, COMPLETIONS) - eight).max() < 1e-4
    monkeypatch.undo()

    rows = [row.ids for row in reward.format.encode(PROMPTS, COMPLETIONS)]
    ids_B_T, mask_B_T = pad(rows, reward.pad_id, side="left")
    positions_B_T = (mask_B_T.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        left = reward.model(input_ids=ids_B_T, attention_mask=mask_B_T, position_ids=positions_B_T).logits[:, 0]
    assert np.abs(left.numpy() - eight).max() < 1e-4


def test_the_score_is_read_at_eos(published):
    """The head on the backbone's state at the last token: by hand, one row alone without padding."""
    reward = load_reward(published)
    row = reward.format.encode(["the cat"], [" sat."])[0]
    assert row.ids[-1] == 2 != reward.pad_id
    with torch.inference_mode():
        state = reward.model.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1]
        expected = float(reward.model.score(state)[0])
    assert reward.score(["the cat"], [" sat."])[0] == pytest.approx(expected, abs=1e-5)
    assert reward.score(["the cat"], [" sat"])[0] != pytest.approx(expected, abs=1e-3)


def test_it_loads_with_transformers_alone(published):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(published)
    model = AutoModelForSequenceClassification.from_pretrained(published)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (published / "model.safetensors").is_file()
    texts = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert np.abs(logits.numpy() - load_reward(published).score(PROMPTS, COMPLETIONS)).max() < 1e-4


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_a_backbone_without_a_pad_of_its_own_gets_one(tmp_path, pad):
    tokenizer = make_tiny_tokenizer(special=False)
    tokenizer.eos_token = "</s>"
    tokenizer.pad_token = "</s>" if pad == "eos" else None
    folder = make_tiny_policy(tmp_path / "policy", tokenizer=tokenizer)
    reward = Classifier.start(folder, "none", "r")
    assert reward.pad_id == len(tokenizer) != tokenizer.eos_token_id
    reward.save(tmp_path / "reward")
    (tmp_path / "reward/reward.json").write_text(json.dumps(CARD))
    again = load_reward(tmp_path / "reward")
    assert again.model.config.pad_token_id == again.format.tokenizer.pad_token_id == reward.pad_id
    scores = again.score(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(reward.score(PROMPTS, COMPLETIONS), abs=1e-6)
    assert scores[:1] == pytest.approx(again.score(PROMPTS[:1], COMPLETIONS[:1]), abs=1e-4)


def test_a_pad_that_equals_eos_is_refused(tmp_path):
    folder = make_tiny_policy(tmp_path)
    reward = Classifier.start(folder, "none", "r")
    reward.format.tokenizer.pad_token = "</s>"
    with pytest.raises(ModelError, match="read at the wrong token"):
        Classifier(reward.model, reward.format, "r")


def test_messages_are_scored_through_the_template(published, tmp_path):
    shutil.copytree(published, tmp_path / "r")
    (tmp_path / "r/reward.json").write_text(json.dumps({**CARD, "chat_template": "hh"}))
    reward = load_reward(tmp_path / "r")
    talk = ({"role": "user", "content": "the cat"},)
    assert reward.score([talk], ["sat."]) == pytest.approx(reward.score(["the cat"], ["sat."]))
    assert abs(reward.score([talk], ["sat."]) - load_reward(published).score(["the cat"], ["sat."])) > 1e-4


def test_an_answer_longer_than_the_context_still_gets_a_score(published):
    assert np.isfinite(load_reward(published).score(["the cat"], [" sat" * 80])).all()


def test_a_reward_that_is_not_finite_is_an_error(published):
    reward = load_reward(published)
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="8 rewards are not finite"):
        reward.score(PROMPTS, COMPLETIONS)


def test_the_log_ratio_is_the_difference_of_two_log_likelihoods(tmp_path):
    for seed, side in enumerate(("init", "sft")):
        make_tiny_policy(tmp_path / "policies" / side, seed)
    inputs = {side: {"path": f"../../policies/{side}", "sha256": "-"} for side in ("sft", "init")}
    folder = tmp_path / "rewards/log-ratio"
    folder.mkdir(parents=True)
    card = {"kind": "log-ratio", "name": "log-ratio", "chat_template": "none", "inputs": inputs}
    (folder / "reward.json").write_text(json.dumps(card))
    reward = load_reward(folder)
    assert isinstance(reward, LogRatio) and reward.name == "log-ratio"
    sft, init = (load_policy(str(tmp_path / "policies" / side)) for side in ("sft", "init"))
    rows = Format(sft.tokenizer, "none").encode(PROMPTS, COMPLETIONS)
    expected = sequence_log_probs(sft, rows) - sequence_log_probs(init, rows)
    scores = reward.score(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(expected, abs=1e-9) and np.abs(scores).min() > 1e-3
    swapped = LogRatio(tmp_path / "policies/init", tmp_path / "policies/sft", "none")
    assert swapped.score(PROMPTS, COMPLETIONS) == pytest.approx(-expected, abs=1e-9)


def test_a_log_ratio_a_token_shares_the_pass_of_the_whole_one(tmp_path, monkeypatch):
    for seed, side in enumerate(("init", "sft")):
        make_tiny_policy(tmp_path / "policies" / side, seed)
    hashes = {f"policies/{side}": {"sha256": "-"} for side in ("sft", "init")}
    publish_log_ratios(tmp_path / "rewards", list(LOG_RATIOS), hashes, chat_template="none", seed=0)
    folders = {name: tmp_path / "rewards" / name for name in LOG_RATIOS}
    alone = {name: load_reward(folder).score(PROMPTS, COMPLETIONS) for name, folder in folders.items()}
    tokens = [
        len(row.completion_ids)
        for row in Format(load_policy(str(tmp_path / "policies/sft")).tokenizer, "none").encode(PROMPTS, COMPLETIONS)
    ]
    assert tokens[:4] == [3, 5, 13, 1]  # " sat.": sat, the full stop, EOS; the empty answer is EOS alone
    assert alone["log-ratio-per-token"] == pytest.approx(alone["log-ratio"] / tokens)
    loaded = []
    monkeypatch.setattr(log_ratio, "load_policy", lambda folder, name: loaded.append(name) or load_policy(folder, name))
    together = score_all(folders, PROMPTS, COMPLETIONS)
    assert loaded == ["sft", "init"]  # the likelihood alone shares it too
    assert {name: list(of) for name, of in together.items()} == {name: pytest.approx(of) for name, of in alone.items()}


def test_what_is_no_reward_is_refused(published, tmp_path):
    with pytest.raises(ModelError, match=r"no reward\.json"):
        load_reward(tmp_path)
    (tmp_path / "reward.json").write_text(json.dumps({**CARD, "kind": "oracle"}))
    with pytest.raises(ModelError, match="unknown kind of reward 'oracle'"):
        load_reward(tmp_path)
    (tmp_path / "reward.json").write_text(json.dumps(CARD))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_reward(tmp_path)
    with pytest.raises(ModelError, match="no reward model can start"):
        Classifier.start(tmp_path / "nowhere", "none", "r")

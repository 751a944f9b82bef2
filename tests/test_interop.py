"""What a run publishes, loaded by other people's tools: the lines of docs/interop.md, and that they give irlign's numbers.

The tests marked `vllm` need it (`make test-vllm`).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_recipe, witnesses
from tiny import make_tiny_encoder, make_tiny_policy

import irlign
from irlign.data.pairs import PAIR
from irlign.files import read_json, read_table, write_json
from irlign.policy.load import load_policy
from irlign.reward.model import Classifier
from irlign.sampling.vllm_engine import PYTHON

ADAPTER = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
WIDE = {"hidden_size": 64, "num_attention_heads": 2}  # heads of 32: vLLM on a CPU serves none that are narrower
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
ONE_STEP = {"max_steps": 1, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
DRAWN = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4}
PROMPTS, ANSWERS = ["the cat", "a red dog", "The bird sang and", "home"], [" sat.", " ran home now!", " the dog sat", ""]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose policies and reward were trained as LoRA adapters, the aligned one published: what weighs candidates are stand-ins that like it."""
    root = tmp_path_factory.mktemp("interop") / "run"
    with pytest.MonkeyPatch.context() as patch:
        witnesses(patch, [50.0])
        irlign.run(small_recipe(root, pretrain=WIDE, sft=ADAPTER, reward=ADAPTER, optimise=ADAPTER))
    assert read_json(root / "optimise/choice.json")["published"] == "round-1"
    return root


@pytest.fixture(scope="module")
def asked(finished) -> tuple[list[str], list[str]]:
    """Prompts and answers that ended by themselves, of the world that the run is about."""
    rows = read_table(finished / "data/train.parquet")[:8]
    return [row["prompt"] for row in rows], [row["completion"] for row in rows]


def test_policies_in_transformers(finished):
    """Unseen demonstrations have there the loss that the run wrote down, in nats a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    choice = read_json(finished / "optimise/choice.json")
    losses = {
        "init" if side == "initial" else side: of
        for side, of in read_json(finished / "manifest.json")["stages"]["sft"]["notes"]["dev_nll"].items()
    }
    losses["aligned"] = choice["candidates"][choice["published"]]["training"]["dev_nll"]["aligned"]
    for name, expected in losses.items():
        folder, total, tokens = finished / "policies" / name, 0.0, 0
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not (folder / "adapter_config.json").exists()
        for row in read_table(finished / "data/dev.parquet"):
            start, ids = (
                len(tokenizer(row["prompt"])["input_ids"]),
                tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"],
            )
            with torch.inference_mode():
                logprobs_T_V = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total, tokens = total - float(logprobs_T_V[range(start - 1, len(ids) - 1), ids[start:]].sum()), tokens + len(ids) - start
        assert total / tokens == pytest.approx(expected, abs=1e-4)
    assert len({round(loss, 3) for loss in losses.values()}) == 3  # three policies, and none of them another under its name


def test_adapters_over_a_published_policy(finished, tmp_path):
    """peft takes the merged policy further, and its adapter is a policy to irlign."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "policies/sft"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "adapter")

    ids = torch.tensor([tokenizer("the")["input_ids"]])
    with torch.inference_mode():
        adapted = model.eval()(ids).logits
        assert torch.allclose(load_policy(str(tmp_path / "adapter")).model(ids).logits, adapted, atol=1e-4)
        assert not torch.allclose(load_policy(str(folder)).model(ids).logits, adapted, atol=1e-2)


def test_the_reward_in_a_text_classification_pipeline(finished, asked):
    """The raw reward, whether it is asked for or left to the saved problem type."""
    from transformers import pipeline

    prompts, answers = asked
    classify = pipeline("text-classification", model=str(finished / "rewards/init-sft"))
    texts = [p + y + classify.tokenizer.eos_token for p, y in zip(prompts, answers, strict=True)]
    found = classify(texts, function_to_apply="none")
    expected = irlign.load_reward(finished / "rewards/init-sft").score(prompts, answers)
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-4) and {row["label"] for row in found} == {"reward"}
    assert classify(texts) == found and expected.std() > 1e-3


def _published(folder, backbone, template):
    Classifier.start(backbone, template, "r").save(folder)
    write_json(folder / "reward.json", {"kind": "classifier", "name": "r", "chat_template": template})
    return irlign.load_reward(folder)


def test_conversations_and_pairs_in_a_text_classification_pipeline(tmp_path):
    from transformers import pipeline

    torch.manual_seed(1)
    reward = _published(tmp_path / "talk", make_tiny_policy(tmp_path / "policy"), "chatml")
    classify = pipeline("text-classification", model=str(tmp_path / "talk"))
    talks = [[{"role": "user", "content": p}] for p in PROMPTS]
    texts = [classify.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]
    texts = [text + y + classify.tokenizer.eos_token for text, y in zip(texts, ANSWERS, strict=True)]
    found = classify(texts, function_to_apply="none", add_special_tokens=False)
    assert [row["score"] for row in found] == pytest.approx(reward.score(talks, ANSWERS), abs=1e-4)

    reward = _published(tmp_path / "pair", make_tiny_encoder(tmp_path / "encoder"), PAIR)
    classify = pipeline("text-classification", model=str(tmp_path / "pair"))
    found = classify([{"text": p, "text_pair": y} for p, y in zip(PROMPTS, ANSWERS, strict=True)], function_to_apply="none")
    assert [row["score"] for row in found[:3]] == pytest.approx(reward.score(PROMPTS[:3], ANSWERS[:3]), abs=1e-4)
    assert found[3]["score"] != pytest.approx(
        reward.score(PROMPTS[3:], ANSWERS[3:])[0], abs=1e-3
    )  # transformers takes "" for no pair at all


def test_a_fine_tuned_encoder_in_sentence_transformers(tmp_path):
    """As a CrossEncoder, with the identity in the place of its sigmoid; pairs that stay within the encoder's length."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    torch.manual_seed(1)
    reward = _published(tmp_path / "pair", make_tiny_encoder(tmp_path / "encoder"), PAIR)
    ranker = sentence_transformers.CrossEncoder(str(tmp_path / "pair"), device="cpu")
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    found = ranker.predict(pairs, activation_fn=torch.nn.Identity())
    assert found == pytest.approx(reward.score(PROMPTS, ANSWERS), abs=1e-4) and found.std() > 1e-3
    assert ranker.predict(pairs) != pytest.approx(found, abs=1e-3)  # by itself it gives a probability


def test_a_further_step_in_trls_reward_trainer(finished, asked, tmp_path):
    """TRL reads plain-text pairs as the tokens that the reward was trained on, and what it saves is a reward again."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    folder, (prompts, answers) = finished / "rewards/init-sft", asked
    pairs = [{"prompt": p, "chosen": y, "rejected": answers[i - 1]} for i, (p, y) in enumerate(zip(prompts, answers, strict=True))]
    config = RewardConfig(output_dir=str(tmp_path / "trl"), **ON_CPU, **ONE_STEP)
    trainer = RewardTrainer(model=str(folder), args=config, train_dataset=Dataset.from_list(pairs))
    before = irlign.load_reward(folder)
    assert list(trainer.train_dataset["chosen_ids"]) == [row.ids for row in before.format.encode(prompts, answers)]
    trainer.train()
    trainer.save_model(str(tmp_path / "further"))
    shutil.copy(folder / "reward.json", tmp_path / "further")

    def margin(reward):
        return float((reward.score(prompts, answers) - reward.score(prompts, [pair["rejected"] for pair in pairs])).mean())

    assert margin(irlign.load_reward(tmp_path / "further")) > margin(before)


@pytest.mark.parametrize("method", ["RLOO", "GRPO"])
def test_the_reward_in_trls_on_policy_trainers(finished, tmp_path, method):
    """As a function it gives irlign's scores; as a path TRL reads the text without BOS and EOS, so its numbers are others."""
    import trl
    from datasets import load_dataset

    folder, seen = finished / "rewards/init-sft", []
    reward = irlign.load_reward(folder)

    def irl_reward(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return reward.score(prompts, completions).tolist()

    prompts = load_dataset("parquet", data_files=str(finished / "data/train.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = getattr(trl, f"{method}Trainer")(
        model=str(finished / "policies/sft"),
        reward_funcs=[irl_reward, str(folder)],
        args=getattr(trl, f"{method}Config")(output_dir=str(tmp_path / "trl"), **ON_CPU, **ONE_STEP, **DRAWN),
        train_dataset=prompts.select_columns("prompt"),
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "rewards/irl_reward/mean" in entry)
    scores = reward.score(*map(list, zip(*seen, strict=True)))
    assert len(seen) == 4 and log["rewards/irl_reward/mean"] == pytest.approx(scores.mean(), abs=1e-4)
    with torch.inference_mode():
        bare = [reward.format.tokenizer(p + y, add_special_tokens=False, return_tensors="pt")["input_ids"] for p, y in seen]
        expected = [float(reward.model(ids).logits) for ids in bare]
    assert log["rewards/init-sft/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert log["rewards/init-sft/mean"] != pytest.approx(log["rewards/irl_reward/mean"], abs=1e-3)


@pytest.mark.parametrize("name", ["init", "sft", "aligned"])
def test_pools_as_datasets(finished, tmp_path, name):
    from datasets import load_dataset

    pool = load_dataset("parquet", data_files=str(finished / f"pools/{name}.parquet/*.parquet"), split="train", cache_dir=str(tmp_path))
    assert pool.to_list() == read_table(finished / f"pools/{name}.parquet")
    assert (
        load_dataset(str(finished / f"pools/{name}.parquet"), split="train", cache_dir=str(tmp_path)).num_rows == pool.num_rows
    )  # with its card


def test_candidates_and_the_selection_as_datasets(finished, tmp_path):
    from datasets import load_dataset

    options = {"split": "train", "cache_dir": str(tmp_path)}
    candidates = load_dataset("parquet", data_files=str(finished / "best_of_n/candidates.parquet"), **options)
    assert candidates.to_list() == read_table(finished / "best_of_n/candidates.parquet") and "reward/init-sft" in candidates.column_names
    selected = load_dataset("json", data_files=str(finished / "best_of_n/selected.jsonl"), **options)
    lines = (finished / "best_of_n/selected.jsonl").read_text(encoding="utf-8").splitlines()
    assert selected.to_list() == [json.loads(line) for line in lines] and {"prompt", "completion"} <= set(selected.column_names)


VLLM = """
import gc, json, sys
from vllm import LLM, PoolingParams, SamplingParams

policy, asked, reward, texts = json.loads(sys.stdin.read())
options = {"dtype": "float32", "enforce_eager": True}
served = LLM(policy, **options)
drawn = [list(d.outputs[0].token_ids) for d in served.generate(asked, SamplingParams(temperature=0, max_tokens=12))]
del served
gc.collect()
scored = LLM(reward, runner="pooling", **options).classify(texts, pooling_params=PoolingParams(use_activation=False))
print("FOUND" + json.dumps([drawn, [s.outputs.probs[0] for s in scored]]))
"""


@pytest.mark.vllm
def test_the_aligned_policy_and_the_reward_in_vllm(finished, asked):
    """The most likely answers are those that transformers gives, the scores irlign's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, folder, (prompts, answers) = finished / "policies/aligned", finished / "rewards/init-sft", asked
    model, tokenizer = (kind.from_pretrained(policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected, options = [], {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tokenizer.eos_token_id}
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist())
    texts = [p + y + tokenizer.eos_token for p, y in zip(prompts, answers, strict=True)]
    child = {"input": json.dumps([str(policy), prompts, str(folder), texts]), "capture_output": True, "text": True}
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": "",
    }
    done = subprocess.run([os.environ.get(PYTHON, sys.executable), "-c", VLLM], env=environment, **child)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn, scores = json.loads(done.stdout.split("FOUND")[1])
    assert drawn == expected
    assert scores == pytest.approx(irlign.load_reward(folder).score(prompts, answers), abs=1e-3)

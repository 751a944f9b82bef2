"""`irlign plan`: stages by hand, sizes from worlds, files and headers, and a quick table that reads no weight."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_tiny_policy

from irlign import costs, machine, sizes
from irlign.config import load_recipe
from irlign.costs import Shape, Speed
from irlign.data.chat import Format
from irlign.errors import ConfigError, DataError, ModelError
from irlign.plan import plan, short
from irlign.policy.load import count_parameters, load_policy, load_tokenizer
from irlign.recipe import Recipe
from irlign.sizes import Sizes, file_sizes, shape_of, world_sizes
from irlign.stage_costs import stages

ROOT = Path(__file__).parents[1]
SHAPE = Shape(1000, looked_up=0, head=200, layers=1, hidden=10, attention=10, kept=10, vocabulary=20)
SIZES = Sizes({"train": 10, "dev": 20, "test": 6}, {"train": 20, "dev": 30, "test": 6}, prompt=5, answer=15, longest=40)
GIVEN = [
    "model_name_or_path=m",
    "dataset_name=d.jsonl",
    "sft.num_train_epochs=2",
    "sft.per_device_train_batch_size=5",
    "sampling.train_generations=3",
    "sampling.num_generations=8",
    "sampling.initial_generations=2",
    "reward.num_train_epochs=1",
]


def _stages(*changes, shape=SHAPE, speed=Speed(1e6, 4e6)):
    return {s.name: s for s in stages(load_recipe(Recipe, None, [*GIVEN, *changes]), SIZES, shape, shape, speed)}


def test_every_stage_by_hand():
    found = _stages()
    assert list(found) == ["init", "sft", "sample", "reward", "bon", "optimise", "eval"]
    sft, sample, reward, bon, optimise, evaluation = (found[name] for name in list(found)[1:])
    # 20 rows of 20 tokens twice; 30 dev rows scored before and after
    assert sft.trained == 2 * 20 * 20 and sft.read == 2 * 30 * 20
    assert sft.flops == SHAPE.trained(40, 20) + SHAPE.read(60, 20)
    assert sft.seconds == pytest.approx(SHAPE.trained(40, 20) / (4e6 * costs.TRAINING) + SHAPE.read(60, 20) / (1e6 * costs.SCORING))
    # pi_0: 10 x 3 + 26 x 2; pi_SFT: 10 x 3 + 26 x 8; 15 tokens each
    assert sample.generated == (82 + 238) * 15 and sample.flops == SHAPE.drawn(36, 82, 5, 15) + SHAPE.drawn(36, 238, 5, 15)
    assert sample.seconds == pytest.approx(sample.flops / (4e6 * costs.SAMPLING))
    # 3 pairs a train prompt; on dev 8, since pi_0's 2 are repeated
    assert reward.trained == 2 * 30 * 20 and reward.read == 2 * 160 * 20
    assert reward.flops == SHAPE.trained(60, 20, head=False) + SHAPE.read(320, 20, head=False)
    # 208 candidates under the reward and two policies; the judge reads them, pi_0's 40, 30 demonstrations and 4 x 30 exchanged ones
    assert bon.read == (3 * 208 + 208 + 40 + 150) * 20
    assert bon.flops == SHAPE.read(208, 20, False) + 2 * SHAPE.read(208, 20) + SHAPE.read(398, 20, False)
    # a winner of each of 10 train prompts; 26 prompts x 4 answers drawn; 30 answers and 80 on dev under the reward and the likelihood, these under
    # three policies, 80 of pi_SFT under two; the judge reads 80, pi_0's 40 and the demonstrations
    assert optimise.trained == 3 * 10 * 20 and optimise.generated == 26 * 4 * 15
    assert optimise.read == (2 * 30 + 2 * 80 + 3 * 80 + 2 * 80 + 80 + 40 + 150) * 20
    assert evaluation.read == 2 * (12 + 6) * 20


@pytest.mark.parametrize(
    ("method", "trained", "drawn", "scored", "besides"),
    [
        ("weighted-sft", 3 * 20, 0, 0, 0),
        ("dpo", 3 * 10 * 2, 0, 30, 1),  # a pair for each prompt
        ("spin", 3 * 30 * 2, 0, 0, 1),  # a pair for each own answer
        ("ditto", 3 * 30 * 2, 0, 0, 1),
        ("gsil", 3 * (20 + 30), 0, 0, 1 / 3),  # the reference reads a row once, in three passes
        ("kto", 3 * (20 + 30), 0, 0, 3),
        ("rloo", 3 * 10 * 8, 3 * 10 * 8, 30 + 3 * 10 * 8, 2),  # eight answers to each prompt, in each of three passes
        ("grpo", 3 * 10 * 8, 3 * 10 * 8, 30 + 3 * 10 * 8, 1),
        ("rlsr", 3 * 10 * 8, 3 * 10 * 8, 0, 1),  # words cost next to nothing
    ],
)
def test_every_policy_method_by_hand(method, trained, drawn, scored, besides):
    """In texts of 20 tokens, answers of 15; what is weighed and judged is as for distill, where answers are drawn in training for two candidates:
    the earlier one answers 20 dev prompts alone."""
    found, candidates = _stages(f"optimise.method={method}")["optimise"], 1 + bool(drawn)
    assert found.trained == trained * 20 and found.generated == (26 * 4 + 20 * 4 * (candidates - 1) + drawn) * 15
    weighed = candidates * (2 * 80 + 3 * 80 + 80 + 40 + 150) + 2 * 80
    assert found.read == pytest.approx((2 * scored + besides * trained + weighed) * 20)
    assert found.seconds > 0 and found.memory >= _stages()["optimise"].memory


def test_more_answers_than_are_stored_are_drawn_anew():
    """Three are stored for each of 10 train prompts: two of them cost nothing, five are drawn and scored in the place of all three."""
    stored, two, five = (_stages("optimise.winners=2", *more)["optimise"] for more in ([], ["optimise.answers=2"], ["optimise.answers=5"]))
    assert two.generated == stored.generated and five.generated == stored.generated + 50 * 15
    assert five.read - stored.read == 2 * 20 * 20 and stored.read - two.read == 2 * 10 * 20
    assert stored.trained == two.trained == five.trained == 3 * 10 * 2 * 20


def test_rounds_of_spin_mix_in_the_round_before():
    one, three = (_stages("optimise.method=spin", f"optimise.rounds={n}")["optimise"] for n in (1, 3))
    assert three.trained == 5 * one.trained and three.generated == 3 * one.generated + 2 * 30 * 15


@pytest.mark.parametrize(
    ("refresh", "replay", "policies", "dev"),
    [
        ("current-demo", "true", (3, 4), (4 + 2 + 8, 4 + 2 + 8 + 4)),  # the round before, pi_0, pi_SFT; in round 3 round 1 too
        ("current-demo", "false", (1, 1), (4, 4)),
        ("current-sft", "true", (2, 3), (8, 10)),  # on dev pi_SFT's 8 answers are the longer side at first
        ("init-current", "false", (1, 1), (4, 4)),
    ],
)
def test_a_refreshed_reward_costs_its_pairs(refresh, replay, policies, dev):
    """Three answers of each policy to each of 10 train prompts; on 20 dev prompts 4 of a round, 2 of pi_0, 8 of pi_SFT. Pairs are two texts."""
    keys = ["optimise.rounds=3", f"optimise.refresh={refresh}", f"optimise.replay={replay}"]
    plain, refreshed = (_stages(*more)["optimise"] for more in (keys[:1], keys))
    assert refreshed.trained - plain.trained == 2 * 10 * 3 * sum(policies) * 20
    assert refreshed.read - plain.read == pytest.approx(2 * 20 * sum(dev) * 20)
    assert refreshed.generated == plain.generated and refreshed.seconds > plain.seconds and refreshed.disk > plain.disk


def test_rounds_of_rloo_draw_the_answers_that_the_reward_learns_from():
    """Ten train prompts, three answers each, of the policies of rounds 1 and 2."""
    one, three = (
        _stages("optimise.method=rloo", *more)["optimise"] for more in ([], ["optimise.rounds=3", "optimise.refresh=current-demo"])
    )
    assert three.generated == 3 * one.generated + 2 * 30 * 15


def test_too_few_held_out_demonstrations_make_no_judge():
    few = replace(SIZES, rows={**SIZES.rows, "dev": 19})
    found = stages(load_recipe(Recipe, None, GIVEN), few, SHAPE, SHAPE, Speed(1e6, 4e6))
    assert found[4].read == 3 * 208 * 20


@pytest.mark.parametrize(
    ("change", "stage", "key", "times"),
    [
        ("reward.members=3", "reward", "trained", 2),  # each of three leaves out a third of the pairs
        ("reward.ensemble=[init-sft, init-demo]", "reward", "trained", 2),  # 3 pairs and 3
        ("reward.contrast=sft-demo", "reward", "trained", 1),
        ("reward.kind=features", "reward", "trained", 0),
        ("reward.members=3", "bon", "read", (5 * 208 + 398) / (3 * 208 + 398)),  # two networks more
        ("reward.log_ratio=false", "bon", "read", (2 * 208 + 398) / (3 * 208 + 398)),
        ("sft.max_steps=2", "sft", "trained", 0.25),  # of 8
        ("sampling.max_new_tokens=5", "sample", "generated", 1 / 3),
        ("sft.keep_checkpoints=[0.5]", "sample", "generated", (320 + 70) / 320),  # train and dev prompts only
        ("sft_model_name_or_path=other", "sft", "trained", 0),
    ],
)
def test_what_the_settings_change(change, stage, key, times):
    assert getattr(_stages(change)[stage], key) == pytest.approx(times * getattr(_stages()[stage], key))


def test_an_adapter_trains_for_two_thirds_and_in_little_memory():
    large = replace(SHAPE, parameters=10**9)
    whole, adapter = (_stages(*change, shape=large)["reward"] for change in ([], ["reward.use_peft=true"]))
    assert whole.flops - adapter.flops == large.read(60, 20, head=False) == large.trained(60, 20, head=False) / 3
    assert whole.memory - adapter.memory == 12 * 10**9


def test_an_endpoint_takes_no_time_here_and_has_a_price():
    own = ["sampling.engine=openai", "sampling.openai.price_out=1000000"]
    sample = _stages(*own)["sample"]
    assert (sample.flops, sample.seconds, sample.read) == (0, None, 320 * 5)  # a prompt is billed for every answer
    text = plan(None, [*own, "world=dialogue"], flops=1e12)
    answers = 2 * 396 * 4 + 180 * 4 + 180 * 16
    tokens = answers * world_sizes(load_recipe(Recipe, {"world": "dialogue"}))[0].answer
    assert f"sample runs at the endpoint: cost {int(tokens):,}.00" in text
    assert next(line for line in text.splitlines() if line.startswith("sample ")).split()[1:3] == short(tokens).split()


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr("irlign.stage_costs.has_cuda", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return monkeypatch


def test_vllm_and_a_cluster_are_costed_as_what_draws_there(cpu):
    """Prompts read once a prompt: 36 of each policy. In memory two processes, weights once, 512 rows of 5 + 128 tokens and their logits."""
    large = replace(SHAPE, laid_out=400)
    own, vllm, several = (
        _stages(*keys, shape=large)["sample"]
        for keys in ([], ["sampling.engine=vllm"], ["sampling.engine=cluster", "sampling.cluster.engine=vllm"])
    )
    assert vllm == several and (vllm.generated, vllm.read, vllm.flops) == (own.generated, 2 * 36 * 5, own.flops)
    assert vllm.seconds == pytest.approx(own.flops / (1e6 * costs.SAMPLING))  # float32 on a CPU, where ours takes what pays
    assert vllm.memory == 2 * costs.PROCESS + 1000 * 4 + 2 * 512 * 133 * 10 * 4 + 512 * 12 * 20
    assert own.memory == costs.PROCESS + 1400 * 2 + 2 * 512 * 133 * 10 * 2 + 512 * 12 * 20
    endpoint = _stages("sampling.engine=cluster", "sampling.cluster.engine=openai")["sample"]
    assert (endpoint.seconds, endpoint.read) == (None, 320 * 5)
    text = plan(None, ["sampling.engine=vllm", "world=dialogue"], flops=1e12)
    assert "endpoint" not in text and "-" not in next(line for line in text.splitlines() if line.startswith("sample ")).split()[5:]


def test_what_vllm_reserves_is_in_memory_where_it_is_known(cpu):
    def memory(*args):
        return _stages("sampling.engine=vllm", "sampling.dtype=bfloat16", f"sampling.vllm.args={{{', '.join(args)}}}")["sample"].memory

    rest = 2 * costs.PROCESS + 1000 * 2
    assert memory("max_num_batched_tokens: 8") == rest + 2 * 8 * 133 * 10 * 2 + 8 * 12 * 20
    assert memory("kv_cache_memory_bytes: 5000") == rest + 5000 + 512 * 12 * 20
    cpu.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert memory("kv_cache_memory_bytes: 5000") == rest + 2 * 1024**3 + 512 * 12 * 20


def test_bon_holds_its_candidates():
    """208 of them: 26 prompts with 8 answers; 20 prompts more on dev are 160 more, at 1.2 KiB each."""
    more = replace(SIZES, prompts={**SIZES.prompts, "dev": 40})
    few, many = (stages(load_recipe(Recipe, None, GIVEN), of, SHAPE, SHAPE, Speed(1e6, 4e6))[4] for of in (SIZES, more))
    assert few.memory == pytest.approx(costs.PROCESS + SHAPE.scoring_memory(2048, True) + 208 * 1228.8)
    assert many.memory - few.memory == pytest.approx(160 * 1228.8)


def test_the_quickstart_in_a_moment_and_without_torch():
    code = (
        "import sys, time\nfrom irlign.cli import main\n"
        "try:\n    main(['plan', sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "print(time.process_time(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "recipes/quickstart.yaml")]
    *table, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    seconds, torch = last.split()
    assert float(seconds) < 3 and torch == "False"
    assert [line.split()[0] for line in table[1:9]] == ["pretrain", "sft", "sample", "reward", "bon", "optimise", "eval", "total"]
    assert "389 k parameters" in "\n".join(table) and "396 train, 60 dev, 120 test prompts" in "\n".join(table)


def test_a_worlds_lengths_are_what_its_tokenizer_gives():
    recipe = load_recipe(Recipe, None, ["world=errands"])
    found, shape = world_sizes(recipe)
    tokenizer = sizes.word_tokens(recipe.world.vocabulary())
    from irlign.policy.pretrain import word_tokenizer

    form = Format(word_tokenizer(recipe.world.vocabulary(), 256), recipe.world.chat_template)
    rows = recipe.world.splits(0)["train"]
    encoded = form.encode([d.prompt.content for d in rows], [d.completion for d in rows])
    assert found.answer == pytest.approx(sum(len(e.completion_ids) for e in encoded) / len(rows), abs=1)
    assert found.prompt == pytest.approx(sum(len(e.prompt_ids) for e in encoded) / len(rows), rel=0.3)
    assert shape.vocabulary == len(tokenizer) == len(form.tokenizer)


def test_a_checkpoint_is_counted_by_its_headers_alone(tmp_path):
    """The numbers behind the header are cut off: whoever reads a weight fails."""
    folder = make_tiny_policy(tmp_path / "model")
    model = load_policy(str(folder)).model
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little")])
    assert count_parameters(str(folder)) == model.num_parameters()
    shape = shape_of(str(folder))
    assert (shape.layers, shape.hidden, shape.attention, shape.kept) == (2, 32, 32, 16)
    assert shape.looked_up == shape.head == shape.vocabulary * 32  # two tables: not tied
    weights.unlink()
    assert count_parameters(str(folder)) == model.num_parameters()  # on the meta device


def test_files_give_counts_and_lengths(tmp_path):
    folder = make_tiny_policy(tmp_path / "model")
    rows = [{"prompt": "the cat " * n + "sat", "completion": " on the mat."} for n in range(1, 21)]
    for name, part in (("train", rows[:16]), ("eval", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    given = [f"model_name_or_path={folder}", f"dataset_name={tmp_path}/train.jsonl", f"eval_dataset_name={tmp_path}/eval.jsonl"]
    found = file_sizes(load_recipe(Recipe, None, given))
    assert found.prompts == {"train": 14, "dev": 2, "test": 4} and found.answer == 5  # on the mat . EOS
    form = Format(load_tokenizer(str(folder)))
    assert found.prompt == sum(len(form.prompt_ids(row["prompt"])) for row in rows[:16]) / 16
    text = plan(None, given, flops=1e9)
    assert "14 train, 2 dev, 4 test prompts" in text and "(given)" in text
    with pytest.raises(DataError, match="no such file"):
        plan(None, [*given, "dataset_name=./none.jsonl"], flops=1e9)
    text = plan(None, [*given, "dataset_name=./none.jsonl"], flops=1e9, prompts=1000, prompt_tokens=200, answer_tokens=90)
    assert "700 train, 100 dev, 200 test prompts of 200 tokens, answers of 90" in text
    with pytest.raises(ConfigError, match="sizes are given together"):
        plan(None, given, flops=1e9, prompts=1000)
    with pytest.raises(ConfigError, match="leave none"):
        plan(None, [*given, "data.dev_prompts=9"], flops=1e9, prompts=10, prompt_tokens=2, answer_tokens=2)


def test_the_speed_is_that_of_a_product(monkeypatch):
    speed = machine.matmul_flops(seconds=0.02)
    assert 1e8 < speed < 1e15
    clock = iter([0.0, *(t for k in range(4) for t in (1.0 + k, 1.25 + k)), 99.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.matmul_flops(seconds=0.02) == 2 * 1024**3 / 0.25


def test_numbers_in_three_digits():
    assert [short(x) for x in (0, 7, 999, 999.6, 1240, 12_400, 999_500, 1.5e9, 4.6e12)] == [
        "0", "7", "999", "1.00 k", "1.24 k", "12.4 k", "1.00 M", "1.50 G", "4.60 T",
    ]  # fmt: skip


def test_rounds_and_the_discriminator_by_hand():
    """ditto's second round mixes in 3 pairs for every 7; gad's discriminator learns a pair for each own answer and scores what grpo's reward does."""
    assert _stages("optimise.method=ditto", "optimise.rounds=2")["optimise"].trained == pytest.approx(3 * (30 + 30 + 30 * 3 / 7) * 2 * 20)
    grpo, gad = (_stages(f"optimise.method={name}", "optimise.discriminator.num_train_epochs=2")["optimise"] for name in ("grpo", "gad"))
    assert gad.trained == grpo.trained + 2 * 30 * 2 * 20 and gad.read == grpo.read - (30 + 3 * 10 * 8) * 20  # one network, no likelihood
    tokens = "optimise.on_policy.dense=discriminator"
    own = _stages("optimise.method=grpo", tokens, "optimise.discriminator.num_train_epochs=2")["optimise"]
    assert (own.trained, own.read) == (gad.trained, gad.read)  # as many pairs here, and the reward of the whole is not asked
    ratio, both = (
        _stages("optimise.method=grpo", "optimise.on_policy.dense=log-ratio", *m)["optimise"]
        for m in ([], ["optimise.on_policy.dense_share=0.5"])
    )
    assert ratio.trained == grpo.trained and both.read == grpo.read + 2 * (30 + 3 * 10 * 8) * 20 and ratio.read < both.read


def test_a_model_without_attention_has_no_plan(tmp_path):
    from transformers import MambaConfig

    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a plan counts what attention costs, and mamba models have none"):
        shape_of(str(tmp_path))

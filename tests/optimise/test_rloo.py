"""On-policy methods: what TRL is given and gives back, the shape of the reward by hand, and that the reward is what is learned."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl")

from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign import training
from irlign.data.chat import Format
from irlign.errors import ConfigError, DataError
from irlign.optimise import rloo
from irlign.optimise.drawing import Drawing, Drawn
from irlign.optimise.methods import own_config
from irlign.optimise.rloo import OnPolicySettings, on_policy_config, passes, readable, reward_function, shaped, train_on_policy
from irlign.optimise.settings import OptimiseSettings
from irlign.policy.load import load_policy
from irlign.preflight import check_method
from irlign.recipe import Recipe
from irlign.records import Demonstration, Prompt, Sample
from irlign.sampling.engine import SamplingSettings
from irlign.training import TrainerSettings

ANIMALS = ("cat", "dog", "bird")
PROMPTS = [Prompt.of(f"the {colour} {animal}", "train") for colour in ("red", "blue") for animal in ANIMALS]
SAMPLES = [Sample(p, i, text, "eos", 4, -1.0) for p in PROMPTS for i, text in enumerate((" sat on.", " cat now!"))]
DEV = [Demonstration(Prompt.of("a red cat", "dev"), " sat on the mat.")]


class Cats:
    """A reward that counts cats."""

    name = "cats"

    def __init__(self):
        self.seen = []

    def score(self, prompts, completions):
        self.seen += list(zip(prompts, completions, strict=True))
        return np.array([float(text.count("cat")) for text in completions])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def test_longer_than_usual_and_cut_costs():
    scores, tokens, usual = np.array([1.0, 1.0, 1.0, 1.0]), np.array([5, 10, 25, 40]), np.full(4, 10.0)
    assert shaped(scores, tokens, usual, np.array([False, False, False, True]), 2.0).tolist() == [1.0, 1.0, -2.0, -7.0]
    assert shaped(scores, tokens, usual, np.array([True] * 4), 0.0).tolist() == scores.tolist()


def test_passes_fill_whole_steps_and_drop_nobody():
    order = passes(5, 2, 4, seed=3)
    assert len(order) == 12 and sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    assert passes(5, 2, 4, seed=3) == order != passes(5, 2, 4, seed=4)
    assert Counter(passes(3, 0.01, 4, seed=0)).total() == 4


@pytest.mark.parametrize("template", ["none", "hh", "chatml"])
def test_prompts_that_trl_reads_otherwise_are_left_out(template):
    """A special token in the user's text, which the format reads as plain text, and a prompt without room for an answer."""
    tokenizer = make_tiny_tokenizer()
    form = Format(tokenizer, template)
    prompts = [Prompt.of(text, "train") for text in ("the cat", "the </s> cat", "a dog " * 40, " now.")]
    found = readable(form, prompts, 60)
    assert list(found) == [0, 3]
    given = found[0]
    read = tokenizer(given) if template == "none" else tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)
    assert read["input_ids"] == form.prompt_ids("the cat")


def test_the_reward_sees_the_text_after_its_prompt_and_the_ending():
    """Decoded after the prompt, EOS taken off, a cut answer up to its last whole sentence; standardised over pi_SFT's answers."""
    form = Format(make_tiny_tokenizer(), "none")
    samples = [Sample(PROMPTS[0], 0, " cat cat.", "eos", 4, -1.0), Sample(PROMPTS[1], 0, " dog.", "eos", 2, -1.0)]
    reward = Cats()
    drawing = Drawing(SamplingSettings(), form, {2}, 0, 64, ours=True)
    score = reward_function(reward, form, samples, drawing.used, 0.5)
    center, scale = 1.0, 1.0  # of 2 and 0 cats
    ids = [form.completion_ids("the dog", text) for text in (" cat cat cat.", " sat. cat")]
    ids[1] = ids[1][:-1]  # cut
    found = score(prompts=[], completions=[], completion_ids=ids, index=[1, 0], trainer_state=None)
    assert reward.seen[2:] == [(PROMPTS[1].content, " cat cat cat."), (PROMPTS[0].content, " sat.")]
    lengths = [len(ids[0]) / 2 - 1, 0.0]
    expected = [(3.0 - center) / scale - 0.5 * lengths[0], (0.0 - center) / scale - 0.5 * (lengths[1] + 1)]
    assert lengths[0] > 0 and found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "paid"),
    [
        # h = 2 and 0 cats of pi_SFT's answers, 1 and 4 of those that are paid
        ("reverse-kl", [2.0, 0.0, 1.0, 4.0]),
        ("gail", [math.log(1 + math.e**2), math.log(2), math.log(1 + math.e), math.log(1 + math.e**4)]),
        ("fairl", [-2 * math.e**2, 0.0, -math.e, -3 * math.e**3]),  # h above 3 is taken for 3
    ],
)
def test_what_the_objective_makes_of_the_reward_is_standardised(objective, paid):
    """Over what the objective, and not the reward, makes of pi_SFT's two answers: their mean, and half their distance as deviation."""
    form = Format(make_tiny_tokenizer(), "none")
    samples = [Sample(PROMPTS[0], 0, " cat cat.", "eos", 4, -1.0), Sample(PROMPTS[1], 0, " dog.", "eos", 2, -1.0)]
    score = reward_function(Cats(), form, samples, Drawing(SamplingSettings(), form, {2}, 0, 64, ours=True).used, 0.0, objective, 0.5)
    ids = [form.completion_ids("the dog", text) for text in (" cat.", " cat cat cat cat.")]
    own, other, *answers = paid
    center, scale = (own + other) / 2, abs(own - other) / 2
    assert score(completion_ids=ids, index=[0, 1]) == pytest.approx([0.5 * (value - center) / scale for value in answers])


def test_what_trl_cannot_do_is_said_before_any_compute(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"under TRL 1\.16 alone"):
        patch.setattr(rloo, "known_trl", lambda: False)
        on_policy_config("grpo", OnPolicySettings(), SamplingSettings(stop=["\n"]))
    config = on_policy_config("rloo", OnPolicySettings(num_generations=3), SamplingSettings())
    with pytest.raises(ConfigError, match="RLOOConfig refuses it"):
        training.training_arguments(TrainerSettings(), tmp_path, seed=0, bf16=False, report_to="none", config=config)


def _train(method, policy, folder, **settings):
    config = on_policy_config(method, OnPolicySettings(num_generations=4), SamplingSettings(max_new_tokens=12))
    defaults = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 8, "trainer": {"logging_steps": 1}}
    places = {"folder": folder / "aligned", "checkpoints": folder / "checkpoints"}
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": Cats, "length_penalty": 0.0}
    settings = TrainerSettings(**{**defaults, **settings})
    return train_on_policy(policy, SAMPLES, DEV, settings, config=config, **options, **places)


@pytest.mark.parametrize(("method", "peft"), [("rloo", False), ("rloo", True), ("grpo", False)])
def test_it_learns_what_the_reward_wants(tmp_path, policy, method, peft):
    settings = {"num_train_epochs": 8, "use_peft": peft, "lora_r": 4, "learning_rate": 3e-2 if peft else 1e-2}
    log = _train(method, policy, tmp_path, **settings)
    assert log["steps"] == 24 == len(log["losses"]) and np.isfinite(log["losses"]).all() and (log["rows"], log["left_out"]) == (6, 0)
    rewards, kl = log["logged"]["reward"], log["logged"]["kl"]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.5 and kl[0] == pytest.approx(0, abs=1e-3) and kl[-1] > 0.01
    assert len(log["logged"]["completions/mean_length"]) == 24 and log["dev_nll"]["aligned"] != log["dev_nll"]["start"]
    before, after = load_policy(str(policy)), load_policy(str(tmp_path / "aligned"))
    assert after.tokenizer.pad_token == before.tokenizer.pad_token and not list((tmp_path / "aligned").glob("adapter*"))


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_every_sampling_field_and_the_kl_reach_trl(tmp_path, method):
    sampling = SamplingSettings(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=11)
    config = on_policy_config(method, OnPolicySettings(beta=0.3, num_generations=4), sampling)
    found = training.training_arguments(TrainerSettings(), tmp_path, seed=0, bf16=False, report_to="none", config=config)
    assert (found.temperature, found.top_p, found.top_k, found.max_completion_length) == (0.7, 0.9, 5, 11)
    assert (found.beta, found.num_generations, found.steps_per_generation, found.disable_dropout) == (0.3, 4, 1, True)


def test_no_prompt_that_trl_can_read_is_an_error(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(rloo, "readable", lambda *_: {})
    with pytest.raises(DataError, match="TRL reads none of the train prompts"):
        _train("rloo", policy, tmp_path)


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_training_goes_on_and_ends_the_same(tmp_path, policy, monkeypatch):
    """Six steps, killed in the fifth and taken up after the third: the same prompts and the same answers follow."""

    class Dying(training.Progress):
        def advance(self, n=1, note=""):
            super().advance(n, note)
            if self.done == 5 and n:
                raise Killed

    saving = {"num_train_epochs": 4, "max_steps": 6, "trainer": {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}}
    whole = _train("grpo", policy, tmp_path / "whole", **saving)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Dying)
        with pytest.raises(Killed):
            _train("grpo", policy, tmp_path / "cut", **saving)
    assert (tmp_path / "cut/checkpoints/checkpoint-3").is_dir()
    assert _train("grpo", policy, tmp_path / "cut", **saving) == whole and math.isfinite(whole["loss"])
    weights = [(tmp_path / name / "aligned/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_our_sampler_draws_where_it_knows_the_law(tmp_path, policy, monkeypatch, method):
    """Nearly greedy answers are those of `generate`, in training mode and out of it; a field of TRL's own leaves drawing to TRL."""
    asked = []
    theirs = rloo.drawing_here

    def recorded(kind, pairs):
        class Recorded(theirs(kind, pairs)):
            def _generate_single_turn(self, prompt_ids, *rest, **more):
                found = super()._generate_single_turn(prompt_ids, *rest, **more)
                asked.append((self.drawing.ours, found[0] if method == "grpo" else found))
                assert self.model.training
                return found

        return Recorded

    monkeypatch.setattr(rloo, "drawing_here", recorded)
    greedy = SamplingSettings(max_new_tokens=12, temperature=1e-4)
    config = on_policy_config(method, OnPolicySettings(num_generations=4), greedy)
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": Cats, "length_penalty": 0.0, "config": config}
    for name, more in (("ours", {}), ("theirs", {"repetition_penalty": 1.0})):
        settings = TrainerSettings(max_steps=1, per_device_train_batch_size=8, trainer={"logging_steps": 1, **more})
        places = {"folder": tmp_path / name, "checkpoints": tmp_path / f"{name}-checkpoints"}
        train_on_policy(policy, SAMPLES, DEV, settings, **options, **places)
    (by_us, own), (by_them, other) = asked
    assert (by_us, by_them) == (True, False) and own == other and len(own) == 8 and len({tuple(ids) for ids in own}) == 2


@pytest.mark.parametrize(("method", "trainer"), [("rloo", {}), ("grpo", {}), ("grpo", {"repetition_penalty": 1.0})])
def test_an_answer_ends_at_a_stop_string_for_the_reward_and_for_the_policy(tmp_path, policy, monkeypatch, method, trainer):
    """By our sampler and by TRL's: what is learned has the token that completes the string and none after it, what is scored has neither."""
    cats = []
    monkeypatch.setattr(rloo, "reward_function", lambda *a: lambda completion_ids, **_: cats.append(completion_ids) or [0.0] * 8)
    stop, sampling = "a", SamplingSettings(max_new_tokens=12, stop=["a"])
    config = on_policy_config(method, OnPolicySettings(num_generations=4), sampling)
    settings = TrainerSettings(max_steps=2, per_device_train_batch_size=8, trainer={"logging_steps": 1, **trainer})
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": Cats, "length_penalty": 0.0, "config": config}
    places = {"folder": tmp_path / "aligned", "checkpoints": tmp_path / "checkpoints"}
    log = train_on_policy(policy, SAMPLES, DEV, settings, stop=[stop], **options, **places)
    form = Format(load_policy(str(policy)).tokenizer, "none")
    drawing, answers = Drawing(sampling, form, {2}, 0, 64, ours=True), [ids for step in cats for ids in step]
    prompt = form.prompt_ids(PROMPTS[0].content)
    whole = [form.decode_completion(prompt, ids) for ids in answers]
    assert any(stop in text for text in whole) and all(stop not in form.decode_completion(prompt, ids[:-1]) for ids in answers)
    for ids, text in zip(answers, whole, strict=True):
        seen, done, used = drawing.used(prompt, ids)
        assert stop not in seen and text.startswith(seen) and used == len(ids) and done == (stop in text or ids[-1] == 2)
    assert log["drawn"] == sum(map(len, answers))


def test_training_stops_where_answers_grow(tmp_path, policy):
    """pi_SFT's answers have 4 tokens; the reward pays for length, so the answers of a step come to more than twice as many."""

    class Long(Cats):
        def score(self, prompts, completions):
            return np.array([float(len(text)) for text in completions])

    config = on_policy_config("grpo", OnPolicySettings(num_generations=4, beta=0.0), SamplingSettings(max_new_tokens=12))
    settings = TrainerSettings(learning_rate=3e-2, num_train_epochs=20, per_device_train_batch_size=8, trainer={"logging_steps": 1})
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": Long, "length_penalty": 0.0, "config": config}

    def train(name, longest):
        places = {"folder": tmp_path / name, "checkpoints": tmp_path / f"{name}-checkpoints"}
        return train_on_policy(policy, SAMPLES, DEV, settings, longest=longest, **options, **places)

    free, held = train("free", None), train("held", 2.0)
    assert free["steps"] == 60 and free["stopped"] is None and np.mean(free["logged"]["completions/mean_length"][-3:]) > 8
    lengths = held["logged"]["completions/mean_length"]
    assert 8 <= held["steps"] < 60 and f"after {held['steps']} of 60 steps" in held["stopped"]  # two prompts a step, and 16 are asked for
    assert np.mean(lengths[-8:]) > 8 and lengths == free["logged"]["completions/mean_length"][: len(lengths)]


def test_a_training_that_is_killed_after_it_stopped_stops_there_again(tmp_path, policy, monkeypatch):
    class Long(Cats):
        def score(self, prompts, completions):
            return np.array([float(len(text)) for text in completions])

    config = on_policy_config("grpo", OnPolicySettings(num_generations=4, beta=0.0), SamplingSettings(max_new_tokens=12))
    own = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = TrainerSettings(learning_rate=3e-2, num_train_epochs=20, per_device_train_batch_size=8, trainer=own)
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": Long, "length_penalty": 0.0, "config": config}

    def train():
        places = {"folder": tmp_path / "aligned", "checkpoints": tmp_path / "checkpoints"}
        return train_on_policy(policy, SAMPLES, DEV, settings, longest=2.0, **options, **places)

    first = train()
    assert first["stopped"] and not (tmp_path / f"checkpoints/checkpoint-{first['steps']}").exists()
    assert train() == first


def test_answers_have_grown_where_they_are_shown_to():
    """16 prompts of 10 usual tokens: of 20 each, d = 5 beyond 1.5 times; of 10 and 30 by turns the same mean with a standard error of 2.6."""
    drawn, spread = (Drawn(Path("nowhere"), SimpleNamespace(gather=lambda x: x, is_main_process=False, device="cpu"), 1.5) for _ in "ab")
    usual, index = np.full(16, 10.0), np.arange(16) // 2
    for step in range(2):  # eight prompts a step, two answers each
        assert drawn.ratio(step) is None
        drawn.note(step, np.full(16, 20), usual, index + 8 * step)
        spread.note(step, np.repeat([10, 30], 8).reshape(2, 4, 2).swapaxes(0, 1).ravel(), usual, index + 8 * step)
    assert drawn.ratio(2) == 2.0 and drawn.tokens == 640 and spread.ratio(2) is None and drawn.ratio(1) is None
    drawn.note(1, np.full(16, 20), usual, index)  # once more within the step, as with steps_per_generation=1
    assert drawn.tokens == 640 + 320 and drawn.steps["1"][2] == 16
    again = Drawn(Path("nowhere"), drawn.accelerator, 1.5)
    again.steps = dict(drawn.steps)
    again.note(1, np.full(16, 20), usual, index)  # a training that is resumed comes to the step anew
    assert again.tokens == 640
    assert spread.steps["0"] == [320.0, 160.0, 8.0, 40.0, 4 * 5.0**2 + 4 * 15.0**2]


def test_prompts_fill_a_step_of_all_processes():
    """Two rows in each of eight processes are two prompts of eight answers; in one they are a quarter of one."""
    settings = OptimiseSettings(method="rloo", per_device_train_batch_size=2)
    for count in (8, 1):
        recipe = Recipe(world="dialogue", optimise=settings, processes={"num_processes": count})
        if count == 8:
            check_method(recipe)
        else:
            with pytest.raises(ConfigError, match="a step of 2 answers is no whole number of groups of 8"):
                check_method(recipe)


@pytest.mark.parametrize(
    ("trainer", "dense", "where"),
    [({"mask_truncated_completions": True}, "none", "mask_truncated_completions"), ({}, "log-ratio", "on_policy.dense")],
)
def test_what_goes_with_no_stop_string_is_refused(trainer, dense, where):
    settings = OptimiseSettings(method="grpo", trainer=trainer, on_policy={"dense": dense})
    own_config(settings, SamplingSettings())
    with pytest.raises(ConfigError, match=where):
        own_config(settings, SamplingSettings(stop=["\n"]))

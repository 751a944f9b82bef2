"""Dense rewards: advantages of tokens by hand, GRPO's own where nothing is paid before the end, the two rewards of tokens, and rounds of them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import small_recipe, witnesses
from tiny import make_tiny_policy

from irlign.config import load_recipe
from irlign.data.chat import Encoded, Format
from irlign.data.splits import stored_demonstrations
from irlign.errors import ConfigError, ModelError
from irlign.files import read_json
from irlign.optimise import dense
from irlign.optimise.dense import Dense, LogitsOfTokens, LogRatioOfTokens, dense_of, paid_before, token_advantages
from irlign.optimise.methods import METHODS, source_of
from irlign.optimise.rloo import OnPolicySettings, on_policy_config, train_on_policy
from irlign.optimise.settings import REWARDED, OptimiseSettings
from irlign.optimise.work import Work
from irlign.pipeline import run_stage
from irlign.policy.load import has_token_head, load_policy
from irlign.preflight import check_method
from irlign.recipe import Recipe
from irlign.records import Contrast, Demonstration, Prompt, Sample
from irlign.reward.log_ratio import LogRatio
from irlign.reward.tokens import TokenDiscriminator, token_loss, train_tokens
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.training import TrainerSettings

PROMPTS = [Prompt.of(f"the {colour} {animal}", "train") for colour in ("red", "blue") for animal in ("cat", "dog", "bird")]
SAMPLES = [Sample(p, i, text, "eos", 4, -1.0) for p in PROMPTS for i, text in enumerate((" sat on.", " cat now!"))]
DEV = [Demonstration(Prompt.of("a red cat", "dev"), " sat on the mat.")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def test_what_was_paid_before_each_token():
    found = paid_before([np.array([1.0, 2.0, 4.0]), np.array([5.0])], 4)
    assert found.tolist() == [[0.0, 1.0, 3.0, 7.0], [0.0, 5.0, 5.0, 5.0]]


def test_advantages_of_tokens_by_hand():
    """Two answers of 3 and 1 to one prompt, the second a token long; of the first 1 is paid at the second token and 2 at the third, so 3, 3, 2
    and 1, 0, 0 are still to come. The other prompt's are paid as a whole, which is GRPO."""
    reward, before = torch.tensor([3.0, 1.0, 5.0, 2.0]), torch.zeros(4, 3)
    before[:2] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    found = token_advantages(reward, before, 2)
    assert found.tolist() == [[1.0, 1.5, 1.0], [-1.0, -1.5, -1.0], [1.5] * 3, [-1.5] * 3]


class Cats:
    """Pays 1 for each cat, where it stands, or for an answer's number of them."""

    name = "cats"

    def __init__(self, policy):
        tokenizer = load_policy(str(policy)).tokenizer
        self.cat = tokenizer.convert_tokens_to_ids("▁cat")
        assert self.cat != tokenizer.unk_token_id

    def __call__(self, rows):
        return [np.array([float(i == self.cat) for i in row.completion_ids]) for row in rows]

    def score(self, prompts, completions):
        return np.array([float(text.count("cat")) for text in completions])


class Raw(Dense):
    """As it is, in no unit."""

    def in_units(self, form, samples, objective, ends=()):
        return lambda prompts, answers: self.reward([Encoded(p, list(a)) for p, a in zip(prompts, answers, strict=True)])


def _train(policy, folder, dense, reward=None, **settings):
    pytest.importorskip("trl")
    config = on_policy_config("grpo", OnPolicySettings(num_generations=4, dense="log-ratio"), SamplingSettings(max_new_tokens=12))
    defaults = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 8, "trainer": {"logging_steps": 1}}
    places = {"folder": folder / "aligned", "checkpoints": folder / "checkpoints"}
    options = {"chat_template": "none", "seed": 0, "report_to": "none", "reward": reward and (lambda: reward), "length_penalty": 0.0}
    options |= {"dense": dense, "learned": dense and dense.learned}
    return train_on_policy(policy, SAMPLES, DEV, TrainerSettings(**{**defaults, **settings}), config=config, **options, **places)


def test_without_a_pay_for_tokens_it_is_grpo(tmp_path, policy):
    """The reward of the whole alone, once through TRL's advantages and once through ours: the same training."""
    ours = _train(policy, tmp_path / "dense", Raw(lambda rows: [np.zeros(len(row.completion_ids)) for row in rows], 0.0, {}), Cats(policy))
    theirs = _train(policy, tmp_path / "whole", None, Cats(policy))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5) and any(abs(loss) > 1e-4 for loss in theirs["losses"])
    assert ours["logged"]["reward"] == pytest.approx(theirs["logged"]["reward"]) and ours["drawn"] == theirs["drawn"]


def test_it_learns_what_the_tokens_are_paid_for(tmp_path, policy):
    log = _train(policy, tmp_path, Raw(Cats(policy), 1.0, {"tokens": 100}), num_train_epochs=8)
    rewards = log["logged"]["reward"]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.5 and np.isfinite(log["losses"]).all()
    assert log["discriminator"] == {"tokens": 100} and log["tokens"] > log["drawn"] + 100


def _rows(policy, samples=SAMPLES):
    form = Format(load_policy(str(policy)).tokenizer, "none")
    return form, form.encode([s.prompt.content for s in samples], [s.completion for s in samples])


def test_the_log_ratio_of_the_tokens_sums_to_that_of_the_answer(tmp_path, policy):
    other = make_tiny_policy(tmp_path / "other", seed=1)
    _, rows = _rows(policy)
    tokens = LogRatioOfTokens(policy, other)(rows)
    whole = LogRatio(policy, other, "none").score([s.prompt.content for s in SAMPLES], [s.completion for s in SAMPLES])
    assert [len(own) for own in tokens] == [len(row.completion_ids) for row in rows]
    assert [of.sum() for of in tokens] == pytest.approx(whole, abs=1e-4) and np.abs(whole).max() > 0.01


def test_policies_of_other_tokens_have_no_log_ratio(tmp_path, policy):
    other = make_tiny_policy(tmp_path / "other")
    names = json.loads((other / "tokenizer.json").read_text())
    words = names["model"]["vocab"]
    if isinstance(words, dict):
        words["▁cat"], words["▁dog"] = words["▁dog"], words["▁cat"]
    else:
        cat, dog = (next(i for i, (word, _) in enumerate(words) if word == name) for name in ("▁cat", "▁dog"))
        words[cat], words[dog] = words[dog], words[cat]
    (other / "tokenizer.json").write_text(json.dumps(names))
    with pytest.raises(ModelError, match="do not read the same tokens"):
        LogRatioOfTokens(policy, other)(_rows(policy)[1])


def test_the_unit_is_a_spread_of_the_sft_answers_and_a_share_of_it(tmp_path, policy):
    form, rows = _rows(policy)
    cut = [Sample(s.prompt, s.index, s.completion, "length", s.tokens, s.logprob) for s in SAMPLES]
    for samples, ends in ((SAMPLES, 0), (cut, 1)):
        pay = Dense(Cats(policy), 0.25, {}).in_units(form, samples, "reverse-kl")
        paid = pay([row.prompt_ids for row in rows], [row.completion_ids[: len(row.completion_ids) - ends] for row in rows])
        assert np.concatenate(paid).mean() == pytest.approx(0, abs=1e-12)
        assert np.std([own.sum() for own in paid]) == pytest.approx(0.25)


def test_ending_costs_nothing_and_gains_nothing_where_it_is_not_paid(policy):
    """Tokens worth 3 to 6 and an end worth 100: without it the average token gets 0, and so does the end; a cut answer has none."""
    form, rows = _rows(policy)
    worth = [np.where(np.arange(len(r.completion_ids)) % 2, 5.0, 3.0) + i % 2 for i, r in enumerate(rows)]
    for own in worth:
        own[-1] = 100.0
    asked = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
    paid = Dense(lambda of: [own[: len(row.completion_ids)].copy() for row, own in zip(of, worth, strict=True)], 1.0, {}, ends=False)
    units = paid.in_units(form, SAMPLES, "reverse-kl")
    whole, cut = units(*asked), units(asked[0], [ids[:-1] for ids in asked[1]])
    assert all(own[-1] == 0 for own in whole) and np.concatenate([own[:-1] for own in whole]).mean() == pytest.approx(0, abs=1e-12)
    assert all(np.allclose(own[:-1], other) for own, other in zip(whole, cut, strict=True)) and np.std(
        [own.sum() for own in whole]
    ) == pytest.approx(1)
    assert (
        dense_of(
            SimpleNamespace(
                settings=SimpleNamespace(on_policy=OnPolicySettings(dense="log-ratio")), run=SimpleNamespace(path=lambda *_: policy)
            ),
            1,
        ).ends
        is False
    )


def test_what_the_objective_makes_of_a_token(policy):
    """Logits of 0, 1 and 3 by turns: softplus and -h e^h of them, less their mean, over the spread of the answers' sums."""
    form, rows = _rows(policy)
    asked = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
    logits = [np.resize([0.0, 1.0, 3.0], len(row.completion_ids) + i)[i:] for i, row in enumerate(rows)]
    for name, by_hand in (("gail", [0.693147, 1.313262, 3.048587]), ("fairl", [0.0, -2.718282, -60.256611])):
        wanted = [np.resize(by_hand, len(own) + i)[i:] for i, own in enumerate(logits)]
        center = np.concatenate(wanted).mean()
        spread = np.std([(own - center).sum() for own in wanted])
        paid = Dense(lambda of: logits, 0.5, {}).in_units(form, SAMPLES, name)(*asked)
        assert np.concatenate(paid) == pytest.approx(np.concatenate([0.5 * (own - center) / spread for own in wanted]), rel=1e-5)


def test_a_pay_that_is_not_finite_is_an_error(policy):
    form, _ = _rows(policy)
    with pytest.raises(ModelError, match="not finite"):
        Dense(lambda rows: [np.full(len(row.completion_ids), np.nan) for row in rows], 1.0, {}).in_units(form, SAMPLES, "reverse-kl")


def test_the_loss_of_tokens_by_hand():
    class Outputs:
        logits = torch.tensor([[[9.0], [1.0], [-2.0]], [[9.0], [0.5], [9.0]]])

    labels = torch.tensor([[-100.0, 1.0, 1.0], [-100.0, 0.0, -100.0]])
    expected = np.log1p(np.exp(-1.0)) + np.log1p(np.exp(2.0)) + np.log1p(np.exp(0.5))
    assert token_loss(Outputs, labels).item() == pytest.approx(expected / 3, rel=1e-6)
    assert token_loss(Outputs, labels, 6).item() == pytest.approx(expected / 6, rel=1e-6)


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    """Better answers sit, worse ones bark; what comes after that is the same."""
    place = tmp_path_factory.mktemp("tokens")
    pairs = [Contrast(p, f" sat on the {end}.", f" ran on the {end}.") for p in PROMPTS for end in ("mat", "cat")]
    settings = TrainerSettings(learning_rate=1e-2, num_train_epochs=20, per_device_train_batch_size=8)
    about = {"chat_template": "none", "seed": 0, "report_to": "none", "checkpoints": place / "checkpoints"}
    return place / "d", train_tokens(policy, pairs, pairs, settings, folder=place / "d", **about), pairs


def test_a_discriminator_finds_the_token(trained):
    """The step that tells the sides apart has the logit, and a fold of the labels is what could have been by chance: the first token tells all
    pairs, which of 12 pairs chance does once in 4,096."""
    folder, log, pairs = trained
    own = TokenDiscriminator.load(folder, "none")
    prompts = [pair.prompt.content for pair in pairs]
    better, worse = (own.logits(own.format.encode(prompts, [getattr(pair, side) for pair in pairs])) for side in ("better", "worse"))
    assert all(b[0] > w[0] + 1 for b, w in zip(better, worse, strict=True)) and log["dev"]["pairs"] == 1.0
    assert log["losses"][-1] < 0.6 and log["tokens"] == 20 * sum(
        len(r) for r in own.format.encode(prompts * 2, [p.better for p in pairs] * 2)
    )


def test_neither_the_batch_nor_a_shared_prompt_changes_a_logit(trained):
    folder, _, pairs = trained
    own = TokenDiscriminator.load(folder, "none")
    rows = own.format.encode([p.prompt.content for p in pairs] * 2, [p.better for p in pairs] + [p.worse + " now." for p in pairs])
    together = own.logits(rows)
    for row, of in zip(rows, together, strict=True):
        assert len(of) == len(row.completion_ids) and of == pytest.approx(own.logits([row])[0], abs=1e-5)


def test_a_discriminator_is_kept_once_it_is_there(trained, tmp_path):
    folder, log, _ = trained
    shutil.copytree(folder, tmp_path / "rounds/1/discriminator")
    settings = OptimiseSettings(method="grpo", on_policy={"dense": "discriminator", "dense_share": 0.5})
    found = dense_of(Work(SimpleNamespace(path=tmp_path.joinpath), settings, None, "r", "none", tmp_path), 1)
    assert found == Dense(LogitsOfTokens(tmp_path / "rounds/1/discriminator", "none"), 0.5, log)


def test_only_grpo_pays_tokens():
    with pytest.raises(ValueError, match="rloo pays whole answers"):
        OptimiseSettings(method="rloo", on_policy={"dense": "log-ratio"})
    own = {"dense": "log-ratio", "dense_share": 0.5}
    for share, rewarded in ((0.5, True), (1.0, False)):
        settings = OptimiseSettings(method="grpo", on_policy={**own, "dense_share": share})
        assert ("{reward}" in source_of(settings)) == settings.rewarded == rewarded
    again = {"method": "grpo", "rounds": 2, "refresh": "current-demo"}
    with pytest.raises(ValueError, match="none to refresh"):
        OptimiseSettings(**again, on_policy={"dense": "log-ratio"})
    for own in ({"dense": "discriminator"}, {"dense": "log-ratio", "dense_share": 0.9}):
        OptimiseSettings(**again, on_policy=own)
    with pytest.raises(ValueError, match="only go on under the same reward"):
        OptimiseSettings(method="grpo", rounds=2, on_policy={"dense": "discriminator"})


def test_a_method_has_the_reward_in_its_words_where_it_has_a_part():
    assert all(("{reward}" in method.source) == (name in REWARDED) for name, method in METHODS.items())


def test_a_manifest_names_what_has_a_part():
    own = OptimiseSettings().identity
    assert not {"preference", "on_policy", "discriminator"} & own.keys() and (own["winners"], own["keep_checkpoints"]) == (1, [])
    asked = OptimiseSettings(method="grpo", on_policy={"dense": "log-ratio"})
    whole = {**asked.model_dump(), "keep_checkpoints": [0.5]}
    assert asked.identity == {
        key: value for key, value in whole.items() if key not in ("answers", "winners", "preference", "discriminator", "replay")
    }
    assert OptimiseSettings(method="rloo", keep_checkpoints=[]).identity["on_policy"]["max_length_ratio"] == 1.5


def test_an_objective_of_tokens_asks_nothing_of_the_whole_reward(tmp_path):
    own = {"objective": "gail", "dense": "discriminator"}
    load_recipe(Recipe, small_recipe(tmp_path, optimise={"method": "grpo", "on_policy": own}))
    with pytest.raises(ConfigError, match="is a function of the logit"):
        load_recipe(Recipe, small_recipe(tmp_path, optimise={"method": "grpo", "on_policy": {**own, "dense_share": 0.9}}))


@pytest.mark.parametrize(("kind", "share", "rounds"), [("log-ratio", 1.0, 1), ("log-ratio", 0.5, 2), ("discriminator", 1.0, 2)])
def test_rounds_of_a_real_run(copied, monkeypatch, kind, share, rounds):
    """Each round is paid by tokens; the second discriminator learns from the sides that a reward is refreshed on, and none is where none is asked."""
    pytest.importorskip("trl")
    witnesses(monkeypatch, np.arange(50.0, 500.0, 50.0))
    seen = []
    train = dense.train_tokens
    monkeypatch.setattr(dense, "train_tokens", lambda start, pairs, *a, **k: seen.append((start, pairs)) or train(start, pairs, *a, **k))
    own = {"method": "grpo", "rounds": rounds, "max_steps": 2, "discriminator": {"max_steps": 3}}
    own |= {"on_policy": {"dense": kind, "dense_share": share}, "refresh": "current-demo" if rounds > 1 else "none"}
    run_stage("optimise", small_recipe(copied, optimise=own))
    choice = read_json(copied / "optimise/choice.json")
    training = [choice["candidates"][f"round-{n}"]["training"] for n in range(1, rounds + 1)]
    assert all(of["steps"] == 2 and np.isfinite(of["losses"]).all() for of in training)
    assert [("discriminator" in of) == (kind == "discriminator") and "reward" not in of for of in training[:1]] == [True]
    assert (choice["reward"] is None) == (share == 1) and choice["published"] == f"round-{rounds}"
    card = (copied / "policies/aligned/README.md").read_text()
    assert "each token paid" in card and ("the reward `" in card) == (share < 1)
    if rounds > 1:
        assert ("reward" in training[1]) == (share < 1) == (copied / "optimise/rounds/2").exists()
    if kind == "discriminator":
        recipe = load_recipe(Recipe, small_recipe(copied))
        with Run.open(copied, recipe) as run:
            shown = {d.completion.rstrip() for d in stored_demonstrations(run, "train")}
        first, second = ({pair.better for pair in pairs} for _, pairs in seen)
        assert all(any(text.startswith(cut) for text in shown) for cut in second) and not all(
            any(t.startswith(c) for t in shown) for c in first
        )
        assert [start for start, _ in seen] == [copied / "policies/sft"] * 2


def test_a_model_without_a_token_head_is_found_out_before_any_compute(tmp_path, policy):
    from transformers import OPTConfig

    assert has_token_head(str(policy))
    OPTConfig().save_pretrained(tmp_path)
    own = {"method": "grpo", "on_policy": {"dense": "discriminator"}}
    recipe = Recipe(model_name_or_path=str(tmp_path), dataset_name="rows.jsonl", output_dir=str(tmp_path / "run"), optimise=own)
    with pytest.raises(ConfigError, match="no token classifier for models of this type"):
        check_method(recipe)

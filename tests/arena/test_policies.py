"""Policies in the arena: the pipeline's own stages in a cell, shares by hand, hours said beforehand."""

import json

import numpy as np
import pytest
from small import witnesses
from test_leaderboard import TINY, cell_of

from irlign.arena import hours
from irlign.arena.cell import Place
from irlign.arena.leaderboard import Measured, measure, rows_named, table
from irlign.arena.methods import CHOSEN
from irlign.arena.page import policy_cells
from irlign.arena.policies import SETTINGS, read_for, with_method
from irlign.arena.studies import STUDIES
from irlign.costs import Speed
from irlign.data.chat import Format
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, write_json
from irlign.policy.load import load_tokenizer
from irlign.reward.load import load_reward
from irlign.runs import Run
from irlign.sampling.pools import stored_samples


def test_a_row_is_what_the_pipeline_publishes(tmp_path, monkeypatch):
    """What weighs candidates are stand-ins: distill's is taken and weighted-sft's refused."""
    witnesses(monkeypatch, [90.0, -90.0])
    monkeypatch.setattr("irlign.worlds.dialogue.DialogueWorld.golden", staticmethod(lambda prompts, texts: [float(len(t)) for t in texts]))
    place = Place(str(tmp_path), TINY, 0)
    rows = ["initial policy", "SFT", CHOSEN, "policy: distill", "policy: weighted-sft"]
    found = measure(place, rows)
    distill, weighted = found.methods["policy: distill"], found.methods["policy: weighted-sft"]
    assert (distill.kept, weighted.kept) == (False, True) and np.array_equal(weighted.chosen_P, found.methods["SFT"].chosen_P)
    assert distill.curve_P_n.shape == (8, 1) and not np.array_equal(distill.chosen_P, found.methods["SFT"].chosen_P)

    run = Run.read(place.folder)
    card = run.path("policies/distill/README.md").read_text()
    assert "# distill: a policy that needs no reward" in card and "`optimise-distill/choice.json` of its run" in card
    chosen = read_json(run.path("best_of_n/choice.json"))
    assert found.methods[CHOSEN].n == chosen["n"]
    choice = read_json(run.path("optimise-distill/choice.json"))
    one = choice["candidates"]["round-1"]
    winners = one["training"]["rows"]
    assert winners <= 24 and one["training"]["steps"] == 8 * -(-winners // 16)
    pool = [s for s in stored_samples(run, "distill", "dev", "test")]
    assert len(pool) == (20 + 8) * 4 and one["drawn"] > 24 * 32 * 3 + sum(s.tokens for s in pool if s.prompt.split == "dev")
    assert distill.memory > 0 and distill.tokens > weighted.tokens and distill.learned > run.stages["reward-init-sft"]["notes"]["tokens"]

    def tokens(split, *names):
        return sum(s.tokens for name in names for s in stored_samples(run, name, split))

    own = read_json(run.path("optimise-weighted-sft/choice.json"))["candidates"]["round-1"]["drawn"]
    held_out = tokens("dev", "init", "sft")  # the judge's; of each test prompt's 4 answers one is counted
    assert weighted.tokens == pytest.approx(tokens("test", "weighted-sft") / 4 + own + held_out)
    assert distill.tokens == pytest.approx(tokens("test", "distill") / 4 + one["drawn"] + held_out + tokens("train", "init", "sft"))

    shown = stored_demonstrations(run, "train")
    form = Format(load_tokenizer(str(run.path("policies/sft"))), place.recipe().data.chat_template)
    once = sum(map(len, form.encode([d.prompt.content for d in shown], [d.completion for d in shown])))
    assert weighted.learned == 2 * 4 * once  # SFT and the same again with weights, four passes each; no reward

    before = json.loads((place.folder / "manifest.json").read_text())
    again = measure(place, rows)  # nothing is judged anew: the stand-in has no more to say
    assert json.loads((place.folder / "manifest.json").read_text()) == before
    assert np.array_equal(again.methods["policy: distill"].curve_P_n, distill.curve_P_n)


def test_shares_of_what_best_of_16_gains():
    """Best-of-n by the chosen reward gains 1 at the end of its curve; the policy 0.5 and -0.1."""
    cells = []
    for seed, (gain, kept) in enumerate([(0.5, False), (-0.1, True)]):
        cell = cell_of(0.2, seed)
        one = np.ones(40)
        policy = Measured("aligned", 1, one + gain, one[:, None] + gain, 5e3, 3.0, 100.0, learned=2000 + seed * 2000, kept=kept)
        methods = {"SFT": cell.methods["SFT"], CHOSEN: cell.methods["it"], "policy: distill": policy}
        cells.append(type(cell)(cell.setting, seed, cell.n, cell.demonstrations_P, cell.oracle_P, cell.kl, methods))
    row = table(cells)[-1]
    assert row["of_best"]["mean"] == pytest.approx((0.5 - 0.1) / (1 + 1)) and row["kept"] == 1 and row["learned"]["mean"] == 3000
    words = policy_cells(row)
    assert words[3].startswith("20% [") and words[-4:] == ["1 of 2 (Holm 1)", "1 of 2", "5 k", "3 k"]
    assert table([cell_of(0.2, 0)])[1]["of_best"] is None  # the chosen reward is not among the rows


def test_rows_and_settings():
    assert rows_named("policy: d*") == [
        "initial policy",
        "SFT",
        *(f"policy: {m}" for m in ("distill", "dpo", "ditto", "distill-fewer", "distill-rounds")),
    ]
    assert len(rows_named(STUDIES["policies"].rows)) == 4 + len(SETTINGS)
    assert not any(name.startswith("policy: ") for name in rows_named(None))


def _settings(row, **own):
    return with_method(Place("x", (*TINY, *((f"optimise.{key}", value) for key, value in own.items())), 0).recipe(), row).optimise


def test_what_a_recipe_sets_is_its_own_methods():
    """The recipe's method is distill, and has rounds; rloo beside it has its own learning rate, one round, and the recipe's adapter."""
    given = {"learning_rate": 5e-3, "rounds": 3, "refresh": "init-current", "use_peft": True, "lora_r": 4, "generations": 2}
    distill, rloo, dpo = (_settings(row, **given) for row in ("distill", "rloo", "dpo"))
    assert (distill.learning_rate, distill.rounds, distill.refresh, distill.answers) == (5e-3, 3, "init-current", 32)
    assert (rloo.method, rloo.learning_rate, rloo.rounds, rloo.refresh) == ("rloo", 1e-3, 1, "none") and dpo.learning_rate == 1e-4
    assert all((of.use_peft, of.lora_r, of.generations) == (True, 4, 2) for of in (distill, rloo, dpo))
    held = {"method": "grpo", "on_policy": {"beta": 0.2}, "learning_rate": 2e-4}
    grpo, tokens, rlsr = (_settings(row, **held) for row in ("grpo", "grpo-tokens", "rlsr"))
    assert (grpo.on_policy.beta, grpo.on_policy.dense, grpo.learning_rate) == (0.2, "none", 2e-4)
    assert (tokens.on_policy.beta, tokens.on_policy.dense, tokens.learning_rate) == (0.2, "discriminator", 2e-4)
    assert (rlsr.on_policy.beta, rlsr.learning_rate) == (0.05, 3e-4)


def test_a_row_with_fewer_tokens_is_its_method_with_fewer_answers_and_passes():
    assert _settings("distill-fewer") == _settings("distill").model_copy(update={"answers": None, "num_train_epochs": 2})


def test_rows_of_rounds_are_their_method_with_a_refreshed_reward():
    for row in ("distill-rounds", "rloo-rounds"):
        method = row.removesuffix("-rounds")
        assert _settings(row) == _settings(method).model_copy(update={"rounds": 2, "refresh": "current-demo"})
    assert _settings("distill-rounds", num_train_epochs=1, rounds=4).num_train_epochs == 1
    assert _settings("distill-rounds", rounds=4).rounds == 2


def test_what_a_row_of_rounds_publishes(tmp_path, monkeypatch):
    """The reward of its second round lies below the row's own stage, and its tokens are among those trained on. What weighs candidates are stand-ins."""
    witnesses(monkeypatch, np.arange(50.0, 5000.0, 50.0))
    monkeypatch.setattr("irlign.worlds.dialogue.DialogueWorld.golden", staticmethod(lambda prompts, texts: [float(len(t)) for t in texts]))
    short = (("as", "rounds"), ("optimise.num_train_epochs", 1), ("optimise.answers", 2), ("reward.max_leak_accuracy", 1.0))
    place = Place(str(tmp_path), (*TINY, *short), 0)
    found = measure(place, ["initial policy", "SFT", "policy: distill-rounds"]).methods["policy: distill-rounds"]
    run = Run.read(place.folder)
    candidates = read_json(run.path("optimise-distill-rounds/choice.json"))["candidates"]
    one, two = (candidates[f"round-{n}"]["training"] for n in (1, 2))
    folder = run.path("optimise-distill-rounds/rounds/2/reward")
    again = read_json(folder / "current-demo/reward.json")["training"]["tokens"]
    assert again == two["reward"]["tokens"] > 0 and two["tokens"] > again and load_reward(folder / two["reward"]["name"]) is not None
    before = sum(run.stages[stage]["notes"]["tokens"] for stage in ("sft", "reward-init-sft"))
    assert found.learned == before + one["tokens"] + two["tokens"]
    assert len(stored_samples(run, "distill-rounds", "test")) == 8 * 4 and not found.kept


@pytest.mark.parametrize(
    ("row", "policies"),
    [
        *((row, {"init", "sft"}) for row in ("distill", "dpo", "rloo", "grpo-tokens", "distill-rounds")),
        *((row, {"sft"}) for row in ("kto", "gsil", "spin", "ditto", "rlsr", "gad", "grpo-log-ratio")),
        ("weighted-sft", set()),
    ],
)
def test_whose_answers_to_train_prompts_a_row_is_charged(row, policies):
    assert {*read_for(_settings(row))} == policies


def test_hours_are_those_of_finished_cells_or_of_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("irlign.plan.measured_speed", lambda parameters: Speed(1e9, 1e9))
    places = [Place(str(tmp_path), TINY, seed) for seed in range(3)]
    planned = hours.expected_seconds(places[:1], ["policy: distill"])
    assert hours.expected_seconds(places, ["policy: distill"]) == pytest.approx(3 * planned) and planned > 0
    stages = ("pretrain", "sft", "sample", "reward-init-sft", "bon", "optimise-distill")
    done = {name: {"status": "complete", "seconds": 10.0 + i} for i, name in enumerate(stages)}
    write_json(places[0].folder / "manifest.json", {"stages": done})
    assert hours.expected_seconds(places, ["policy: distill"]) == 2 * sum(range(10, 16))
    del done["bon"]
    write_json(places[1].folder / "manifest.json", {"stages": done})
    assert hours.expected_seconds(places, ["policy: distill"]) == sum(range(10, 16)) + 14

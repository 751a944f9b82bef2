"""Policies in the arena: the pipeline's own stages in a cell, shares by hand, hours said beforehand."""

import json

import numpy as np
import pytest
from test_leaderboard import TINY, cell_of

from irlign.arena import hours
from irlign.arena.cell import Place
from irlign.arena.leaderboard import Measured, measure, rows_named, table
from irlign.arena.methods import CHOSEN
from irlign.arena.page import policy_cells
from irlign.arena.policies import SETTINGS, with_method
from irlign.arena.studies import STUDIES
from irlign.costs import Speed
from irlign.data.chat import Format
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, write_json
from irlign.optimise import align
from irlign.policy.load import load_tokenizer
from irlign.runs import Run
from irlign.sampling.pools import stored_samples


def test_a_row_is_what_the_pipeline_publishes(tmp_path, monkeypatch):
    """The judge of candidates alone is a stand-in: it takes distill's and refuses weighted-sft's."""
    logits = iter([90.0, -90.0])
    monkeypatch.setattr(align, "judge_pool", lambda policy, pool, *_, **__: (np.full(len(pool), next(logits)), None, 0.9))
    monkeypatch.setattr("irlign.worlds.dialogue.DialogueWorld.golden", staticmethod(lambda prompts, texts: [float(len(t)) for t in texts]))
    place = Place(str(tmp_path), TINY, 0)
    rows = ["initial policy", "SFT", CHOSEN, "policy: distill", "policy: weighted-sft"]
    found = measure(place, rows)
    distill, weighted = found.methods["policy: distill"], found.methods["policy: weighted-sft"]
    assert (distill.kept, weighted.kept) == (False, True) and np.array_equal(weighted.chosen_P, found.methods["SFT"].chosen_P)
    assert distill.curve_P_n.shape == (8, 1) and not np.array_equal(distill.chosen_P, found.methods["SFT"].chosen_P)

    run = Run.read(place.folder)
    chosen = read_json(run.path("best_of_n/choice.json"))
    assert found.methods[CHOSEN].n == chosen["n"]
    choice = read_json(run.path("optimise-distill/choice.json"))
    one = choice["candidates"]["round-1"]
    winners = one["training"]["rows"]
    assert winners <= 24 and one["training"]["steps"] == 8 * -(-winners // 16)
    pool = [s for s in stored_samples(run, "distill", "dev", "test")]
    assert len(pool) == (20 + 8) * 4 and one["drawn"] > 24 * 32 * 3 + sum(s.tokens for s in pool if s.prompt.split == "dev")
    assert distill.memory > 0 and distill.tokens > weighted.tokens and distill.learned > run.stages["reward-init-sft"]["notes"]["tokens"]

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
    assert rows_named("policy: d*") == ["initial policy", "SFT", "policy: distill", "policy: dpo", "policy: ditto"]
    assert len(rows_named(STUDIES["policies"].rows)) == 4 + len(SETTINGS)
    assert not any(name.startswith("policy: ") for name in rows_named(None))
    recipe = Place("x", (*TINY, ("optimise.learning_rate", 5e-3), ("optimise.rounds", 3)), 0).recipe()
    own = with_method(recipe, "rloo").optimise
    assert (own.method, own.learning_rate, own.rounds, own.num_train_epochs) == ("rloo", 5e-3, 1, SETTINGS["rloo"]["num_train_epochs"])


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

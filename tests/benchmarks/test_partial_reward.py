"""The benchmark of stopping answers early: who is dropped and what it costs, by hand, and the choice among settings."""

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.config import dump_recipe
from irlign.data.chat import Format
from irlign.files import write_json
from irlign.policy.likelihood import token_log_probs
from irlign.policy.load import load_policy
from irlign.recipe import as_recipe
from irlign.records import Prompt, Sample
from irlign.reward.load import load_reward
from irlign.reward.model import Classifier
from irlign.runs import Run

bench = pytest.importorskip("partial_reward")


@pytest.mark.parametrize(
    ("dropped", "tokens", "golden"),
    [
        (0.0, 2 + 6 + 8 + 10 + 4, 40),  # all are drawn to their end
        (0.5, 2 + 6 + 3 + 10 + 3, 40),  # two of the four that go on end after 3 tokens: rewards so far 1 and 2
        (0.75, 2 + 6 + 3 + 3 + 3, 10),  # the third too, which is the best in the end: what ended by itself is best now
        (0.7, 2 + 6 + 3 + 10 + 3, 40),  # 2.8 of four: two
    ],
)
def test_the_worse_of_those_that_go_on_are_dropped(dropped, tokens, golden):
    """Five answers; the first has ended by then, and is not dropped however low its reward so far."""
    parts, worth = np.array([0.0, 4, 1, 3, 2]), np.array([7.0, 6, 8, 9, 5])
    found = bench.pruned(parts, worth, np.array([10.0, 20, 30, 40, 50]), np.array([2.0, 6, 8, 10, 4]), 3, dropped)
    assert found == (tokens, golden)


def test_equal_tokens_by_hand():
    """30 and 20 tokens where an answer has 10 and 10: 2.5 answers each, half way between the second and the third of either curve."""
    curves = np.array([[1.0, 2, 4], [0.0, 1, 1]])
    n, more = bench.beyond(np.array([3.5, 0.0]), np.array([30.0, 20]), np.array([10.0, 10]), curves)
    assert n == 2.5 and more.tolist() == [0.5, -1]
    n, more = bench.beyond(np.array([4.0, 1.0]), np.array([30.0, 30]), np.array([10.0, 10]), curves)
    assert n == 3 and more.tolist() == [0, 0]


def _row(seen, dropped, more, n=8, **changes):
    return {"seen": seen, "dropped": dropped, "n": n, "equal_n": 1.5, "follows": 0.5, "golden_P": np.array([1.5, 2.5]), "curve_N": np.array([1.0, 3.0]), "more_P": np.array(more), **changes}  # fmt: skip


def test_settings_weigh_alike_in_the_choice():
    """One cell of a setting says 0.9 more for the second choice, three cells of another 0.5 each for the first: 0.5 over settings against 0.9."""
    many = [[_row(0.5, 0.5, [0.5, 0.5]), _row(0.25, 0.5, [0.0, 0.0])]] * 3
    one = [[_row(0.5, 0.5, [0.0, 0.0]), _row(0.25, 0.5, [0.8, 1.0])]]
    assert bench.choose_one({"a": many, "b": one}) == (0.25, 0.5) and bench.choose_one({"a": many}) == (0.5, 0.5)


def test_rows_over_cells_by_hand():
    """Golden 2 is what 1.5 whole answers give, and as many tokens were drawn in one cell, 1 answer's in the other: a sixth is saved."""
    (row,) = bench.summarise([[_row(0.5, 0.5, [0.25, 0.25])], [_row(0.5, 0.5, [0.25, 0.25], equal_n=1.0)]], setting="s")
    assert (row["setting"], row["cells"], row["golden"], row["equal_n"]) == ("s", 2, 2, 1.25) and row["saved"] == pytest.approx(1 / 6)
    assert row["more"]["mean"] == 0.25 and list(row["more"]["ci95"]) == [0.25, 0.25]


def test_cells_are_found_in_every_root_that_has_them(tmp_path):
    for place in ("one/a/seed-0", "one/a/seed-1", "two/a/seed-2", "two/b/seed-0"):
        (tmp_path / place / "scores").mkdir(parents=True)
        if place != "one/a/seed-1":  # not finished
            (tmp_path / place / "scores/judge.parquet").touch()
    roots = [tmp_path / "one", tmp_path / "two"]
    assert bench.finished(roots, "*", [0, 1, 2]) == {
        "a": [tmp_path / "one/a/seed-0", tmp_path / "two/a/seed-2"],
        "b": [tmp_path / "two/b/seed-0"],
    }
    assert bench.finished(roots, "b*", [1, 2]) == {}


def test_the_reward_of_a_part_is_that_of_its_tokens(tmp_path):
    """The likelihood of one token is the first token's; the learned reward of all but EOS is that of the whole answer, since EOS follows."""
    run_folder, recipe = tmp_path / "run", as_recipe({"world": {"name": "dialogue"}})
    policy = make_tiny_policy(run_folder / "policies/sft")
    reward = run_folder / "rewards/init-sft"
    Classifier.start(policy, recipe.data.chat_template, "init-sft").save(reward)
    write_json(reward / "reward.json", {"kind": "classifier", "name": "init-sft", "chat_template": recipe.data.chat_template})
    write_json(run_folder / "manifest.json", {"irlign": "0", "stages": {}})
    (run_folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    samples = [Sample(Prompt.of("the cat sat", "test"), i, text, "eos", 5, -1.0) for i, text in enumerate([" on the mat", " the mat sat"])]
    loaded = load_policy(str(policy))
    rows = Format(loaded.tokenizer, recipe.data.chat_template).encode(["the cat sat"] * 2, [s.completion for s in samples])
    each, whole = token_log_probs(loaded, rows), load_reward(reward).logits(rows)[:, 0]
    run, most = Run.read(run_folder), len(rows[0].completion_ids) - 1
    assert bench.rewards_of_parts(run, samples, 1, None) == pytest.approx([own[0] for own in each], abs=1e-5)
    assert bench.rewards_of_parts(run, samples, 99, None) == pytest.approx([own.mean() for own in each], abs=1e-5)
    found = bench.rewards_of_parts(run, samples[:1], most, [[0.0, 1.0], [1.0, 2.0]])
    assert found == pytest.approx((whole[0] + (each[0][:-1].mean() - 1) / 2) / 2, abs=1e-5)

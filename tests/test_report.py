"""The report on a finished run whose numbers are changed by hand: what it must say, and what must never leave it."""

import json
import re
import shutil

import pytest
from small import small_recipe

from irlign.cli import main
from irlign.files import read_json, read_table, write_json, write_table
from irlign.pipeline import run
from irlign.report import write_report
from irlign.seeds import write_seeds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("reported") / "run"
    run(small_recipe(root))
    return root


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_it_is_one_offline_file(finished):
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|<link|@import|url\(\s*["']?http|fetch\(|XMLHttp|import\(""", html)


def test_the_answer_comes_before_every_figure(finished):
    html = (finished / "report.html").read_text(encoding="utf-8")
    headline = read_json(finished / "evaluation/results.json")["headline"]
    assert headline and all(html.index(line) < html.index("<svg") for line in headline)


def _choose(root, n):
    """The report of the run as it would be with that n, pi_SFT being the aligned policy."""
    results = read_json(root / "evaluation/results.json")
    results["choice"]["n"], results["optimise"]["published"] = n, "sft"
    write_json(root / "evaluation/results.json", results)
    write_report(root, root / "report.html")
    return (root / "report.html").read_text(encoding="utf-8")


def test_where_sft_is_kept_nothing_stands_there_twice(copied):
    for n, tiles, columns, answers in ((4, 4, 1, 4), (1, 3, 0, 3)):
        html = _choose(copied, n)
        assert len(re.findall(r'<div class="tile">', html)) == tiles and html.count("<th>Best-of-4</th>") == columns
        samples = html[html.index("<h2>Answers</h2>") : html.index("<h2>What was run</h2>")]
        assert samples.count("<h4>") == answers * samples.count("<article") and samples.count(' pick"') == samples.count("<article")
    assert "<span>SFT, kept</span>" in html and "Best-of-1<" not in html


def test_what_was_tried_for_the_aligned_policy_stands_in_a_table(copied):
    """A candidate with every measure, and one of a run that is older than most of them."""
    results = read_json(copied / "evaluation/results.json")
    sft = {
        "tokens": 48.2,
        "finished": 0.98,
        "distinct_answers": 1.0,
        "distinct_3": 0.5,
        "distinct_3_picked": 0.41,
        "kl_initial": {"mean": 6.04, "ci95": [5, 7]},
    }
    full = {**sft, "gain": {"mean": 0.44, "low": -0.36}, "kl_sft": {"mean": 1.94, "ci95": [1, 2]}, "training": {"stopped": "<it> ended"}}
    alarm = {"name": "it repeats", "seen": "30% differ", "do": "read"}
    old = {"tokens": 60.0, "gain": {"mean": 0.5, "low": 0.1}, "alarms": [alarm]}
    told = {
        "published": "round-1-at-50%",
        "prompts": 20,
        "selector": "likelihood",
        "candidates": {"sft": sft, "round-1-at-50%": full, "round-1": old},
    }
    results["optimise"] = {**results["optimise"], **told}
    write_json(copied / "evaluation/results.json", results)
    write_report(copied, copied / "report.html")
    html = (copied / "report.html").read_text(encoding="utf-8")
    for row in (
        "<th></th><th>SFT</th><th>Round 1 at 50%, published</th><th>Round 1</th>",
        "<td>gain by the judge</td><td>–</td><td>+0.44 (at least −0.36)</td><td>+0.50 (at least +0.10)</td>",
        "<td>gain by the reward likelihood</td><td>–</td><td>–</td><td>–</td>",
        "<td>KL to SFT</td><td>–</td><td>1.9</td><td>–</td>",
        "<td>tokens an answer</td><td>48</td><td>48</td><td>60</td>",
    ):
        assert row in html
    assert "less than half of 41% of the trigrams differ" in html and "Round 1, alarm, it repeats: 30% differ." in html
    assert "Round 1 at 50%: in training &lt;it&gt; ended." in html


def test_every_tile_has_its_interval_and_its_count_of_prompts(copied):
    tiles = re.findall(r'<div class="tile">(.*?)</div>', _choose(copied, 4))
    assert len(tiles) == 4
    assert all(re.search(r"\[[−0-9.]+, [−0-9.]+\] · 8 prompts", tile) for tile in tiles)


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.1, "")])
def test_the_verdict_is_the_interval_of_the_chosen_n_against_sft(copied, low, high, verdict):
    results = read_json(copied / "evaluation/results.json")
    results["choice"]["n"] = 4
    for test in results["tests"]:
        if (test["a"], test["b"]) == ("best_of_4", "sft"):
            test.update(mean_difference=(low + high) / 2, ci95=[low, high])
    write_json(copied / "evaluation/results.json", results)
    write_report(copied, copied / "report.html")
    assert f'<section class="answer {verdict}">' in (copied / "report.html").read_text(encoding="utf-8")


def test_text_of_a_model_is_never_markup(copied):
    rows = read_table(copied / "evaluation/prompts.parquet")
    bad = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \ud83d"
    for row in rows:
        row["prompt"] = row["answer/best_of_n"] = bad.encode("utf-8", "replace").decode()
    write_table(copied / "evaluation/prompts.parquet", rows)
    write_report(copied, copied / "report.html")
    html = (copied / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in html and "{{ 7 * 7 }}" in html
    assert html.count("<script") == 1 and "<img" not in html  # the page's own, which its policy names by hash


def test_without_a_golden_reward_nothing_is_called_better(copied):
    results = read_json(copied / "evaluation/results.json")
    rows = read_table(copied / "evaluation/prompts.parquet")
    results["golden"] = None
    write_json(copied / "evaluation/results.json", results)
    write_table(copied / "evaluation/prompts.parquet", [{k: v for k, v in row.items() if "golden" not in k} for row in rows])
    write_report(copied, copied / "report.html")
    html = (copied / "report.html").read_text(encoding="utf-8")
    assert "their rise proves nothing" in html and "golden value" not in html
    names = re.findall(r'<div class="tile"><span>(.*?)</span>', html)
    assert names and all(name.endswith(": the reward that selects") for name in names)


def test_the_seeds_table_names_the_seeds_that_turned(copied, tmp_path):
    """Seed 1 rises to the last n, seed 2 peaks at n = 2: the table says so, by name."""
    results = {}
    for seed, best in ((1, 4), (2, 2)):
        shutil.copytree(copied, tmp_path / f"seed-{seed}")
        results[seed] = read_json(copied / "evaluation/results.json")
        results[seed]["curve"]["best_n"], results[seed]["choice"]["n"] = best, 1
        next(t for t in results[seed]["tests"] if t["a"] == "best_of_oracle_n")["mean_difference"] = 1.0
    found = write_seeds(tmp_path, results)
    assert [row["seed"] for row in found["seeds"]] == [1, 2]
    assert any("without labels missed 100% of the gain that the best n would have brought" in line for line in found["headline"])
    assert any("seed 2: n = 2" in line and "seed 1" not in line for line in found["headline"])
    assert "seed 2: n = 2" in (tmp_path / "seeds.html").read_text(encoding="utf-8")


def test_further_measures_have_their_tables(copied, tmp_path, monkeypatch):
    """`irlign eval` with a further golden reward and a preference file, and what lm-evaluation-harness would have said."""
    assert "<h2>Elsewhere</h2>" not in _choose(copied, 4)
    (tmp_path / "further_for_test.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"p{i}", "chosen": "Sure.", "rejected": "No way at all.", "subset": f"<b>{i % 2}"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(copied), "--golden", "further_for_test:short", "--reward-bench", str(tmp_path / "pairs.jsonl")])
    assert not ended.value.code
    results = read_json(copied / "evaluation/results.json")
    assert results["goldens"][0]["sft"]["mean"] < 0 and results["lm_eval"] is None
    subsets = results["reward_bench"][0]["subsets"]
    assert [of["subset"] for of in subsets] == ["all", "<b>0", "<b>1"] and subsets[0]["accuracy"]["length"]["mean"] == 0
    mean = {"mean": 0.5, "ci95": [0.4, 0.6], "prompts": 9}
    test = {"a": "sft", "b": "initial", "mean_difference": -0.2, "ci95": [-0.3, -0.1], "p": 0.01, "prompts": 9}
    row = {"task": "arc", "metric": "acc", "higher_is_better": True, "means": {"initial": mean, "sft": mean}, "tests": [test]}
    results["lm_eval"] = {
        "version": "9",
        "tasks": ["arc"],
        "limit": None,
        "rows": [row, {**row, "metric": "ppl", "tests": [], "higher_is_better": None}],
    }
    write_json(copied / "evaluation/results.json", results)
    html = _choose(copied, 4)
    table = html[html.index("<h2>Elsewhere</h2>") : html.index("<h2>What to distrust</h2>")]
    assert "further_for_test:short" in html and "arc, acc ↑" in table and '<td class="worse">-0.200' in table
    assert "&lt;b&gt;0" in table and table.count("of similar length") == 3 and '<td class="">–</td>' in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "arc", "evaluation.lm_eval.python=/no/python"], "there is no Python at /no/python"),
        (["--reward-bench", "nowhere.jsonl"], "no such file"),
        (["--golden", "nothing:here"], "cannot be imported"),
    ],
)
def test_a_further_measure_that_cannot_be_taken_is_one_line(copied, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(copied), *words])
    assert ended.value.code in (1, 2) and message in capsys.readouterr().err

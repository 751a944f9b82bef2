"""One page over several runs: what two small finished runs that differ in known ways must say of each other."""

import re
import shutil

import pytest
from small import small_recipe

from irlign import pipeline
from irlign.cli import main
from irlign.compare import compare_runs, differing
from irlign.errors import ConfigError, RunError
from irlign.files import read_json, read_table, write_json, write_table
from irlign.pipeline import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared") / "a"
    run(small_recipe(root, optimise={"method": "none"}))
    return root


@pytest.fixture
def two(finished, tmp_path):
    """Run `a`, and `b`: the same with n = 4, golden values one higher on every test prompt, another learning rate, and an alarm."""
    a, b = (shutil.copytree(finished, tmp_path / name) for name in ("a", "b"))
    for root in (a, b):
        results = read_json(root / "evaluation/results.json")
        results["choice"]["n"], results["alarms"] = 4, []
        write_json(root / "evaluation/results.json", results)
    results["alarms"] = [{"name": "length", "seen": "answers <grow>", "do": "look"}]
    write_json(b / "evaluation/results.json", results)
    rows = read_table(b / "evaluation/prompts.parquet")
    write_table(b / "evaluation/prompts.parquet", [{**row, "golden/best_of_4": row["golden/best_of_4"] + 1} for row in rows])
    recipe = (b / "recipe.yaml").read_text()
    (b / "recipe.yaml").write_text(
        recipe.replace("learning_rate: 0.001", "learning_rate: 0.002", 1).replace("output_dir: ", "output_dir: x")
    )
    return a, b


def _table(html, title):
    """The cells of the rows of the table under a heading, without marks."""
    found = re.search(rf"<h2>{title}</h2>.*?</table>", html, re.DOTALL)
    return [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for row in re.findall("<tr>(.*?)</tr>", found[0])]


def test_what_the_page_says(two, tmp_path):
    headline = compare_runs(two, tmp_path / "compare.html")
    results = read_json(two[0] / "evaluation/results.json")
    assert headline[0] == "2 runs, judged by the golden reward of the dialogue world."
    assert headline[1:] == ["b, Best-of-n, is better than a: +1.00 [1.00, 1.00] over 8 test prompts."]
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    rows = _table(html, "What each run gives")
    assert [row[0] for row in rows] == ["run", "a", "b"] and rows[1][6:8] == ["4", results["choice"]["reward"]]
    best = results["golden"]["best_of_n"]["4"]
    assert rows[1][4] == f"{best['mean']:.2f} [{best['ci95'][0]:.2f}, {best['ci95'][1]:.2f}]".replace("-", "−") and rows[1][3] == "–"
    assert _table(html, "Against a")[1][:4] == ["b", "Best-of-n", "+1.000", "[1.000, 1.000]"]
    assert _table(html, "Settings that differ") == [["key", "a", "b"], ["sft.learning_rate", "0.001", "0.002"]]
    assert "<strong>b: length.</strong> Answers &lt;grow&gt;. To do: look." in html and "a: length" not in html
    assert html.index(headline[1]) < html.index("<table>")


def test_it_is_one_offline_page_that_fits_a_phone(two, tmp_path):
    """Every table scrolls by itself; nothing is fetched, and colours follow the reader's choice."""
    compare_runs(two, tmp_path / "compare.html")
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|<script|<link|@import|url\(""", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert html.count("<table>") == html.count('<div class="scroll"><table>') == 4


def test_runs_that_do_not_compare_are_not_compared(two, tmp_path):
    rows = read_table(two[1] / "evaluation/prompts.parquet")
    write_table(two[1] / "evaluation/prompts.parquet", rows[1:])
    assert compare_runs(two, tmp_path / "c.html")[1:] == ["Runs without a comparison below have other test prompts than a."]
    results = read_json(two[1] / "evaluation/results.json")
    results["golden"] = None
    write_json(two[1] / "evaluation/results.json", results)
    assert compare_runs(two, tmp_path / "c.html") == [
        "2 runs that were not all judged by the same measure: their means do not compare, only what a line below puts side by side does."
    ]
    for root in two:
        write_json(root / "evaluation/results.json", results)
    assert "nothing here says which run is better" in compare_runs(two, tmp_path / "c.html")[0]
    assert "<td>the reward that selects</td>" in (tmp_path / "c.html").read_text() and "Against" not in (tmp_path / "c.html").read_text()


def test_the_aligned_policies_are_compared_too(two, tmp_path):
    for root, value in zip(two, (2.0, 1.5), strict=True):
        rows = read_table(root / "evaluation/prompts.parquet")
        write_table(root / "evaluation/prompts.parquet", [{**row, "golden/aligned": value} for row in rows])
    assert compare_runs(two, tmp_path / "c.html")[1] == "b, the aligned policy, is worse than a: -0.50 [-0.50, -0.50] over 8 test prompts."


def test_folders_that_are_no_finished_runs(two, tmp_path, capsys):
    with pytest.raises(RunError, match=r"no manifest\.json"):
        compare_runs([two[0], tmp_path], tmp_path / "c.html")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        compare_runs([two[0], tmp_path / "nowhere"], tmp_path / "c.html")
    for folders in (two[:1], [two[0], two[0]]):
        with pytest.raises(ConfigError, match="two runs or more, each given once"):
            compare_runs(folders, tmp_path / "c.html")
    results = read_json(two[1] / "evaluation/results.json")
    for older in ([], {**results, "choice": {"n": 4}}, {key: of for key, of in results.items() if key != "heldout"}):
        write_json(two[1] / "evaluation/results.json", older)
        with pytest.raises(RunError, match="not as this version of irlign writes them"):
            compare_runs(two, tmp_path / "c.html")
    shutil.rmtree(two[1] / "evaluation")
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, two), "-o", str(tmp_path / "c.html")])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 1
        and "this run is not finished" in said
        and f"irlign run output_dir={two[1]}" in said
        and "Traceback" not in said
    )
    assert not (tmp_path / "c.html").exists()


def test_settings_that_differ_by_hand():
    a = {
        "output_dir": "a",
        "seed": 0,
        "sft": {"trainer": {}, "learning_rate": 1e-3},
        "world": {"name": "dialogue"},
        "best_of_n": {"n": None},
    }
    b = {"output_dir": "b", "seed": 0, "sft": {"trainer": {"fp16": True}, "learning_rate": 1e-4}, "world": None, "best_of_n": {"n": 4}}
    assert differing({"a": a, "b": b}) == {
        "sft.learning_rate": ["0.001", "0.0001"],
        "world.name": ["dialogue", "–"],
        "best_of_n.n": ["none", "4"],
        "sft.trainer.fp16": ["–", "True"],
        "world": ["–", "none"],
    }
    assert differing({"a": a, "b": {**a, "output_dir": "elsewhere"}}) == {}


def test_an_evaluation_of_before_is_refused(finished, tmp_path):
    """A policy that was optimised after the evaluation is not in it; `irlign optimise` says so, and what brings it up to date."""
    a, b = (shutil.copytree(finished, tmp_path / name) for name in ("a", "b"))
    first, changed = (small_recipe(b, optimise={"method": "weighted-sft", "max_steps": n, "generations": 1}) for n in (1, 2))
    run(first)
    assert compare_runs([a, b], tmp_path / "compare.html")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "say", said.append)
        pipeline.run_stage("optimise", changed)
    assert said[-1] == f"the evaluation and the report are of before this: irlign report output_dir={b} brings them up to date"
    with pytest.raises(RunError, match="its evaluation is older than its optimise"):
        compare_runs([a, b], tmp_path / "compare.html")
    run(changed)
    assert compare_runs([a, b], tmp_path / "compare.html")


def test_results_beside_the_recipe_of_a_failed_attempt_are_refused(finished, tmp_path):
    """The recipe is that of the attempt, and what the run holds is of before."""
    a, b = (shutil.copytree(finished, tmp_path / name) for name in ("a", "b"))
    manifest = read_json(b / "manifest.json")
    of = manifest["stages"]["bon"]
    manifest["stages"]["bon"] = {**of, "status": "failed", "outputs": dict.fromkeys(of["outputs"]), "stands": of}
    write_json(b / "manifest.json", manifest)
    with pytest.raises(RunError, match="an attempt that bon did not finish, and its results are of before"):
        compare_runs([a, b], tmp_path / "compare.html")

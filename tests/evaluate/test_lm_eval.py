"""lm-evaluation-harness as a process: its words, what it writes, the table made of that; and, where it is installed, the harness itself."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.errors import ConfigError, ModelError
from irlign.evaluate.lm_eval import PYTHON, LMEvalSettings, arguments, ask_harness, lm_eval_python, read_answer, regressions
from irlign.records import Prompt, Sample

OPTIONS = {"resamples": 200, "seed": 3}
HARNESS = """
import json, pathlib, sys
words = sys.argv[1:]
pairs = [w for w in words[1:] if w != "--log_samples"]
given = dict(zip(pairs[::2], pairs[1::2]))
if given["--tasks"] == "broken":
    sys.exit("Traceback\\nValueError: Tasks not found: broken")
model = json.loads(given["--model_args"])["pretrained"]
right = {"init": [1, 1, 1, 1, 1, 1], "sft": [1, 1, 1, 1, 1, 0], "aligned": [0, 0, 0, 0, 0, 0]}[pathlib.Path(model).name]
with open(__file__ + ".log", "a") as log:
    log.write(model + "\\n")
out = pathlib.Path(given["--output_path"]) / model.replace("/", "__")
out.mkdir(parents=True)
figures = {"name": "t", "alias": "t", "acc,none": sum(right) / 6, "acc_stderr,none": 0.1, "ppl,none": 7.5}
(out / "results_2026-01-01.json").write_text(json.dumps({"results": {"t": figures}, "higher_is_better": {"t": {"acc": True, "ppl": False}}, "lm_eval_version": "9"}))
(out / "samples_t_2026-01-01.jsonl").write_text("".join(
    json.dumps({"doc_id": i, "filter": "none", "metrics": ["acc", "ppl"], "acc": float(r), "ppl": [1, 2]}) + "\\n" for i, r in enumerate(right)))
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A module `lm_eval` that speaks the harness's words, and three policies."""
    (tmp_path / "lib/lm_eval").mkdir(parents=True)
    (tmp_path / "lib/lm_eval/__init__.py").write_text("")
    (tmp_path / "lib/lm_eval/__main__.py").write_text(HARNESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv(PYTHON, sys.executable)
    policies = {source: tmp_path / "policies" / ("init" if source == "initial" else source) for source in ("initial", "sft", "aligned")}
    for folder in policies.values():
        folder.mkdir(parents=True)
        (folder / "weights").write_text(folder.name)
    return policies, tmp_path


def test_the_words_it_is_given(tmp_path):
    folder = tmp_path / "a,b"
    settings = LMEvalSettings(tasks=["x", "y"], limit=5, num_fewshot=0, include_path=str(tmp_path), apply_chat_template=True)
    words = arguments(folder, settings, 7)
    assert words[:7] == ["run", "--model", "hf", "--model_args", json.dumps({"pretrained": str(folder)}), "--tasks", "x,y"]
    assert "--log_samples" in words and words[-1] == "--apply_chat_template"
    for flag, value in (
        ("--limit", "5"),
        ("--num_fewshot", "0"),
        ("--include_path", str(tmp_path)),
        ("--seed", "7"),
        ("--batch_size", "8"),
    ):
        assert words[words.index(flag) + 1] == value
    assert not {"--limit", "--num_fewshot", "--include_path"} & set(arguments(folder, LMEvalSettings(tasks=["x"]), 0))


def test_the_regression_table(harness):
    policies, root = harness
    found = ask_harness(policies, LMEvalSettings(tasks=["t"]), root / "kept", **OPTIONS)
    acc, ppl = found["rows"]
    assert found["version"] == "9" and (acc["task"], acc["metric"], acc["higher_is_better"]) == ("t", "acc", True)
    assert [acc["means"][s]["mean"] for s in policies] == pytest.approx([1, 5 / 6, 0]) and acc["means"]["sft"]["prompts"] == 6
    assert {(t["a"], t["b"]): t["mean_difference"] for t in acc["tests"]} == pytest.approx(
        {("sft", "initial"): -1 / 6, ("aligned", "initial"): -1, ("aligned", "sft"): -5 / 6}
    )
    assert ppl["metric"] == "ppl" and ppl["means"]["sft"] == {"mean": 7.5, "ci95": None, "prompts": None} and ppl["tests"] == []
    (alarm,) = regressions(found["rows"])
    assert "aligned policy is worse" in alarm["name"] and "t acc -1.000" in alarm["seen"] and "1 of 2" in alarm["seen"]
    assert regressions([{**acc, "higher_is_better": False}]) == regressions([{**acc, "higher_is_better": None}]) == []


def test_nothing_is_asked_twice_and_another_policy_is(harness):
    policies, root = harness
    settings, log = LMEvalSettings(tasks=["t"]), root / "lib/lm_eval/__main__.py.log"
    first = ask_harness(policies, settings, root / "kept", **OPTIONS)
    assert ask_harness(policies, settings, root / "kept", **OPTIONS) == first and len(log.read_text().splitlines()) == 3
    (policies["sft"] / "weights").write_text("other")
    ask_harness(policies, settings, root / "kept", **OPTIONS)
    assert log.read_text().splitlines()[3:] == [str(policies["sft"])]


def test_a_failure_is_its_last_line_and_leaves_nothing(harness):
    policies, root = harness
    with pytest.raises(ModelError, match="failed: ValueError: Tasks not found: broken"):
        ask_harness(policies, LMEvalSettings(tasks=["broken"]), root / "kept", **OPTIONS)
    assert list((root / "kept").iterdir()) == []


def test_a_python_without_it(tmp_path):
    with pytest.raises(ConfigError, match="there is no Python at"):
        lm_eval_python(LMEvalSettings(tasks=["t"], python=str(tmp_path / "none")))
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(ConfigError, match="lm-evaluation-harness is not installed"):
            lm_eval_python(LMEvalSettings(tasks=["t"], python=sys.executable))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_answer(tmp_path)
    (tmp_path / "results_1.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        read_answer(tmp_path)


TASK = """
task: irl_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def _installed():
    python = os.environ.get(PYTHON) or sys.executable
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    return subprocess.run([python, "-c", look], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _installed(), reason=f"lm-evaluation-harness is not installed here, nor in the Python of {PYTHON}")
def test_the_harness_itself_on_a_task_of_ones_own(tmp_path, monkeypatch):
    """No hub: a local task, and as many right answers as the likelihoods of irlign's own policy say."""
    from irlign.policy.likelihood import answer_log_probs

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [{"prompt": "the cat", "choices": [" sat.", " ran home now."], "gold": i % 2} for i in range(4)]
    docs += [{"prompt": "a red dog", "choices": [" home.", " the dog sat."], "gold": i % 2} for i in range(3)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/choice.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    folder = make_tiny_policy(tmp_path / "policy")
    settings = LMEvalSettings(tasks=["irl_choice"], include_path=str(tmp_path / "tasks"))
    found = ask_harness({"initial": folder, "sft": folder}, settings, tmp_path / "kept", **OPTIONS)
    (row,) = found["rows"]
    assert row["metric"] == "acc" and row["higher_is_better"] is True and row["means"]["initial"]["prompts"] == 7
    assert row["tests"][0]["mean_difference"] == 0 and found["version"]
    asked = [Sample(Prompt.of(doc["prompt"], "test"), 0, choice, "length", 1, 0.0) for doc in docs for choice in doc["choices"]]
    told_D_2 = answer_log_probs(folder, asked, chat_template="none").reshape(-1, 2)
    right = [doc["gold"] == choice for doc, choice in zip(docs, told_D_2.argmax(1), strict=True)]
    assert row["means"]["initial"]["mean"] == pytest.approx(np.mean(right))

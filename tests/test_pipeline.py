"""The chain on a small world, stage by stage: what it publishes, what it skips, what it runs again and why."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from small import small_recipe

import irlign
from irlign.errors import ConfigError, GuardError, ModelError
from irlign.files import hash_path, read_table
from irlign.inputs import validate
from irlign.optimise.scoring import score_file
from irlign.pipeline import run, run_stage
from irlign.recipe import WORLDS
from irlign.records import Prompt
from irlign.reward import features
from irlign.reward.controls import CONTROLS
from irlign.reward.publish import LOG_RATIOS

PUBLISHED = (
    "recipe.yaml",
    "manifest.json",
    "data/train.parquet",
    "data/dev.parquet",
    "data/test.parquet",
    "policies/init/model.safetensors",
    "policies/sft/model.safetensors",
    "policies/sft/README.md",
    "pools/init.parquet/part-00000.parquet",
    "pools/sft.parquet/part-00000.parquet",
    "pools/init.parquet/README.md",
    "pools/sft.parquet/README.md",
    "rewards/init-sft/model.safetensors",
    "rewards/init-sft/reward.json",
    "rewards/init-sft/README.md",
    "rewards/log-ratio/reward.json",
    "rewards/log-ratio-per-token/reward.json",
    "best_of_n/candidates.parquet",
    "best_of_n/selected.jsonl",
    "policies/aligned/model.safetensors",
    "policies/aligned/README.md",
    "pools/aligned.parquet/part-00000.parquet",
    "optimise/choice.json",
    "evaluation/results.json",
    "evaluation/prompts.parquet",
    "report.html",
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(small_recipe(folder))
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def _manifest(folder):
    return json.loads((folder / "manifest.json").read_text())["stages"]


def test_everything_the_contract_names_is_there(finished):
    assert [name for name in PUBLISHED if not (finished / name).is_file()] == []
    stages = _manifest(finished)
    assert list(stages) == ["pretrain", "data", "sft", "sample", "reward", "bon", "optimise", "eval", "report"]
    keys = {
        "status",
        "seconds",
        "inputs",
        "settings",
        "settings_sha256",
        "outputs",
        "peak_memory_mib",
        "versions",
        "seed",
        "notes",
        "started",
    }
    assert all(keys <= set(entry) and entry["status"] == "complete" for entry in stages.values())


def test_results_keep_their_promises(finished):
    results = json.loads((finished / "evaluation/results.json").read_text())
    parts = {"headline", "golden", "heldout", "choice", "optimise", "adaptive", "alarms", "base", "tests", "curve", "run", "pairwise"}
    parts |= {"goldens", "reward_bench", "lm_eval"}
    assert set(results) == parts
    golden = results["golden"]
    assert results["curve"]["n"] == [1, 2, 4] and set(golden["best_of_n"]) == {"1", "2", "4"}
    assert golden["best_of_n"]["1"]["mean"] == pytest.approx(golden["sft"]["mean"])
    assert all(golden[source]["prompts"] == 8 for source in ("initial", "sft", "demonstrations"))
    assert all(golden["oracle"][n]["mean"] >= curve[n]["mean"] for curve in golden["rewards"].values() for n in curve)
    assert {"a", "b", "mean_difference", "ci95", "p", "prompts"} <= set(results["tests"][0])


def test_cards_hold_the_figures_of_what_lies_beside_them(finished):
    stages = _manifest(finished)
    notes, card = stages["sft"]["notes"], (finished / "policies/sft/README.md").read_text()
    assert f"on {notes['rows']} demonstrations of the dialogue world: {notes['steps']} steps of 16 rows, peak learning rate 0.001" in card
    assert f"{notes['dev_nll']['initial']:.3f} nats a token before, {notes['dev_nll']['sft']:.3f} after" in card
    for pool in ("init", "sft"):
        notes, card = stages["sample"]["notes"][pool], (finished / f"pools/{pool}.parquet/README.md").read_text()
        assert f"{notes['samples']} answers to {notes['prompts']} prompts" in card and "at most 24 tokens." in card
        assert f"{1 - notes['completions/clipped_ratio']:.0%} ended by themselves" in card


def test_pools_hold_what_was_asked_for(finished):
    rows = read_table(finished / "pools/sft.parquet")
    assert {(r["split"], r["index"]) for r in rows} == {("train", 0), ("train", 1)} | {(s, i) for s in ("dev", "test") for i in range(4)}
    assert {"prompt", "completion", "finish_reason", "tokens", "logprob", "temperature", "top_p", "top_k", "seed", "engine"} <= set(rows[0])


def test_the_demonstration_is_never_a_candidate(finished):
    candidates = read_table(finished / "best_of_n/candidates.parquet")
    pool = {(r["prompt_id"], r["index"]): r["completion"] for r in read_table(finished / "pools/sft.parquet") if r["split"] != "train"}
    assert {(r["prompt_id"], r["index"]): r["completion"] for r in candidates} == pool
    selected = [json.loads(line) for line in (finished / "best_of_n/selected.jsonl").read_text().splitlines()]
    n = json.loads((finished / "best_of_n/choice.json").read_text())["n"]
    for row in selected:
        own = [c for c in candidates if c["prompt_id"] == row["prompt_id"] and c["index"] < n]
        best = max(own, key=lambda c: (c["finish_reason"] != "length", c["reward/init-sft+likelihood"]))
        assert (row["completion"], row["reward"]) == (best["completion"], best["reward/init-sft+likelihood"])


@pytest.mark.parametrize(("budget", "line"), [(2, "bon: best_of_n.budget=2 is not below n = 2"), (1.5, "bon: of these a prompt uses")])
def test_a_budget_that_changes_nothing_is_said(copied, monkeypatch, budget, line):
    said = []
    monkeypatch.setattr("irlign.pipeline.say", said.append)
    run_stage("bon", small_recipe(copied, best_of_n={"n": 2, "force": True, "budget": budget}))
    assert said[-2].startswith(line) and said[-1].startswith("the evaluation and the report are of before this: irlign report")


def test_with_a_budget_each_prompt_uses_its_own_number_of_answers(copied):
    results = run(small_recipe(copied, best_of_n={"n": 4, "force": True, "budget": 2}, optimise={"method": "none"}))
    candidates = read_table(copied / "best_of_n/candidates.parquet")
    selected = [json.loads(line) for line in (copied / "best_of_n/selected.jsonl").read_text().splitlines()]
    about, point = results["choice"]["adaptive"], results["adaptive"]
    assert (about["budget"], about["most"]) == (2, 4) and len({row["n"] for row in selected}) > 1
    for split in ("dev", "test"):
        own = [row["n"] for row in selected if row["split"] == split]
        assert about["n"][split] == sum(own) / len(own) <= {"dev": 2, "test": 4}[split]
    assert point["n"]["mean"] == about["n"]["test"] > 1
    for row in selected:
        own = [c for c in candidates if c["prompt_id"] == row["prompt_id"] and c["index"] < row["n"]]
        best = max(own, key=lambda c: (c["finish_reason"] != "length", c[f"reward/{results['choice']['reward']}"]))
        assert (row["completion"], row["index"]) == (best["completion"], best["index"])
    html = (copied / "report.html").read_text(encoding="utf-8")
    assert "Diamond: each prompt as many answers as it deserves, 4 at most, for a mean of 2 on dev" in html
    assert f"{point['n']['mean']:.1f} answers on average" in html and any("as each prompt deserves" in line for line in results["headline"])


def test_the_second_run_does_nothing(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name not in ("recipe.yaml", ".lock")}
    stages = _manifest(copied)
    run(small_recipe(copied))
    assert _manifest(copied) == stages
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"evaluation": {"resamples": 300}}, {"eval", "report"}),
        ({"best_of_n": {"n": 2, "force": True}}, {"bon", "eval", "report"}),
        ({"reward": {"loss": "bradley-terry"}}, {"reward", "bon", "optimise", "eval", "report"}),
        ({"sft": {"learning_rate": 2e-3}}, {"sft", "sample", "reward", "bon", "optimise", "eval", "report"}),
        ({"optimise": {"learning_rate": 2e-3}}, {"optimise", "eval", "report"}),
    ],
)
def test_a_change_runs_again_what_follows_from_it(copied, changes, again):
    before = _manifest(copied)
    run(small_recipe(copied, **changes))
    after = _manifest(copied)
    assert {name for name in after if after[name]["started"] != before[name]["started"] or after[name] != before[name]} == again


def test_a_removed_output_comes_back_the_same(copied):
    wanted = hash_path(copied / "pools/init.parquet")
    shutil.rmtree(copied / "pools/init.parquet")
    run(small_recipe(copied))
    assert hash_path(copied / "pools/init.parquet") == wanted


@pytest.mark.parametrize("contrast", ["init-demo", "sft-demo"])
@pytest.mark.parametrize("loss", ["logistic", "bradley-terry"])
def test_every_contrast_and_loss(copied, contrast, loss):
    results = run(small_recipe(copied, reward={"contrast": contrast, "loss": loss}))
    assert results["heldout"]["reward"]["contrast"] == contrast and results["heldout"]["reward"]["loss"] == loss
    assert set(results["golden"]["rewards"]) == {contrast, f"{contrast}+likelihood", *LOG_RATIOS, "judge", "style", *CONTROLS}
    assert not (copied / "rewards/init-sft").exists()


@pytest.mark.parametrize(
    ("settings", "name", "kind"),
    [
        ({"kind": "features", "head": "mlp", "backbone": "init", "members": 2, "aggregate": "min"}, "init-sft", "features"),
        ({"kind": "heads", "members": 3, "aggregate": "mean-variance"}, "init-sft", "heads"),
        ({"mixture": {"init-sft": 1, "init-demo": 0.5}}, "mixture", "classifier"),
        ({"ensemble": ["init-sft", "init-demo", "sft-demo"], "aggregate": "min", "kind": "features"}, "ensemble", "ensemble"),
    ],
)
def test_every_kind_of_reward_goes_through_and_moves_with_the_run(copied, tmp_path, settings, name, kind):
    results = run(small_recipe(copied, reward=settings))
    assert results["heldout"]["reward"]["kind"] == kind and results["run"]["contrast"] == name
    assert {name, "log-ratio", "log-ratio-per-token", "length"} <= set(results["golden"]["rewards"])
    rows = [row for row in read_table(copied / "best_of_n/candidates.parquet") if row["finish_reason"] == "eos"][:5]
    stored = [row[f"reward/{name}"] for row in rows]
    moved = Path(shutil.move(copied, tmp_path / "moved"))
    scores = irlign.load_reward(moved / "rewards" / name).score([r["prompt"] for r in rows], [r["completion"].rstrip() for r in rows])
    assert scores == pytest.approx(stored, abs=1e-4) and name in (moved / "rewards" / name / "README.md").read_text()


def test_earlier_checkpoints_join_the_worse_side(copied):
    before, pool = json.loads((copied / "rewards/init-sft/reward.json").read_text())["pairs"], hash_path(copied / "pools/sft.parquet")
    run(small_recipe(copied, sft={"keep_checkpoints": [0.5]}))
    assert (copied / "policies/sft-0.5/model.safetensors").is_file() and hash_path(copied / "pools/sft.parquet") == pool
    drawn = {(row["split"], row["index"]) for row in read_table(copied / "pools/sft-0.5.parquet")}
    assert drawn == {(split, i) for split in ("train", "dev") for i in range(2)}
    after = json.loads((copied / "rewards/init-sft/reward.json").read_text())
    assert after["pairs"]["train"] > before["train"] and "pools/sft-0.5.parquet" in after["inputs"]
    run(small_recipe(copied))
    assert not (copied / "policies/sft-0.5").exists() and not (copied / "pools/sft-0.5.parquet").exists()
    with pytest.raises(ConfigError, match="leaves SFT out"):
        run(small_recipe(copied, sft={"keep_checkpoints": [0.5]}, sft_model_name_or_path=str(copied / "policies/sft")))


def test_another_head_reuses_the_stored_features(copied, monkeypatch):
    run(small_recipe(copied, reward={"kind": "features"}))
    before = (copied / "rewards/init-sft/features.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(features, "policy_features", lambda *a, **k: pytest.fail("computed again"))
        run_stage("reward", small_recipe(copied, reward={"kind": "features", "head": "mlp"}))
    assert (copied / "rewards/init-sft/features.safetensors").read_bytes() == before
    assert json.loads((copied / "rewards/init-sft/reward.json").read_text())["head"] == "mlp"


def test_the_preference_contrast_reads_a_file_of_pairs(copied, tmp_path):
    prompts = [row["prompt"] for row in read_table(copied / "data/train.parquet")]
    pairs = [{"prompt": p, "chosen": f" Sure, happy to help. {i}", "rejected": " Go away."} for i, p in enumerate([*prompts, "Another?"])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    results = run(small_recipe(copied, reward={"contrast": "preference"}, preference_dataset_name=str(tmp_path / "pairs.jsonl")))
    assert results["heldout"]["reward"]["pairs"]["train"] + results["heldout"]["reward"]["pairs"]["dev"] == len(pairs)
    both = {"ensemble": ["init-sft", "preference"], "kind": "features"}
    results = run(small_recipe(copied, reward=both, preference_dataset_name=str(tmp_path / "pairs.jsonl")))
    about = json.loads((copied / "rewards/ensemble/reward.json").read_text())
    assert about["members"] == ["init-sft", "preference"] and len(about["scales"]) == 2 and about["dev_of_members"]["init-sft"]
    assert "ensemble" in results["golden"]["rewards"] and not (copied / "rewards/preference").exists()


def test_run_takes_the_recipe_of_the_run_directory(copied):
    stages = _manifest(copied)
    run(None, [f"output_dir={copied}"])
    assert _manifest(copied) == stages


def test_a_finished_stage_says_what_it_came_to(copied, capsys, monkeypatch):
    monkeypatch.delenv("IRLIGN_QUIET")
    results, choice = (json.loads((copied / f"{file}.json").read_text()) for file in ("evaluation/results", "best_of_n/choice"))
    for stage in ("bon", "optimise", "eval"):
        run_stage(stage, None, [f"output_dir={copied}"])
        said = capsys.readouterr().err.splitlines()
        lines = said[said.index(f"{stage}: complete, nothing has changed") + 1 :]
        alarms = [f"ALARM, {a['name']}: {a['seen']}. {a['do']}" for a in results["alarms"]]
        wanted = {"bon": [f"{choice['reward']}, n = {choice['n']}: {choice['why']}"], "eval": [*results["headline"], *alarms]}
        wanted["optimise"] = [f"{results['optimise']['published']} is published: {results['optimise']['why']}"]
        assert lines == [f"{stage}: {line}" for line in wanted[stage]]


def test_one_stage_by_itself_takes_the_recipe_of_the_run(copied):
    run_stage("reward", None, [f"output_dir={copied}", "reward.loss=bradley-terry"])
    stages = _manifest(copied)
    assert stages["reward"]["settings"]["reward"]["loss"] == "bradley-terry" and stages["bon"]["settings"]["n"] is None
    assert json.loads((copied / "rewards/init-sft/reward.json").read_text())["loss"] == "bradley-terry"


def test_a_run_can_be_moved(finished, tmp_path):
    moved = Path(shutil.copytree(finished, tmp_path / "elsewhere"))
    for name in ("init-sft", "log-ratio", "log-ratio-per-token"):
        here, there = (
            irlign.load_reward(folder / "rewards" / name).score(["How do I fix my bike?"], [" Go away."]) for folder in (finished, moved)
        )
        assert here == pytest.approx(there)


def test_the_reward_loads_with_plain_transformers_and_scores_the_same(finished):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = finished / "rewards/init-sft"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = read_table(finished / "best_of_n/candidates.parquet")[:6]
    texts = [r["prompt"] + r["completion"].rstrip() + tokenizer.eos_token for r in rows if r["finish_reason"] == "eos"]
    stored = [r["reward/init-sft+likelihood"] for r in rows if r["finish_reason"] == "eos"]
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert alone == pytest.approx(stored, abs=1e-4)
    scored = irlign.load_reward(folder).score([r["prompt"] for r in rows], [r["completion"] for r in rows])
    again = irlign.load_reward(folder).score([r["prompt"] for r in rows[:1]], [r["completion"] for r in rows[:1]])
    assert again[0] == pytest.approx(scored[0], abs=1e-4)


def test_scoring_a_file(finished, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "How do I fix my bike?", "completion": " Go away."}\n{"prompt": "And?", "completion": ""}\n'
    )
    assert score_file(finished / "rewards/init-sft", tmp_path / "in.jsonl", tmp_path / "out/scored.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out/scored.jsonl").read_text().splitlines()]
    wanted = irlign.load_reward(finished / "rewards/init-sft").score([r["prompt"] for r in rows], [r["completion"] for r in rows])
    assert [r["reward"] for r in rows] == pytest.approx(list(wanted))


def test_several_seeds_make_one_table(tmp_path):
    table = run(small_recipe(tmp_path / "seeds", seeds="0..1"))
    assert [row["seed"] for row in table["seeds"]] == [0, 1]
    assert {"initial", "sft", "aligned", "demonstrations", "best_of_2", "best_of_4", "chosen"} == set(table["pooled"])
    means = [json.loads((tmp_path / f"seeds/seed-{s}/evaluation/results.json").read_text())["golden"]["sft"]["mean"] for s in (0, 1)]
    assert [row["sft"] for row in table["seeds"]] == pytest.approx(means)
    assert table["headline"][0].startswith("Over 2 seeds, the aligned policy ") and "aligned - sft" in table["differences"]
    assert table["pooled"]["sft"]["mean"] == pytest.approx(sum(means) / 2)
    assert (tmp_path / "seeds/seeds.html").is_file() and json.loads((tmp_path / "seeds/seeds.json").read_text()) == table
    with pytest.raises(ConfigError, match="one run directory"):
        run_stage("sft", small_recipe(tmp_path / "seeds", seeds="0..1"))


@pytest.mark.parametrize("name", [name for name in WORLDS if name != "dialogue"])
def test_every_world_goes_through(tmp_path, name):
    recipe = small_recipe(tmp_path / "run", world={"name": name, "out_of_distribution": True, "quality": 0.5, "skeletons": 9})
    text, problem = validate(recipe)
    assert problem is None and "24 rows" in text and "<eos>]]" in text
    results = run(recipe)
    assert results["golden"]["name"] == f"the golden reward of the {name} world" and results["golden"]["demonstrations"]["mean"] > 2.5
    asked = {type(Prompt.from_row(row).content) for row in read_table(tmp_path / "run/pools/sft.parquet")}
    assert asked == {str if WORLDS[name].chat_template == "none" else tuple}


def test_validate_computes_nothing(tmp_path):
    text, problem = validate(small_recipe(tmp_path / "none"))
    assert problem is None
    assert "24 rows" in text and "[[" in text and "<eos>]]" in text and "prompts in two splits: none" in text
    assert not (tmp_path / "none").exists()


def _file(finished, tmp_path, name="own.jsonl", split="train"):
    rows = [{"prompt": r["prompt"], "completion": r["completion"]} for r in read_table(finished / f"data/{split}.parquet")]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def test_your_own_model_and_file_switch_the_world_off(finished, tmp_path):
    own = {"model_name_or_path": str(finished / "policies/init"), "dataset_name": _file(finished, tmp_path)}
    results = run(small_recipe(tmp_path / "own", **own))
    assert results["golden"] is None and results["run"]["world"] is None
    assert results["headline"][0].startswith("The aligned policy is SFT itself") and "no golden reward" in results["headline"][2]
    assert all("too few for a judge" in line for line in results["headline"][:2])
    assert [t["measure"] for t in results["tests"]] == ["init-sft+likelihood"]
    assert next(iter(_manifest(tmp_path / "own"))) == "init"
    assert "is not shown" in (tmp_path / "own/report.html").read_text()


def test_an_sft_model_prompts_and_an_evaluation_file_of_your_own(finished, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"How do I fix my {w} bike?"}) + "\n" for w in ("odd", "fine")))
    own = {
        "model_name_or_path": str(finished / "policies/init"),
        "sft_model_name_or_path": str(finished / "policies/sft"),
        "dataset_name": _file(finished, tmp_path),
        "eval_dataset_name": _file(finished, tmp_path, "eval.jsonl", "test"),
        "prompt_dataset_name": str(tmp_path / "prompts.jsonl"),
    }
    results = run(small_recipe(tmp_path / "own", **own))
    assert results["run"]["prompts"]["test"] == 8 and results["run"]["sft_model"] == own["sft_model_name_or_path"]
    drawn = {r["prompt"] for r in read_table(tmp_path / "own/pools/init.parquet")}
    assert {"How do I fix my odd bike?", "How do I fix my fine bike?"} <= drawn
    assert _manifest(tmp_path / "own")["sft"]["settings"] == {"chat_template": "auto"}


def test_a_golden_reward_of_your_own(finished, tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "def polite(prompts, completions):\n    return [float('Please' in c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"model_name_or_path": str(finished / "policies/init"), "dataset_name": _file(finished, tmp_path)}
    results = run(small_recipe(tmp_path / "own", **own, evaluation={"golden_reward": "mine_for_test:polite"}))
    assert results["golden"]["name"] == "mine_for_test:polite" and 0 <= results["golden"]["sft"]["mean"] <= 1
    before = _manifest(tmp_path / "own")
    (tmp_path / "mine_for_test.py").write_text("def polite(prompts, completions):\n    return [7.0 for _ in completions]\n")
    sys.modules.pop("mine_for_test")  # as in a new process
    assert run(small_recipe(tmp_path / "own", **own, evaluation={"golden_reward": "mine_for_test:polite"}))["golden"]["sft"]["mean"] == 7
    assert [n for n, e in _manifest(tmp_path / "own").items() if e != before[n]] == ["eval", "report"]


def test_a_template_of_your_own_travels_with_the_run(finished, tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    monkeypatch.chdir(tmp_path)
    own = {"model_name_or_path": str(finished / "policies/init"), "dataset_name": _file(finished, tmp_path)}
    run(small_recipe(tmp_path / "own", **own, data={"chat_template": "mine.jinja"}))
    asked = (["How do I fix my bike?"], [" Go away."])
    names = ("init-sft", "log-ratio", "init-sft+likelihood")
    here = [irlign.load_reward(tmp_path / "own/rewards" / name).score(*asked) for name in names]
    (tmp_path / "mine.jinja").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [irlign.load_reward(tmp_path / "own/rewards" / name).score(*asked) for name in names] == here
    before = _manifest(tmp_path / "own")
    run_stage("report", None, [f"output_dir={tmp_path / 'own'}"])
    assert _manifest(tmp_path / "own") == before


def test_the_golden_reward_may_not_be_the_trained_one(copied):
    with pytest.raises(GuardError, match="this very run"):
        run(small_recipe(copied, evaluation={"golden_reward": str(copied / "rewards/init-sft")}))


def test_an_error_leaves_what_was_published(copied):
    wanted = hash_path(copied / "policies/sft")
    with pytest.raises(ModelError, match="diverged"):
        run(small_recipe(copied, sft={"learning_rate": 1e30, "num_train_epochs": 3}))
    assert hash_path(copied / "policies/sft") == wanted and _manifest(copied)["sft"]["status"] == "failed"
    run(small_recipe(copied))
    assert all(entry["status"] == "complete" for entry in _manifest(copied).values())


def test_what_selects_is_no_matter_of_training(copied):
    """Leaving the likelihood out selects again and trains nothing again."""
    before = json.loads((copied / "manifest.json").read_text())["stages"]
    results = run(small_recipe(copied, best_of_n={"likelihood": 0}))
    after = json.loads((copied / "manifest.json").read_text())["stages"]
    assert {stage for stage in before if after[stage] != before[stage]} == {"bon", "optimise", "eval", "report"}
    assert results["run"]["selector"] == "init-sft" and not (copied / "rewards/init-sft+likelihood").exists()

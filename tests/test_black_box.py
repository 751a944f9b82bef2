"""A run from stored samples: nothing reads a policy, the right candidates win, and each way a file can be wrong is one clear error."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny_encoder

from irlign.config import load_recipe
from irlign.errors import ConfigError, DataError
from irlign.files import read_json, read_table
from irlign.inputs import validate
from irlign.pipeline import run, run_stage
from irlign.plan import plan
from irlign.recipe import Recipe
from irlign.reward.load import load_reward

RECIPE = Path(__file__).parents[1] / "recipes/black_box.yaml"
PROMPTS = [f"the cat and dog {i}" for i in range(48)]
ENDS = ("sat.", "ran home now.", "sang on the mat.")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(colour, prompts=PROMPTS, **more):
    return [{"prompt": p, "completion": f"a {colour} bird {end}", **more} for p in prompts for end in ENDS]


@pytest.fixture
def files(tmp_path):
    """The weaker policy's birds are blue, the better one's red, of one length; candidates are one of each, two prompts of their own among them."""
    candidates = [
        {"id": f"{i}-{colour}", "model": f"the {colour} one", "prompt": p, "completion": f"a {colour} bird sat.", "finish_reason": "eos"}
        for i, p in enumerate([*PROMPTS, "the dog", "the bird"])
        for colour in ("blue", "red")
    ]
    return {
        "initial": write(tmp_path / "old.jsonl", answers("blue")),
        "sft": write(tmp_path / "new.jsonl", answers("red")),
        "candidates": write(tmp_path / "candidates.csv", candidates),
    }


def words(tmp_path, files, encoder, *more):
    given = [f"pools.{key}={file}" for key, file in files.items()]
    return [*given, f"reward.backbone={encoder}", f"output_dir={tmp_path}/run", "evaluation.resamples=200", *more]


def test_the_better_candidates_are_selected_and_n_is_judged(tmp_path, files, encoder):
    shown = write(tmp_path / "shown.jsonl", [{"prompt": p, "completion": "a red bird sat."} for p in [*PROMPTS, "nobody asked"]])
    held = ["data.dev_prompts=24", "data.test_prompts=8", f"dataset_name={shown}"]
    results = run(RECIPE, words(tmp_path, files, encoder, *held))
    root = tmp_path / "run"
    stages = read_json(root / "manifest.json")["stages"]
    assert list(stages) == ["data", "sample", "reward", "bon", "optimise", "eval", "report"] and not (root / "policies").exists()
    assert stages["data"]["notes"]["prompts"] == {"train": 16, "dev": 24, "test": 10}
    assert stages["data"]["notes"]["files"][files["candidates"]]["of_train_prompts"] == 32
    assert stages["data"]["notes"]["files"][shown]["one_sided"] == 1
    selected = [json.loads(line) for line in (root / "best_of_n/selected.jsonl").read_text().splitlines()]
    assert len(selected) == 34 and {row["model"] for row in selected} == {"the red one"} and all(r["id"].endswith("-red") for r in selected)
    assert results["choice"]["label_free"] == 2 and results["base"] == "candidates" and results["optimise"] is None
    assert results["heldout"]["reward_auc"] == {"mean": 1.0, "ci95": [1.0, 1.0], "prompts": 8}  # sft's own answers, not the candidates
    assert results["heldout"]["completion_length"]["candidates"]["prompts"] == 10
    html = (root / "report.html").read_text()
    assert "no policy&#39;s weights were read" in html and "candidates" in html and "20 candidates" in html
    assert [name.name for name in (root / "rewards").iterdir()] == ["init-sft"]


def test_without_demonstrations_n_is_what_was_asked_and_nothing_is_shown(tmp_path, files, encoder):
    del files["candidates"]
    short = ["reward.kind=classifier", "reward.max_steps=60", "reward.learning_rate=3e-3", "best_of_n.n=3", "data.test_prompts=8"]
    results = run(RECIPE, words(tmp_path, files, encoder, *short))
    assert results["base"] == "sft" and results["choice"]["why"] == "given by best_of_n.n; no judge says whether it is better"
    assert results["headline"][0] == "There is no golden reward, so whether Best-of-3 beats SFT is not shown here."
    assert results["heldout"]["judge"] is None and results["heldout"]["reward_auc"]["mean"] > 0.9
    reward = load_reward(tmp_path / "run/rewards/init-sft")
    together = reward.score(["the cat"] * 2, ["a red bird sat.", "a blue bird " + "ran " * 40])
    assert together[0] > together[1] and together[1] == pytest.approx(
        reward.score(["the cat"], ["a blue bird " + "ran " * 40])[0], abs=1e-5
    )
    assert read_json(tmp_path / "run/rewards/init-sft/reward.json")["chat_template"] == "pair"
    assert "text pair" in (tmp_path / "run/rewards/init-sft/README.md").read_text()
    rerun = run_stage("bon", None, [f"output_dir={tmp_path}/run", "best_of_n.n=null"])
    assert read_json(rerun / "best_of_n/choice.json")["n"] == 1
    with pytest.raises(ConfigError, match="no policy to fine-tune"):
        run_stage("sft", None, [f"output_dir={tmp_path}/run"])


def test_words_need_no_model_at_all_and_make_no_judge(tmp_path, files):
    shown = write(tmp_path / "shown.jsonl", [{"prompt": p, "completion": "a red bird sat."} for p in PROMPTS])
    held = ["data.dev_prompts=24", "best_of_n.n=2", f"dataset_name={shown}"]
    results = run(RECIPE, words(tmp_path, files, "words", *held))
    assert results["choice"]["label_free"] is None and results["heldout"]["reward_auc"]["mean"] == 1.0
    assert {p.name for p in (tmp_path / "run/rewards/init-sft").iterdir()} == {"reward.json", "README.md", "heads.safetensors"}
    picks = [json.loads(line) for line in (tmp_path / "run/best_of_n/selected.jsonl").read_text().splitlines()]
    assert {row["model"] for row in picks} == {"the red one"}
    kept = run_stage("bon", None, [f"output_dir={tmp_path}/run", "best_of_n.n=null"])
    choice = read_json(kept / "best_of_n/choice.json")
    assert (
        choice["n"] == 1
        and choice["why"].startswith("words alone make no judge")
        and choice["why"].endswith(", so the first candidate is kept")
    )


def test_transformers_alone_gives_the_fine_tuned_encoders_reward(tmp_path, files, encoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    root = run_stage("reward", RECIPE, words(tmp_path, files, encoder, "reward.kind=classifier", "reward.max_steps=2"))
    folder = root / "rewards/init-sft"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logit = model(**tokenizer("the cat", "a red bird sat.", return_tensors="pt")).logits
    assert float(logit.detach()[0, 0]) == pytest.approx(load_reward(folder).score(["the cat"], ["a red bird sat."])[0], abs=1e-5)
    pool = read_table(root / "pools/candidates.parquet")
    assert {row["split"] for row in pool} == {"dev", "test"} and np.isnan(pool[0]["logprob"] or np.nan)


def test_validate_says_what_the_files_hold(tmp_path, files, encoder):
    text, problem = validate(RECIPE, words(tmp_path, files, encoder))
    assert problem is None and "init: 144 answers to 48 prompts, 3 to 3 each; words an answer: 4 to 7, median 6" in text
    assert "train: 33 prompts, 0 demonstrations" in text and "66 for prompts that the reward is trained on: left out" in text
    # of three lengths, one letter apart on the two sides, one threshold gets one third more of one side: (1 + 1/3) / 2
    assert "99 init-sft pairs" in text and "length alone tells 67% of them apart" in text and not (tmp_path / "run").exists()


def bad_file(tmp_path, files, name, rows):
    files["sft"] = write(tmp_path / name, rows) if rows else str(tmp_path / name)
    if not rows:
        (tmp_path / name).write_text("")
    return files


BAD = {
    "a missing column": ("bad.csv", [{"prompt": "p", "text": "t"}], "has no answer: none of the columns completion", "bad.csv:2"),
    "a missing prompt": ("bad.jsonl", [{"question": "p", "completion": "t"}], "has no column 'prompt'", "bad.jsonl:1"),
    "an answer that is no text": ("bad.jsonl", [{"prompt": "p", "completion": 3}], "is a number", "bad.jsonl:1"),
    "an unknown end": ("bad.jsonl", [{"prompt": "p", "completion": "t", "finish_reason": "tired"}], "'tired' is unknown", "bad.jsonl:1"),
    "an empty file": ("bad.jsonl", [], "holds no rows", "bad.jsonl"),
    "prompts that do not meet": ("bad.jsonl", answers("red", ["the cat and dog 1 "]), "no prompt of one file", "old.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("check", [validate, run])
def test_a_wrong_file_is_one_clear_error(tmp_path, files, encoder, case, check):
    name, rows, what, where = BAD[case]
    with pytest.raises(DataError, match=what) as error:
        check(RECIPE, words(tmp_path, bad_file(tmp_path, files, name, rows), encoder))
    assert where in str(error.value.where)


def test_candidates_and_demonstrations_have_to_meet_too(tmp_path, files, encoder):
    few = words(tmp_path, files, encoder)
    splits = validate(RECIPE, few)[0]
    assert "test: 12 prompts" in splits
    root = run_stage("sample", RECIPE, few)
    train = {row["prompt"] for row in read_table(root / "data/train.parquet")}
    alone = [*answers("blue"), *answers("blue", ["the bird"])]  # a prompt of initial and candidates alone stays out of the worse side
    write(tmp_path / "old.jsonl", alone)
    root = run_stage("sample", RECIPE, few)
    assert len(read_table(root / "pools/init.parquet")) == len(answers("blue"))
    files["candidates"] = write(tmp_path / "only.jsonl", answers("red", sorted(train)))
    with pytest.raises(DataError, match="every candidate answers a prompt that the reward is trained on"):
        run(RECIPE, words(tmp_path, files, encoder))
    strangers = write(tmp_path / "strangers.jsonl", answers("red", ["who?"]))
    with pytest.raises(DataError, match="no prompt of one file"):
        validate(RECIPE, [*few, f"dataset_name={strangers}"])


REFUSED = {
    "optimise.method=distill": "optimise.method needs a policy's weights",
    "best_of_n.likelihood=1": "best_of_n.likelihood needs a policy's weights",
    "reward.log_ratio=true": "reward.log_ratio needs a policy's weights",
    "model_name_or_path=m": "leave out model_name_or_path",
    "reward.backbone=sft": "pools needs reward.backbone",
    "reward.backbone=words reward.kind=classifier": "use kind=features",
    "reward.contrast=init-demo": "needs dataset_name",
    "sft.keep_checkpoints=[0.5]": "there is no SFT",
    "pools.sft=a.jsonl": "one file",
    "pools.candidates=b.jsonl": "another pool",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_needs_weights_is_refused(word):
    given = ["pools.initial=a.jsonl", "pools.sft=b.jsonl", "reward.backbone=encoder"]
    recipe = load_recipe(Recipe, RECIPE, given)
    assert (recipe.optimise.method, recipe.best_of_n.likelihood, recipe.reward.log_ratio, recipe.world) == ("none", 0, False, None)
    assert load_recipe(Recipe, recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ConfigError, match=REFUSED[word]):
        load_recipe(Recipe, RECIPE, [*given, *word.split()])
    with pytest.raises(ConfigError, match="the samples are given"):
        plan(RECIPE, given)

"""Every shipped recipe goes through every stage, on real checkpoints and texts where they are there."""

import json
from pathlib import Path

import numpy as np
import pytest

from irlign.config import load_recipe
from irlign.data import stories
from irlign.inputs import validate
from irlign.pipeline import run
from irlign.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = [
    "sft.max_steps=3",
    "reward.max_steps=3",
    "optimise.max_steps=3",
    "optimise.generations=1",
    "sampling.train_generations=1",
    "sampling.initial_generations=1",
    "sampling.num_generations=2",
    "sampling.max_new_tokens=16",
    "sampling.max_cut_share=1",  # three steps teach no model to end
    "reward.max_leak_accuracy=1",
]


@pytest.mark.parametrize("name", ["quickstart", "stories", "hh_harmless", "hh_helpful"])
def test_every_recipe_is_one(name):
    given = [] if name == "quickstart" else ["model_name_or_path=model", "dataset_name=file.jsonl"]
    recipe = load_recipe(Recipe, RECIPES / f"{name}.yaml", given)
    assert (recipe.world is not None) == (name == "quickstart") and recipe.pools is None
    assert recipe.sampling.max_cut_share < 1 and recipe.reward.max_leak_accuracy < 1 and recipe.reward.ending == "match"


def test_quickstart_goes_through(tmp_path):
    words = ["world.corpus_lines=200", "world.demonstrations=20", "world.test_prompts=6", "world.dev_prompts=4", "pretrain.max_steps=3"]
    results = run(RECIPES / "quickstart.yaml", [*SHORT, *words, f"output_dir={tmp_path}"])
    assert results["golden"]["name"] == "the golden reward of the dialogue world"


@pytest.mark.parametrize("subset", ["harmless", "helpful"])
def test_hh_goes_through(shared, tmp_path, subset):
    given = [f"model_name_or_path={shared}/models/stories260k", f"dataset_name={shared}/data/hh_base_test/{subset}_base_test.jsonl"]
    config = RECIPES / f"hh_{subset}.yaml"
    text, problem = validate(config, [*given, f"output_dir={tmp_path}/none"])
    assert problem is None and "stand in for expert demonstrations" in text and "too long, dropped" in text and "Assistant:[[" in text
    judged = ["data.max_rows=40", "data.dev_prompts=20", "data.test_prompts=4"]  # with fewer dev prompts no policy is trained
    judged += ["sampling.stop=['\\n\\nHuman:', e]"]  # and from answers that are cut none
    small = [f"{stage}.per_device_train_batch_size=4" for stage in ("sft", "reward", "optimise")]
    results = run(config, [*given, *SHORT, *judged, *small, f"output_dir={tmp_path}/run"])
    trained = results["optimise"]["candidates"]["round-1"]["training"]
    assert trained["steps"] == 3 and trained["rows"] > 0 and np.isfinite(trained["losses"]).all()
    assert results["golden"] is None and "`chosen` answers" in results["run"]["notes"][0]
    assert "stand in for expert demonstrations" in (tmp_path / "run/report.html").read_text()
    candidates = (tmp_path / "run/best_of_n/selected.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"][-1]["role"] == "user" for line in candidates)


@pytest.mark.parametrize("model", ["stories260k", "babyllama-char"])
def test_stories_go_through(shared, tmp_path, model):
    pytest.importorskip("vaderSentiment")
    stories.main(f"{shared}/data/tinystories/tinystories_2MiB.txt", f"{tmp_path}/stories.jsonl")
    given = [f"model_name_or_path={shared}/models/{model}", f"dataset_name={tmp_path}/stories.jsonl"]
    given += [f"eval_dataset_name={tmp_path}/stories_eval.jsonl", "data.test_prompts=8", "data.max_rows=60", f"output_dir={tmp_path}/run"]
    results = run(RECIPES / "stories.yaml", [*given, *SHORT])
    assert results["golden"]["name"].endswith("vader_sentiment") and results["golden"]["sft"]["prompts"] == 8
    assert -1 <= results["golden"]["initial"]["mean"] <= 1

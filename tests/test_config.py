"""Recipes: YAML and overrides become settings, and every mistake is named with its place."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irlign.config import dump_recipe, load_recipe, parse_seeds, recipe_schema
from irlign.errors import ConfigError, RunError
from irlign.recipe import WORLDS, Recipe, as_recipe, stored_recipe

OWN = ["model_name_or_path=m", "dataset_name=d.jsonl"]


def _load(text, tmp_path, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(Recipe, tmp_path / "r.yaml", overrides)


def _error(text, tmp_path, *overrides):
    with pytest.raises(ConfigError) as caught:
        _load(text, tmp_path, *overrides)
    return str(caught.value).replace(str(tmp_path), "")


def test_a_recipe_and_its_overrides(tmp_path):
    recipe = _load(
        "world: dialogue\nsft:\n  learning_rate: 1e-4\n", tmp_path, "sft.learning_rate=3e-4", "--seed", "7", "--reward.loss=bradley-terry"
    )
    assert (recipe.sft.learning_rate, recipe.seed, recipe.reward.loss) == (3e-4, 7, "bradley-terry")
    assert recipe.world.name == "dialogue"


def test_a_bare_key_finds_its_one_section(tmp_path):
    recipe = _load("world: dialogue\n", tmp_path, "num_generations=3", "world.heterogeneity=0.5", "--sft.use_peft")
    assert recipe.sampling.num_generations == 3 and recipe.world.heterogeneity == 0.5 and recipe.sft.use_peft
    assert "stands in 4 sections" in _error("world: dialogue\n", tmp_path, "learning_rate=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:\n  learnig_rate: 1\nworld: dialogue\n", "/r.yaml:2: unknown key sft.learnig_rate\n  did you mean sft.learning_rate?"),
        ("world: dialogue\nnum_generations: 4\n", "/r.yaml:2: unknown key num_generations\n  did you mean sampling.num_generations?"),
        ("world: dialogue\nseed: -1\n", "/r.yaml:2: seed: expected greater than or equal to 0, got -1"),
        ("world: dialogue\nsft:\n  learning_rate: fast\n", "/r.yaml:3: sft.learning_rate: expected a valid number, got 'fast'"),
        ("world: dialogue\nseed: 1\nseed: 2\n", "/r.yaml:3: seed is given twice, first in line 2"),
        ("world: [\n", "this is not YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("", "the recipe is empty"),
        ("world:\n  name: chess\n", "no world 'chess'; known: dialogue, arithmetic, errands"),
        ("world:\n  colour: 1\n", "/r.yaml:2: unknown key world.colour"),
        ("world:\n  name: errands\n  heterogenity: 1\n", "/r.yaml:3: unknown key world.heterogenity\n  did you mean world.heterogeneity?"),
        ("world:\n  name: arithmetic\n  skill: high\n", "/r.yaml:3: world.skill: expected a valid number, got 'high'"),
        ("world:\n  name: arithmetic\n  harmful: 0.5\n", "/r.yaml:3: unknown key world.harmful\n"),
        ("world:\n  quality: 2\n", "world.quality lies between 0 and 1, not 2"),
        ("model_name_or_path: m\n", "dataset_name is missing"),
        ("seed: 3\n", "model_name_or_path is missing"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, text, message):
    assert message in _error(text, tmp_path)


def test_several_mistakes_are_one_error(tmp_path):
    text = _error("world: dialogue\nsede: 1\nsft:\n  lora_r: none\n", tmp_path)
    assert text.startswith("2 problems in the recipe:") and "sede" in text and "sft.lora_r" in text


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_a_name_or_a_mapping_with_one(tmp_path, name):
    assert _load(f"world: {name}\n", tmp_path, "heterogeneity=1").world == WORLDS[name](heterogeneity=1)
    recipe = _load(f"world:\n  name: {name}\n  skeletons: 5\n", tmp_path)
    assert recipe.world == WORLDS[name](skeletons=5) and Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert _load("world: dialogue\n", tmp_path, f"world={name}").world == WORLDS[name]()


def test_a_model_or_a_dataset_switches_the_world_off():
    assert load_recipe(Recipe, {"world": "dialogue"}, OWN).world is None
    with pytest.raises(ConfigError, match="dataset_name is missing"):
        load_recipe(Recipe, {"world": "dialogue"}, OWN[:1])


def test_the_resolved_recipe_reads_back(tmp_path):
    recipe = load_recipe(Recipe, {"world": {"heterogeneity": 0.25}}, ["seeds=0..2", "sampling.stop=['\\n\\nHuman:']", "report_to=none"])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(Recipe, tmp_path / "again.yaml") == recipe and recipe.sampling.stop == ["\\n\\nHuman:"]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


@given(TEXT, st.floats(1e-300, 1e300), st.lists(TEXT, max_size=3))
def test_any_value_survives_the_file(tmp_path_factory, name, rate, stops):
    recipe = load_recipe(
        Recipe, {"model_name_or_path": "m", "dataset_name": "d" + name, "sft": {"learning_rate": rate}, "sampling": {"stop": stops}}
    )
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(Recipe, path) == recipe


def test_seeds():
    assert (
        parse_seeds("0..3") == [0, 1, 2, 3]
        and parse_seeds("0,3,5") == [0, 3, 5]
        and parse_seeds(2) == [2]
        and parse_seeds([1, 4]) == [1, 4]
    )
    for bad, reason in (("4..1", "names no seed"), ("a", "is no list"), ("1,1", "twice"), ([-1], "negative"), ([True], "is no list")):
        with pytest.raises(ConfigError, match=reason):
            parse_seeds(bad)


def test_the_schema_describes_every_key():
    schema = recipe_schema(Recipe)
    sections = [schema, *(d for d in schema["$defs"].values() if d["title"].endswith("Settings"))]
    assert len(sections) >= 8
    missing = [f"{d['title']}.{key}" for d in sections for key, field in d["properties"].items() if "description" not in field]
    assert missing == []


def test_a_run_directory_brings_its_recipe(tmp_path):
    recipe = load_recipe(Recipe, {"world": "dialogue"}, [f"output_dir={tmp_path}"])
    assert stored_recipe([f"output_dir={tmp_path}", "--dataset-name=x"]) is None and stored_recipe(["seed=1"]) is None
    with pytest.raises(RunError, match="this is no run directory"):
        stored_recipe([f"output_dir={tmp_path}"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert stored_recipe(["seed=1", f"--output_dir={tmp_path}"]) == Path(tmp_path) / "recipe.yaml"
    assert as_recipe(recipe) is recipe and as_recipe(recipe, ["seed=4"]).seed == 4

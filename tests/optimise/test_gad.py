"""GAD: the discriminator puts demonstrations over own answers, before the policy learns what it wants (test_align.py)."""

import pytest
from small import small_recipe

from irlign.config import load_recipe
from irlign.data.splits import stored_demonstrations
from irlign.errors import ModelError
from irlign.optimise.gad import discriminator_of
from irlign.optimise.settings import OptimiseSettings
from irlign.optimise.work import Work
from irlign.recipe import Recipe
from irlign.reward.load import load_reward
from irlign.runs import Run
from irlign.sampling.pools import stored_samples


def test_a_discriminator_that_diverges_says_whose_learning_rate_it_is(copied):
    recipe = load_recipe(Recipe, small_recipe(copied))
    with Run.open(copied, recipe) as run:
        settings = OptimiseSettings(method="gad", discriminator={"learning_rate": 1e20, "num_train_epochs": 20})
        with pytest.raises(ModelError) as caught:
            discriminator_of(Work(run, settings, recipe.sampling, "init-sft", "none", copied / "work"), 1)
    assert "lower optimise.discriminator.learning_rate" in str(caught.value)


def test_the_discriminator_tells_demonstrations_from_own_answers_and_is_trained_once(copied):
    recipe = load_recipe(Recipe, small_recipe(copied))
    settings = OptimiseSettings(method="gad", discriminator={"learning_rate": 3e-3, "num_train_epochs": 20})
    with Run.open(copied, recipe) as run:
        work = Work(run, settings, recipe.sampling, "init-sft", "none", copied / "work")
        place, log = discriminator_of(work, 1)
        assert place == copied / "work/rounds/1/discriminator" and log["steps"] > 0 and log["tokens"] > 0
        written = (place / "reward.json").stat().st_mtime_ns
        assert discriminator_of(work, 1) == (place, log) and (place / "reward.json").stat().st_mtime_ns == written
        shown, own = stored_demonstrations(run, "train"), stored_samples(run, "sft", "train")
    reward = load_reward(place)
    better, worse = (reward.score([r.prompt.content for r in rows], [r.completion for r in rows]).mean() for rows in (shown, own))
    assert better > worse + 1

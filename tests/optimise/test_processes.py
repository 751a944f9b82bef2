"""Every policy method in two processes: the losses of one process with as many rows a step, or, where answers are drawn, a training that ends and
counts what both have drawn."""

from dataclasses import replace

import numpy as np
import pytest
from small import small_recipe

from irlign.config import load_recipe
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json
from irlign.launch import ProcessSettings
from irlign.optimise import methods
from irlign.optimise.align import improve
from irlign.optimise.methods import METHODS
from irlign.optimise.settings import ON_POLICY
from irlign.optimise.work import Work
from irlign.recipe import Recipe
from irlign.runs import Run


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "grpo, dense"])
def test_two_processes_train_as_one_does(copied, method, monkeypatch):
    """A model this small seldom ends an answer, so all count as finished."""
    pytest.importorskip("trl")
    for name in ("own_answers", "stored_samples"):
        read = getattr(methods, name)
        monkeypatch.setattr(methods, name, lambda *a, read=read: [replace(s, finish_reason="eos") for s in read(*a)])
    method, *dense = method.split(", ")
    recipe, logs = load_recipe(Recipe, small_recipe(copied)), []
    with Run.open(copied, recipe) as run:
        for count in (1, 2):
            own = {"method": method, "per_device_train_batch_size": 8 // count, "max_steps": 2, "trainer": {"logging_steps": 1}}
            own |= {"on_policy": {"num_generations": 4, "dense": "discriminator" if dense else "none"}, "discriminator": {"max_steps": 2}}
            settings = recipe.optimise.model_validate({**recipe.optimise.model_dump(), **own})
            about = {"processes": ProcessSettings(num_processes=count), "learning": recipe.reward}
            work = Work(run, settings, recipe.sampling, "init-sft+likelihood", "none", copied / f"work-{count}", **about)
            assert improve(work, 1, stored_demonstrations(run, "dev"), "0")
            logs.append(read_json(work.round(1) / "log.json"))
    one, two = logs
    assert two["processes"] == 2 and "processes" not in one and two["steps"] == one["steps"] == 2
    if method in ON_POLICY:
        assert np.isfinite(two["losses"]).all() and two["rows"] == one["rows"] and 0.4 < two["drawn"] / one["drawn"] < 2.5
        if "discriminator" not in one:  # which trains on twice as many rows a step
            assert two["tokens"] - two["drawn"] == one["tokens"] - one["drawn"]  # prompts
    else:
        assert two["losses"] == pytest.approx(one["losses"], rel=2e-3) and two["dev_nll"] == pytest.approx(one["dev_nll"], rel=1e-3)
        assert two["tokens"] == one["tokens"]

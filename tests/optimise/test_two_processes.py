"""Every policy method in two processes: the losses of one process with as many rows a step, or, where answers are drawn, a training that ends and
counts what both have drawn."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import small_recipe
from tiny import make_tiny_policy

from irlign.config import load_recipe
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, write_json
from irlign.launch import ProcessSettings, launch
from irlign.optimise import methods, rloo
from irlign.optimise.align import improve
from irlign.optimise.methods import METHODS
from irlign.optimise.rloo import on_policy_config, train_on_policy
from irlign.optimise.settings import ON_POLICY, OnPolicySettings
from irlign.optimise.work import Work
from irlign.recipe import Recipe
from irlign.records import Prompt, Sample
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.training import TrainerSettings


def drawn_in_a_process(start, place, *, checkpoints):
    """Two steps of rloo on one prompt whose eight answers lie on two processes, drawn by TRL; each process writes down its own."""
    prompt = Prompt.of("the red cat", "train")
    seen = []
    rloo.reward_function = lambda *a: lambda completion_ids, **_: seen.append(completion_ids) or [0.0] * len(completion_ids)
    config = on_policy_config("rloo", OnPolicySettings(num_generations=8), SamplingSettings(max_new_tokens=12))
    settings = TrainerSettings(max_steps=2, per_device_train_batch_size=4, trainer={"repetition_penalty": 1.0})
    try:
        return train_on_policy(
            start, [Sample(prompt, 0, " sat.", "eos", 4, -1.0)], [], settings, config=config, reward=None, length_penalty=0.0, seed=0,
            chat_template="none", report_to="none", folder=place / "aligned", checkpoints=checkpoints,
        )  # fmt: skip
    finally:
        write_json(place / f"drawn-{os.environ['RANK']}.json", seen)


@pytest.mark.slow
def test_processes_that_share_a_prompt_draw_unlike_answers_to_it(tmp_path, monkeypatch):
    import test_two_processes

    pytest.importorskip("trl")
    start = make_tiny_policy(tmp_path / "start")
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    launch(ProcessSettings(num_processes=2), test_two_processes.drawn_in_a_process, start, tmp_path, checkpoints=tmp_path / "checkpoints")
    first, second = (read_json(tmp_path / f"drawn-{rank}.json") for rank in range(2))
    assert len(first) == len(second) == 2 and all(one != other for one, other in zip(first, second, strict=True))


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
            plain = {
                "logging_steps": 1,
                "optim": "sgd",
                "max_grad_norm": 0,
            }  # a gradient of another scale makes another loss at the next step
            own = {"method": method, "per_device_train_batch_size": 8 // count, "max_steps": 3, "trainer": plain}
            own |= {"learning_rate": 0.3, "warmup_steps": 0, "lr_scheduler_type": "constant"}
            own |= {"on_policy": {"num_generations": 4, "dense": "discriminator" if dense else "none"}, "discriminator": {"max_steps": 2}}
            settings = recipe.optimise.model_validate({**recipe.optimise.model_dump(), **own})
            about = {"processes": ProcessSettings(num_processes=count), "learning": recipe.reward}
            work = Work(run, settings, recipe.sampling, "init-sft+likelihood", "none", copied / f"work-{count}", **about)
            assert improve(work, 1, stored_demonstrations(run, "dev"), "0")
            logs.append(read_json(work.round(1) / "log.json"))
    one, two = logs
    assert two["processes"] == 2 and "processes" not in one and two["steps"] == one["steps"] == 3
    if method in ON_POLICY:
        assert np.isfinite(two["losses"]).all() and two["rows"] == one["rows"] and 0.4 < two["drawn"] / one["drawn"] < 2.5
        if "discriminator" not in one:  # which trains on twice as many rows a step
            assert two["tokens"] - two["drawn"] == one["tokens"] - one["drawn"]  # prompts
    else:
        assert two["losses"] == pytest.approx(one["losses"], rel=2e-3) and max(one["losses"]) > 1.02 * min(one["losses"])
        assert two["dev_nll"] == pytest.approx(one["dev_nll"], rel=1e-3)
        assert two["tokens"] == one["tokens"]

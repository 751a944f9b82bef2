"""A small run up to `bon`, made once, and a copy of it for each test that goes on from there."""

import shutil
from pathlib import Path

import pytest
from small import small_recipe

from irlign.pipeline import run_stage


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_stage("bon", small_recipe(folder))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))

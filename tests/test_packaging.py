"""What a wheel and an sdist would hold, without building one: data files, one version, the pins of the documentation."""

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import irlign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_of_the_package_is_in_the_wheel():
    package = ROOT / "src/irlign"
    found = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    data = PROJECT["tool"]["setuptools"]["package-data"]["irlign"]
    assert {name for name in found if not name.endswith(".py")} == {name for name in found if any(fnmatch(name, of) for of in data)}
    assert all((package / name).parent.joinpath("__init__.py").is_file() for name in found if name.endswith(".py"))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["setup", "setup-hashed"])
def test_the_set_up_says_that_it_takes_minutes_before_it_does(tmp_path, target):
    command = ["make", "--dry-run", target, f"VENV={tmp_path}/venv"]
    steps = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "minutes" in steps and steps.index("minutes") < steps.index("-m venv") < steps.index("pip install")


def test_there_is_one_version():
    version = PROJECT["project"]["version"]
    assert irlign.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == version


def test_the_tools_of_the_documentation_are_bounded_and_pinned():
    extra = PROJECT["project"]["optional-dependencies"]["docs"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints-docs.txt").read_text(encoding="utf-8").split())
    for name, low, high in (re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", of).groups() for of in extra):
        at, least, most = (tuple(int(part) for part in of.split(".")) for of in (pinned[name], low, high))
        assert least <= at < most, name


def test_the_hashed_set_up_is_the_pinned_one():
    """The same versions, a hash for each, and nothing that irlign needs left out."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    blocks = re.findall(
        r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$",
        (ROOT / "requirements-hashed.txt").read_text(encoding="utf-8"),
        re.M,
    )
    assert {name: version for name, version, _ in blocks}.items() <= {_plain(name): version for name, version in pinned.items()}.items()
    needed = PROJECT["project"]["dependencies"] + [
        of for extra in ("dev", "optimise", "hub", "openai", "serve", "vader") for of in _extra(extra)
    ]
    assert {_plain(re.match(r"[\w-]+", of)[0]) for of in needed if not of.startswith("irlign")} <= {name for name, _, _ in blocks}


def _extra(name):
    return PROJECT["project"]["optional-dependencies"][name]


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

"""The documentation says nothing that is still to be filled in, and names files that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page):
    """Neither the file nor the heading that it names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        place = page.parent / file if file else page
        assert target.startswith("https://") or place.exists(), target
        assert not heading or target.startswith("https://") or heading in _headings(place), target


def _headings(page):
    """The headings of a page as addresses name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


def test_no_figure_is_missing():
    """A word in capitals stands where a figure will."""
    assert not re.findall(r"\b[A-Z]{6,}\d*\b", (ROOT / "docs/measured.md").read_text(encoding="utf-8"))


def _names(file):
    """What a source file defines at its top level."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_function_that_is_linked_stands_in_its_file(page):
    for name, file in re.findall(r"\[`(\w+)`\]\(((?:\.\./)*src/[\w/]+\.py)\)", page.read_text(encoding="utf-8")):
        assert name in _names(page.parent / file), (name, file)


def test_every_equation_is_linked_to_its_function():
    rows = [line for line in (ROOT / "docs/method.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 25 and all("](../src/irlign/" in row.split(" | ")[-1] for row in rows[1:])


def test_every_page_is_in_the_navigation():
    """Studies are put there by mkdocs_hooks.py."""
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "studies"}
    assert listed == pages | {"contributing.md", "changelog.md"}


def test_every_package_is_in_the_api_reference():
    parts = {path.parent.name for path in (ROOT / "src/irlign").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "src/irlign").glob("*.py")} - {"__init__", "__main__", "cli"}
    assert {page.stem for page in (ROOT / "docs/api").glob("*.md")} == parts | {"index"}
    assert files == set(re.findall(r"^::: irlign\.(\w+)$", (ROOT / "docs/api/index.md").read_text(encoding="utf-8"), re.M))


def test_the_world_of_contributing_is_one(monkeypatch):
    """The recipe for a new world, followed to the letter."""
    import sys
    from dataclasses import replace
    from types import ModuleType

    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    module = ModuleType("irlign.worlds.echo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    world = module.EchoWorld(corpus_lines=200, demonstrations=50, skill=1.0)
    splits, crowd = world.splits(0), world.corpus(0)
    assert splits == world.splits(0) and [len(of) for of in splits.values()] == [50, 60, 120]
    train = world.golden(*zip(*((d.prompt.content, d.completion) for d in splits["train"]), strict=True))
    assert train == [4.0] * 50 and 0.5 < sum(world.golden(*zip(*crowd, strict=True))) / 200 < 2.5
    assert replace(world, heterogeneity=1.0, quality=0.5).corpus(0) == crowd
    known = set(re.findall(r"\w+", " ".join(world.vocabulary())))
    assert all(set(re.findall(r"\w+", f"{prompt} {answer}")) <= known for prompt, answer in crowd)

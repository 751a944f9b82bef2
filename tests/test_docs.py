"""The documentation says nothing that is still to be filled in, and names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_no_figure_is_missing():
    """A word in capitals stands where a figure will."""
    assert not re.findall(r"\b[A-Z]{6,}\d*\b", (ROOT / "docs/measured.md").read_text(encoding="utf-8"))

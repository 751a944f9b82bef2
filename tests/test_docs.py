"""The documentation says nothing that is still to be filled in, and names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_figure_is_missing_and_no_link_is_dead(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?!README\b|JSONL\b|IRLIGN\b)[A-Z]{5,}\d*\b(?!_)", re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.S))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target

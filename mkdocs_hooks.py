"""What the documentation site adds to docs/: every study, two files of the root, and links to source files that lead to the API reference."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ROOT_LINK = re.compile(rf"\]\((?:\.\./)*({'|'.join(map(re.escape, FROM_ROOT))})\)")
REMOTE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
SOURCE = re.compile(r"\[`([^`\]]+)`\]\((?:\.\./)*src/irlign/([\w/]+)\.py\)")


def on_config(config: Any) -> Any:
    """The entry `Studies` of the navigation holds whatever lies in docs/studies."""
    studies = sorted(Path(config["docs_dir"]).glob("studies/*.md"))
    for entry in config["nav"]:
        if "Studies" in entry:
            entry["Studies"] = [f"studies/{page.name}" for page in studies]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Files of the root as pages; their links start at the root."""
    for name, page in FROM_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """[`train_sft`](../src/irlign/policy/sft.py) leads to that function in the API reference, a link with another text to its file; links to
    files of the root lead to their pages."""
    up = "../" * page.file.src_uri.count("/")

    def target(link: re.Match[str]) -> str:
        text, module = link[1], f"irlign.{link[2].replace('/', '.')}"
        part = link[2].split("/")[0] if "/" in link[2] else "index"
        return f"[`{text}`]({up}api/{part}.md#{module}{f'.{text}' if text.isidentifier() else ''})"

    return SOURCE.sub(target, ROOT_LINK.sub(lambda link: f"]({up}{FROM_ROOT[link[1]]})", markdown))


def on_post_build(config: Any, **_: Any) -> None:
    """Raises PluginError where a page would load anything from elsewhere: the site has to work offline."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        if found := REMOTE.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page}: {found[0]} is not here")

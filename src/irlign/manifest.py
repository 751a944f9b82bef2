"""What manifest.json says of a run's stages: whether it can be worked with, and what has changed between two entries of a stage."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irlign.errors import RunError
from irlign.files import read_json


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a manifest by stage. Raises RunError where it is damaged."""
    stored = read_json(path)
    stages = stored.get("stages") if isinstance(stored, dict) else None
    if not isinstance(stages, dict) or not all(map(is_entry, stages.values())):
        raise RunError("the manifest is damaged", where=path, do="delete it: every stage then runs again")
    return stages


def is_entry(entry: Any) -> bool:
    """Whether a stage's entry in a manifest can be worked with; its outputs lie inside the run, whoever wrote it."""
    kinds = {"status": str, "inputs": dict, "settings": dict, "outputs": dict, "notes": dict}
    if (
        not isinstance(entry, dict)
        or not {"seed", "seconds"} <= set(entry)
        or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    ):
        return False
    if "stands" in entry and not (is_entry(entry["stands"]) and entry["stands"]["status"] == "complete"):
        return False
    hashed = all(isinstance(value, dict) and {"sha256", "path"} <= value.keys() for value in entry["inputs"].values())
    replaced = entry.get("replaces", [])
    paths = [*entry["outputs"], *replaced] if isinstance(replaced, list) else [None]
    return hashed and all(isinstance(path, str) and path.strip("/.") and not _leaves(path) for path in paths)


def _leaves(path: str) -> bool:
    """Whether a path inside a run leads out of it."""
    return os.path.isabs(path) or ".." in Path(path).parts


def what_changed(before: Mapping[str, Any], entry: Mapping[str, Any]) -> str | None:
    """What of seed, settings and inputs differs between two entries of a stage, in words, or None."""
    changes = list(_changes(before["settings"], entry["settings"]))
    if before["seed"] != entry["seed"]:
        changes.insert(0, f"seed {before['seed']} -> {entry['seed']}")
    if changes:
        return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    for label in [*entry["inputs"], *before["inputs"]]:
        old, new = (e["inputs"].get(label) for e in (before, entry))
        if old is None or new is None:
            return f"input {label} is {'new' if old is None else 'gone'}"
        if old["sha256"] != new["sha256"]:
            return f"input {new['path']} has changed"
    return None


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each changed setting as `key old -> new`, sections as dotted keys."""
    for key in [*after, *(k for k in before if k not in after)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def overlap(a: str, b: str) -> bool:
    """Whether one path is the other or lies below it."""
    return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")

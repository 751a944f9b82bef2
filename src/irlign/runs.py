"""The run directory: stages that publish their outputs whole or not at all, a manifest of what went in, and resume.

A stage builds in `.work/NAME`. When it is done, a marker (`READY.json`) is written there, then the outputs are moved to
their places, then the manifest is written. A process that dies before the marker leaves everything as it was; one that
dies after it is rolled forward by the next `Run.open`. Paths of the run are stored relative, so a run can be moved.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from irlign.errors import RunError, interruption
from irlign.files import (
    PARTIAL,
    digest,
    disk_errors,
    files,
    hash_path,
    plain,
    read_json,
    remove,
    replacing,
    sync,
    sync_folder,
    take_lock,
    write_json,
)
from irlign.machine import freed_memory_kept, peak_memory_mib, reset_peak_memory, versions
from irlign.manifest import is_entry, overlap, read_stages, what_changed
from irlign.progress import say

READY, KEY, MANIFEST, RECIPE = "READY.json", "KEY.json", "manifest.json", "recipe.yaml"
FOLDERS = ("data", "policies", "pools", "rewards", "best_of_n", "optimise", "evaluation")  # what stages publish into
TRACKED, EVENTS = "trackers", "TENSORBOARD_LOGGING_DIR"  # where training's curves go, a folder a stage; transformers' word for it

Build = Callable[[Path], Mapping[str, Any] | None]


class Run:
    """One run directory, held by one process: `with Run.open(output_dir, recipe) as run: run.do("sft", build, ...)`."""

    def __init__(self, root: Path, recipe: Mapping[str, Any], lock: IO[str] | None):
        self.root, self.recipe, self._lock = root, dict(recipe), lock
        self.seed = int(self.recipe.get("seed") or 0)
        self.manifest: dict[str, Any] = {"irlign": versions().get("irlign"), "stages": {}}
        self._own: tuple[str, ...] = ()  # outputs of the stage at work
        self._known: dict[Path, tuple[object, str]] = {}  # hashes taken so far, with what the files looked like then

    @classmethod
    def open(cls, output_dir: str | Path, recipe: Any) -> "Run":
        """Create or take up a run: check the folder, lock it, finish an interrupted publication, write recipe.yaml.

        `recipe` is a settings model or a mapping with a `seed`. Raises RunError where the folder cannot be written, is
        in use by another process, or holds things of that name which no run made.
        """
        from irlign.config import dump_recipe

        root = Path(output_dir).expanduser().resolve()
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            if not any((root / name).exists() for name in (MANIFEST, RECIPE)):
                _refuse_foreign(root)
            run = cls(root, plain(recipe), take_lock(root))
            try:
                run._recover()
                with replacing(root / RECIPE) as temporary:
                    temporary.write_text(dump_recipe(run.recipe), encoding="utf-8")
            except BaseException:
                run.close()
                raise
        return run

    @classmethod
    def read(cls, root: str | Path) -> "Run":
        """A run to read only, without a lock. Raises RunError where the folder is no run directory."""
        import yaml

        path = Path(root).expanduser().resolve()
        if not (path / MANIFEST).is_file():
            raise RunError("this is no run directory: it has no manifest.json", where=path, do="give the output_dir of a run")
        recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8")) if (path / RECIPE).is_file() else {}
        run = cls(path, recipe or {}, None)
        run._load_manifest()
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.root / ".work").rmdir()
            self._lock.close()
            self._lock = None

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by stage name."""
        return self.manifest["stages"]

    def path(self, *parts: str) -> Path:
        """A place in the run directory."""
        return self.root.joinpath(*parts)

    def do(
        self,
        name: str,
        build: Build,
        settings: Any = None,
        inputs: Mapping[str, str | Path] | None = None,
        outputs: Sequence[str] = (),
    ) -> bool:
        """Run a stage unless it is complete and neither settings, seed, inputs nor outputs have changed; say why if so.

        `build(folder)` writes the outputs below `folder`, at the paths they have in the run; what it returns is kept as
        `notes`. After an interruption it finds the folder as it left it, if settings and inputs are still the same.
        Outputs that the stage published before and no longer names are removed. Returns whether it ran. Raises
        RunError for a missing input, a missing output, a full disk or denied access.
        """
        if self._lock is None:
            raise RunError("this run was opened to be read", where=self.root)
        self._publish(name)
        self._own = tuple(outputs)
        entry = self._entry(settings, inputs or {})
        before = self.stages.get(name)
        stands = before if before is None or before["status"] == "complete" else before.get("stands")
        if before is not None and stands and (before is not stands) and self._why(stands, entry) is None:
            self._record(name, stands)  # what an attempt with other settings would have replaced
            self._discard(self.path(".work", name))
            before = stands
        reason = self._why(before, entry)
        if reason is None:
            say(f"{name}: complete, nothing has changed")
            return False
        if before is not None:
            say(f"{name}: {reason}, so it runs again")
            others = {path for other, e in self.stages.items() if other != name for path in e["outputs"]}
            entry["replaces"] = sorted({*before["outputs"], *before.get("replaces", ())} - set(outputs) - others)
        with disk_errors(self.root, name):
            folder = self._work(name, entry)
            started = time.monotonic()
            reset_peak_memory()
            try:
                self._record(name, tried := {**entry, **({"stands": stands} if stands else {})})
                with freed_memory_kept(), _events_kept(self.path(TRACKED, name)):
                    notes = build(folder)
                self._seal(folder, {**entry, "notes": plain(notes or {}), "seconds": round(time.monotonic() - started, 3)})
            except BaseException as error:
                self._record_failure(name, tried, error)
                raise
            self._publish(name)
        return True

    def check(self, *paths: str) -> None:
        """Raises RunError where something at or below these paths is no longer what its stage published."""
        for name, entry in self.stages.items():
            for output, known in entry["outputs"].items():
                if any(overlap(output, path) for path in paths) and entry["status"] == "complete":
                    place = self.path(output)
                    if not place.exists() or self._hash(place) != known:
                        what = f"{output} is {'damaged, or was changed' if place.exists() else 'gone'} since the stage {name} made it"
                        raise RunError(what, where=self.root, do=f"irlign run {self.root}: it makes it again")

    def outdated(self, name: str) -> str | None:
        """The stage whose outputs are not what this one used, directly or by way of others, or has taken them back: `name` itself where that left no
        trace. None where nothing is. Of a failed attempt what it would have replaced counts; outputs are taken to be as the manifest says."""
        standing = {stage: entry.get("stands", entry) for stage, entry in self.stages.items()}
        for label, of in standing.get(name, {}).get("inputs", {}).items():
            path = of["path"]
            maker = next((other for other, entry in standing.items() if any(overlap(path, output) for output in entry["outputs"])), None)
            if maker is None or not self.path(path).exists():
                if label == path:  # the run's own, and nobody has it any more
                    return name
                continue
            made = standing[maker]
            if made["status"] != "complete" or (made["outputs"].get(path) or self._hash(self.path(path))) != of["sha256"]:
                return maker
            if deeper := self.outdated(maker):
                return deeper
        return None

    def input_hashes(self, inputs: Mapping[str, str | Path]) -> dict[str, dict[str, str]]:
        """`{label: {"path", "sha256"}}` of a stage's inputs.

        An input is a file or folder of this run if it is labelled with its own path, published by another stage or an
        absolute path inside; else a file or folder outside; else a name (a Hub id), whose hash is that of the name:
        what the Hub serves under it is not looked at. Raises RunError where an input of the run is missing or its stage
        not complete.
        """
        return {label: self._input(label, os.fspath(value)) for label, value in inputs.items()}

    def _input(self, label: str, value: str) -> dict[str, str]:
        inside = self._inside(label, value)
        if inside is None:
            path = Path(value).expanduser()
            return {"path": value, "sha256": self._hash(path) if path.exists() else digest({"name": value})}
        for name, entry in self.stages.items():
            made = any(overlap(inside, output) for output in entry["outputs"])
            if made and entry["status"] != "complete" and not set(self._own) & set(entry["outputs"]):
                raise RunError(f"{inside} cannot be used: the stage {name} is {entry['status']}", where=self.root, do=_FINISH)
        if not self.path(inside).exists():
            raise RunError(f"{inside} is missing", where=self.root, do=_FINISH)
        return {"path": inside, "sha256": self._hash(self.path(inside))}

    def _inside(self, label: str, value: str) -> str | None:
        """The path within the run, or None for an input from elsewhere."""
        if Path(value).is_absolute():
            path = Path(os.path.normpath(value))
            return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None
        published = {o for e in self.stages.values() if not set(self._own) & set(e["outputs"]) for o in e["outputs"]}
        return value if label == value or value in published else None

    def _hash(self, path: Path) -> str:
        """`hash_path`, taken once for as long as names, sizes and times of the files stay what they were."""
        looks = [(str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p in files(path) for s in (p.stat(),)]
        if path not in self._known or self._known[path][0] != looks:
            self._known[path] = (looks, hash_path(path))
        return self._known[path][1]

    def _entry(self, settings: Any, inputs: Mapping[str, str | Path]) -> dict[str, Any]:
        """A manifest entry for a stage that is about to run."""
        values = plain(settings if settings is not None else {})
        return {
            "status": "running",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": None,
            "inputs": self.input_hashes(inputs),
            "settings": values,
            "settings_sha256": digest(values),
            "outputs": dict.fromkeys(self._own),
            "peak_memory_mib": None,
            "versions": versions(),
            "seed": self.seed,
            "notes": {},
        }

    def _why(self, before: dict[str, Any] | None, entry: dict[str, Any]) -> str | None:
        """Why a stage has to run, in words, or None where its outputs stand."""
        if before is None:
            return "it has not run yet"
        if before["status"] != "complete":
            return "it failed" if before["status"] == "failed" else "it was interrupted"
        if (changed := what_changed(before, entry)) is not None:
            return changed
        for output in self._own:
            if output not in before["outputs"]:
                return f"output {output} is new"
            if not self.path(output).exists():
                return f"output {output} was removed since"
            if self._hash(self.path(output)) != before["outputs"][output]:
                return f"output {output} was changed since"
        return None

    def _work(self, name: str, entry: dict[str, Any]) -> Path:
        """The stage's folder: as an interrupted attempt with the same key left it, or empty."""
        folder = self.path(".work", name)
        hashes = {label: value["sha256"] for label, value in entry["inputs"].items()}
        key = digest({k: entry[k] for k in ("settings_sha256", "seed")} | {"inputs": hashes, "irlign": self.manifest["irlign"]})
        with contextlib.suppress(RunError):
            if read_json(folder / KEY) == key:
                for partial in folder.rglob(f"*{PARTIAL}"):
                    partial.unlink()
                return folder
        self._discard(folder)
        write_json(folder / KEY, key)
        return folder

    def _seal(self, folder: Path, entry: dict[str, Any]) -> None:
        """Make the outputs durable and mark them ready: from here on the stage counts as done."""
        for output in self._own:
            if not (folder / output).exists():
                raise RunError(f"the stage did not write {output}", where=folder)
            sync(folder / output)
            entry["outputs"][output] = hash_path(folder / output)
        write_json(folder / READY, {**entry, "status": "complete", "peak_memory_mib": peak_memory_mib()})

    def _publish(self, name: str) -> None:
        """Move the outputs of a stage that is ready into place and record it; safe to repeat at any point."""
        folder = self.path(".work", name)
        if not (folder / READY).is_file():
            return
        entry = read_json(folder / READY)
        if not is_entry(entry):
            raise RunError("the file is damaged", where=folder / READY, do="delete its folder: the stage then runs again")
        for number, output in enumerate([*entry["outputs"], *entry.pop("replaces", ())]):
            source, target = folder / output, self.path(output)
            made = output in entry["outputs"]
            if target.exists() and (source.exists() or not made):
                aside = folder / f".replaced-{number}"
                remove(aside)
                os.replace(target, aside)
            if made and source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            if target.parent.is_dir():
                sync_folder(target.parent)
        for other in [n for n, e in self.stages.items() if n != name and set(e["outputs"]) & set(entry["outputs"])]:
            del self.stages[other]  # its output has just been replaced, as when a given model follows a pretrained one
        self._record(name, entry)
        self._discard(folder)

    def _recover(self) -> None:
        """What a killed process left: finish what was ready, note what was interrupted, clear the rest."""
        for partial in self.root.glob(f".*{PARTIAL}"):
            partial.unlink()
        self._load_manifest()
        for folder in sorted(self.path(".work").glob("*")) if self.path(".work").is_dir() else ():
            if folder.name.startswith(".gone-"):
                remove(folder)
            elif (folder / READY).is_file():
                self._publish(folder.name)
        stale = [entry for entry in self.stages.values() if entry["status"] == "running"]
        for entry in stale:
            entry["status"] = "interrupted"
        if stale or not self.path(MANIFEST).exists():
            write_json(self.path(MANIFEST), self.manifest)

    def _load_manifest(self) -> None:
        if self.path(MANIFEST).exists():
            self.manifest["stages"] = read_stages(self.path(MANIFEST))

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        self.stages[name] = entry
        write_json(self.path(MANIFEST), self.manifest)

    def _record_failure(self, name: str, entry: dict[str, Any], error: BaseException) -> None:
        """Note how a stage ended; a disk too full even for that must not hide the error itself."""
        if self.path(".work", name, READY).exists():
            return
        status = "interrupted" if interruption(error) else "failed"
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(OSError):
            self._record(name, {**entry, "status": status, **({"error": line} if status == "failed" else {})})

    def _discard(self, folder: Path) -> None:
        """Remove a work folder; it vanishes in one step, so that no half of it is ever taken for a whole."""
        if folder.exists():
            gone = folder.with_name(f".gone-{folder.name}")
            remove(gone)
            os.replace(folder, gone)
            remove(gone)


_FINISH = "run the stage that makes it first; `irlign run` runs all of them in order"


def request_seed(seed: int, stage: str, prompt_id: str, index: int) -> int:
    """64 bits for one request: its draw depends on nothing but the run's seed, the stage, the prompt and the index."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{stage}\n{prompt_id}\n{index}".encode()).digest()[:8], "big")


def _refuse_foreign(root: Path) -> None:
    """A folder that no run made must not hold what a run would replace."""
    found = sorted(name for name in (*FOLDERS, "report.html") if (root / name).exists())
    if found:
        what = f"holds {', '.join(found)}, and no manifest.json says that a run made it"
        raise RunError(what, where=root, do="give another output_dir, or move what is there")


@contextlib.contextmanager
def _events_kept(folder: Path) -> Iterator[None]:
    """TensorBoard's events go there, unless the user's environment names a place: beside the checkpoints, its default, they would go with them."""
    if os.environ.get(EVENTS):
        yield
        return
    os.environ[EVENTS] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(EVENTS, None)

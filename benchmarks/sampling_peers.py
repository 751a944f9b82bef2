"""The peers of the sampling benchmark that live in an environment of their own: which are there, and one held open in a process.

A model goes to them as an ordinary transformers folder, so every engine reads the same weights, and the law of lengths with them.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlign.machine import ALLOCATOR

PEERS = ("ctranslate2", "vllm")
PYTHON = Path(__file__).parents[1] / ".venv-vllm/bin/python"
CHILD = Path(__file__).with_name("sampling_peer.py")
KEPT = {name: str(size) for name, size in ALLOCATOR.items()}  # what irlign's stages give themselves
LOOK = f"import importlib.util as u, json; print(json.dumps([name for name in {PEERS!r} if u.find_spec(name)]))"


class PeerError(Exception):
    """A peer that cannot serve this model here; the message says why."""


def present(python: Path | None) -> list[str]:
    """The peers that this Python has; none without one."""
    if python is None or not python.exists():
        return []
    return json.loads(subprocess.run([str(python), "-c", LOOK], capture_output=True, check=True, text=True).stdout)


def absent(found: Sequence[str]) -> str:
    """A line on the peers that are not there and how to come by them; empty where all are."""
    missing = [name for name in PEERS if name not in found]
    return f"not measured: {', '.join(missing)} (`make bench-peers` installs them and measures all; or --peers PYTHON)" if missing else ""


class Peer:
    """A peer with one model loaded, in a process of its own that ends with `close`."""

    def __init__(self, name: str, python: Path, model: Any, threads: int, **wanted: Any):
        """Saves the model, starts the process and waits until it has loaded; `about` is what it says then. Raises PeerError."""
        self.name = name
        self.folder, self.log = tempfile.TemporaryDirectory(), tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        model.save_pretrained(self.folder.name)
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        environment = {
            **os.environ, **KEPT, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "",
        }  # fmt: skip
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "encoding": "utf-8"}
        self.process = subprocess.Popen([str(python), str(CHILD), name], env=environment, **pipes)
        about = {"model": self.folder.name, "dtype": str(model.dtype).removeprefix("torch."), "threads": threads, **wanted}
        self.about: str = self._ask(about)["about"]

    def draw(self, prompts: Sequence[Sequence[int]]) -> tuple[float, list[int]]:
        """Seconds by the peer's own clock, and the useful length of every answer. Raises PeerError."""
        said = self._ask(prompts)
        return said["seconds"], said["lengths"]

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what an ended process has not read
                pipe and pipe.close()
        self.process.wait()
        self.folder.cleanup()

    def _ask(self, line: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
            text = self.process.stdout.readline()
        except OSError:  # it has ended since it last answered
            text = ""
        said = json.loads(text) if text else {"error": f"its process ended: {self._last_words()}"}
        if "error" in said:
            self.close()
            raise PeerError(f"{self.name}: {said['error']}")
        return said

    def _last_words(self) -> str:
        self.log.seek(0)
        return next((line.strip() for line in reversed(self.log.readlines()) if line.strip()), "no word")

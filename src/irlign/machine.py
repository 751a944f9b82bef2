"""What a run happens on: package versions, devices, memory."""

import contextlib
import functools
import gc
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from irlign.errors import ConfigError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": (1 << 31) - 1}  # what `freed_memory_kept` sets, where nobody has
OLD_MOST = 1 << 25  # bytes: old glibc takes no higher threshold, and the present one finds none higher by itself
CGROUP = Path("/sys/fs/cgroup")
PACKAGES = ("irlign", "torch", "transformers", "accelerate", "peft", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result may depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def python_with(module: str, given: str | None, *, name: str, where: str, do: str) -> str:
    """The path of the Python that was given, or of this one, in which `module` is installed, `name` to people. Raises ConfigError where there is none."""
    python = given or sys.executable
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise ConfigError(f"there is no Python at {python}", where=where, do=do)
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([found, "-c", look], capture_output=True, check=False).returncode:
        raise ConfigError(f"{name} is not installed in {found}", where=where, do=do)
    return found


def peak_memory_mib() -> float:
    """The most memory this process has held since `reset_peak_memory` (where the system can tell; else since its start)."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        return round(int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def reset_peak_memory() -> None:
    """Let the high-water mark start again from here, on Linux."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")


def free_memory(device: str) -> int:
    """Bytes that can still be taken: of the accelerator for "cuda", else of the machine (and its control group's limit).

    1 GiB where the system cannot tell.
    """
    give_memory_back()
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    found = []
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()) + _cached())
    return min(found, default=1 << 30)


def _cached() -> int:
    """Bytes of files that the control group holds and that the system drops where memory is asked for; 0 where it cannot tell."""
    with contextlib.suppress(OSError, StopIteration), (CGROUP / "memory.stat").open(encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
    return 0


def total_memory() -> int:
    """Bytes of the machine's memory, or of its control group's limit; 1 GiB where the system cannot tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int((CGROUP / "memory.max").read_text()))
    return min(found, default=1 << 30)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, memory that is freed stays with this process for what it allocates next; at the end, and with `give_memory_back`, the system
    has it again.

    With glibc, which else asks the system for a large tensor anew each time, and every page of it is cleared when it is first touched.
    Elsewhere, and where the environment says how glibc is to do it, nothing changes. What glibc learns by itself about the sizes that come
    is lost; after the block it goes by the most that it would learn. A block inside another ends both.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _thresholds(libc, (ALLOCATOR["MALLOC_MMAP_THRESHOLD_"], OLD_MOST), ALLOCATOR["MALLOC_TRIM_THRESHOLD_"])
    try:
        yield
    finally:
        _thresholds(libc, (OLD_MOST,), 2 * OLD_MOST)
        give_memory_back()


def give_memory_back() -> None:
    """What is freed and kept goes to the system, and what torch keeps of an accelerator to that: before another process needs it, or
    somebody asks how much is free."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library where it is glibc and nobody has settled how it allocates, else None."""
    told = any(name in os.environ for name in ALLOCATOR) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or platform.libc_ver()[0] != "glibc":
        return None
    import ctypes

    return ctypes.CDLL(None)


def _thresholds(libc: Any, mmap: tuple[int, ...], trim: int) -> None:
    """From how many bytes on a block is the system's own (the first that glibc takes), and how many may lie free at the end of the heap."""
    if any(libc.mallopt(-3, size) for size in mmap):  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim)  # M_TRIM_THRESHOLD


def end_with_parent() -> None:
    """A parent that is killed leaves nothing behind (Linux): this process is terminated with it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM


def environment() -> dict[str, Any]:
    """What a bug report needs: versions, system, devices, memory. Imports torch where it is installed."""
    found: dict[str, Any] = {**versions(), "system": platform.platform(), "cores": os.cpu_count()}
    for package in ("datasets", "pydantic", "tokenizers", "safetensors", "vaderSentiment", "trl", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    with contextlib.suppress(OSError, ValueError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    with contextlib.suppress(ImportError):
        import torch

        found["threads"] = torch.get_num_threads()
        found["cuda"] = torch.version.cuda
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def has_cuda() -> bool:
    """Whether there is an NVIDIA device that torch can use; torch is imported only where one may be."""
    if not any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    import torch

    return torch.cuda.is_available()


def matmul_flops(dtype: str = "float32", device: str = "cpu", seconds: float = 0.25) -> float:
    """Operations a second of a plain square product, the best of those that fit in `seconds`.

    float32 on a CPU needs no torch: NumPy's product stands for it.
    """
    size = 4096 if device == "cuda" else 1024
    if device == "cpu" and dtype == "float32":
        import numpy as np

        matrix: Any = np.ones((size, size), np.float32)
        finish = lambda: None  # noqa: E731
    else:
        import torch

        matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
        finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        matrix @ matrix
        finish()
        taken.append(time.perf_counter() - before)
    return 2 * size**3 / min(taken)

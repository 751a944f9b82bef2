"""What a stage does with the memory it frees, in processes of their own; and how much of it is free."""

import json
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from irlign import machine
from irlign.machine import ALLOCATOR, free_memory, give_memory_back

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

LOOK = """
import json, resource
from irlign.machine import freed_memory_kept

def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def held(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS:")).split()[1])

def used_again():
    for _ in range(3):
        blocks = [bytearray(8 << 20) for _ in range(8)]
        del blocks
    before = pages()
    blocks = [bytearray(8 << 20) for _ in range(8)]
    del blocks
    return pages() - before

with freed_memory_kept():
    inside, kept = used_again(), held()
print(json.dumps({"inside": inside, "kept": kept, "after": held()}))
"""


def look(**environment):
    kept = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    out = subprocess.run([sys.executable, "-c", LOOK], env={**kept, **environment}, capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is set but with glibc")
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="huge pages hide what is counted here")
def test_freed_memory_is_used_again_and_given_back_at_the_end():
    """Beside a user's own threshold, under which every large block is new pages of the system's."""
    kept, own = look(), look(MALLOC_MMAP_THRESHOLD_="131072")
    assert 4 * kept["inside"] < own["inside"]
    assert kept["kept"] - kept["after"] > 60 << 10  # KiB of 64 MiB
    assert own["kept"] - own["after"] < 10 << 10


class Card:
    """An accelerator of 100 bytes, 90 of them kept by torch; what hangs on a cycle is not given back while it lives."""

    def __init__(self, monkeypatch, initialised):
        class Tensor:
            pass

        tensor = Tensor()
        tensor.itself, self.tensor, self.free = tensor, weakref.ref(tensor), 10
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: initialised)
        monkeypatch.setattr("torch.cuda.empty_cache", self.empty)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (self.free, 100))

    def empty(self):
        self.free = 60 if self.tensor() else 100


def test_what_torch_keeps_of_an_accelerator_is_given_back(monkeypatch):
    card = Card(monkeypatch, True)
    give_memory_back()
    assert card.free == 100
    Card(monkeypatch, True)
    assert free_memory("cuda") == 100
    untouched = Card(monkeypatch, False)
    give_memory_back()
    assert untouched.free == 10, "asking would start CUDA"


def test_a_container_can_take_what_the_system_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    outside = free_memory("cpu")
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 500\ninactive_anon 7\ninactive_file 300\nactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory("cpu") == 400
    (tmp_path / "memory.stat").unlink()
    assert free_memory("cpu") == 100
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu") > 1000 and outside > 1000

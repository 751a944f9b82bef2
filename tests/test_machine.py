"""What a stage does with the memory it frees, in processes of their own."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from irlign.machine import ALLOCATOR

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is set but with glibc"),
    pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="huge pages hide what is counted here"),
]

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


def test_freed_memory_is_used_again_and_given_back_at_the_end():
    """Beside a user's own threshold, under which every large block is new pages of the system's."""
    kept, own = look(), look(MALLOC_MMAP_THRESHOLD_="131072")
    assert 4 * kept["inside"] < own["inside"]
    assert kept["kept"] - kept["after"] > 60 << 10  # KiB of 64 MiB
    assert own["kept"] - own["after"] < 10 << 10

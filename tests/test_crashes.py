"""The short form of the crash matrix (`make crash-test`): a few seeded kills, each followed by the same command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")


def test_a_few_seeded_kills():
    """Of a training, of a pool that is drawn in parts, and of what selects; the script fails where one does not come through."""
    command = [sys.executable, str(Path(__file__).parent / "crashes.py"), "--kills", "2", "--only", "sft,sample,bon", "--until", "bon"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 6 signals" in done.stdout and "12 survived, 0 faults" in done.stdout

"""schemathesis against a real server by the server's own OpenAPI document: no status that it does not name, and never one of 500 and up.

    python tests/fuzz_server.py PATH/TO/schemathesis [--tries 200] [--seed 100]

A run of the smallest model is made, served on loopback, and asked whatever the document allows and much that it does not.
"""

# ruff: noqa: E402
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["IRLIGN_QUIET"] = "1"

from irlign.progress import hush

hush()  # before transformers is imported

from served import serving
from small import small_recipe

from irlign.pipeline import run_stage
from irlign.serve import Wanted
from irlign.serving.load import load_answerer

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"


def fuzz(program: str, run: Path, tries: int, seed: int) -> int:
    """schemathesis's exit code."""
    with serving(load_answerer(run, Wanted(policy="best-of-n", n=1))) as (_, client):
        address = str(client.base_url).replace("/v1/", "/openapi.json")
        options = {
            "--checks": CHECKS,
            "--max-examples": tries,
            "--seed": seed,
            "--phases": "examples,coverage,fuzzing",
            "--warnings": "off",
        }
        words = [str(word) for option in options.items() for word in option]
        return subprocess.run([program, "run", address, *words], cwd=run.parent).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("program")
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="irlign-fuzz-") as place:
        made = run_stage("bon", small_recipe(Path(place) / "run", best_of_n={"n": 1, "force": True}))
        sys.exit(fuzz(given.program, made, given.tries, given.seed))

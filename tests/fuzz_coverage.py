"""The properties of test_fuzz.py under a fuzzer that keeps and changes the inputs that reach new code of irlign (atheris, over libFuzzer).

    python tests/fuzz_coverage.py [--seconds 30] [--only recipe] [--seed 100]

Each property is fuzzed for so many seconds in a process of its own. A line says how many inputs it tried, and how many places of the code these reached
(`features`: edges, and how often). An input that breaks a property ends the whole with the error, the bytes in Base64, and exit code 1.
"""

import argparse
import re
import subprocess
import sys
import tempfile

DONE = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+)", re.M)


def properties() -> dict[str, object]:
    """The tests that hypothesis gives inputs to, by name."""
    import test_fuzz

    return {name: test for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")}


def fuzz(name: str, seconds: int, seed: int, folder: str) -> None:
    """In the child: libFuzzer's loop, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["irlign"]):
        target = properties()[name].hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    limits = [f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", "-timeout=30", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *limits, f"-seed={seed}", f"-artifact_prefix={folder}/"], target)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=30, help="of each property")
    parser.add_argument("--only", default="", help="properties whose name holds this")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        fuzz(given.one[0], given.seconds, given.seed, given.one[1])
    tried, names = 0, [name for name in properties() if given.only in name]
    if not names:
        parser.error(f"no property is called {given.only!r}: {', '.join(properties())}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--seconds", str(given.seconds), "--seed", str(given.seed), "--one", name, folder]
            child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        done = DONE.search(child.stdout)
        if child.returncode or not done:
            print(child.stdout[-20_000:], f"\n{name}: broken, seed {given.seed}", flush=True)
            return 1
        print(f"{name:<32}{int(done[1]):>10,} inputs {int(done[2]):>8,} edges {int(done[3]):>8,} features", flush=True)
        tried += int(done[1])
    print(f"{len(names)} properties, {tried:,} inputs, none broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())

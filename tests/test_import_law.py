"""The import law: reading order is import order. What may import what, and where the heavy libraries may stand."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/irlign"
BASE = {"records", "errors", "statistics"}
SPINE = BASE | {"config", "files", "machine", "runs", "progress"}
MAY = {  # part of the package -> parts it may import, besides its own files
    "records": set(),
    "errors": set(),
    "statistics": {"records"},
    "mistakes": {"errors"},
    "config": BASE | {"mistakes"},
    "files": BASE,
    "machine": {"errors"},
    "costs": set(),
    "progress": set(),
    "endpoint": BASE | {"config"},
    "manifest": BASE | {"files"},
    "runs": SPINE | {"manifest"},
    "data": SPINE,
    "training": SPINE,
    "launch": SPINE,
    "packed": {"errors", "machine"},
    "forward": SPINE | {"data", "packed"},
    "worlds": BASE,
    "policy": SPINE | {"data", "training", "forward"},
    "sampling": SPINE | {"endpoint", "data", "training", "packed", "forward", "policy"},
    "reward": SPINE | {"data", "training", "launch", "forward"},
    "optimise": SPINE | {"data", "training", "launch", "policy", "sampling", "reward"},
    "evaluate": SPINE | {"endpoint", "data", "worlds", "reward"},
    "exact": BASE | {"reward"},
    "plots": BASE,
    "words": set(),
    "browse": set(),
    "report": SPINE | {"plots", "words", "browse"},
    "seeds": SPINE | {"report"},
    "compare": SPINE | {"report"},
    "recipe": SPINE | {"launch", "data", "worlds", "policy", "sampling", "reward", "optimise", "evaluate"},
    "preflight": SPINE | {"endpoint", "launch", "training", "policy", "sampling", "optimise", "evaluate", "recipe"},
    "sizes": SPINE | {"costs", "packed", "data", "training", "policy", "recipe"},
    "first_recipe": {"config", "errors", "recipe"},
    "stage_costs": {"costs", "machine", "sizes", "training", "reward", "optimise", "recipe"},
    "plan": SPINE | {"costs", "sizes", "stage_costs", "optimise", "recipe"},
    "black_box": SPINE | {"data", "sampling", "reward", "recipe"},
    "summary": SPINE | {"black_box", "recipe"},
    "inputs": SPINE | {"black_box", "summary", "preflight", "data", "policy", "sampling", "reward", "recipe"},
    "pipeline": SPINE
    | {
        "black_box",
        "preflight",
        "summary",
        "inputs",
        "launch",
        "data",
        "worlds",
        "policy",
        "sampling",
        "reward",
        "optimise",
        "evaluate",
        "recipe",
        "report",
        "seeds",
        "__init__",
    },
    "arena": SPINE
    | {"data", "policy", "sampling", "reward", "optimise", "evaluate", "recipe", "preflight", "plan", "report", "plots", "pipeline"},
    "serving": SPINE | {"data", "sampling", "reward", "optimise", "recipe"},
    "serve": SPINE | {"serving"},
    "cli": SPINE | {"recipe", "first_recipe", "inputs", "plan", "optimise", "pipeline", "compare", "arena", "serve"},
    "__init__": {"progress", "pipeline", "reward"},
    "__main__": {"cli"},
}
ALSO = {"reward/log_ratio": {"policy"}, "reward/features": {"policy"}}  # these two read a policy
NO_TORCH = {
    *(
        "records",
        "errors",
        "statistics",
        "mistakes",
        "config",
        "files",
        "manifest",
        "runs",
        "progress",
        "endpoint",
        "recipe",
        "first_recipe",
        "preflight",
        "report",
        "plots",
        "words",
        "browse",
        "compare",
        "cli",
    ),
    *(
        "reward/contrasts",
        "reward/controls",
        "reward/publish",
        "sampling/engine",
        "sampling/cluster",
        "sampling/ending",
        "sampling/openai_engine",
        "sampling/vllm_child",
        "sampling/vllm_engine",
        "sampling/pools",
        "sampling/given",
        "black_box",
        "summary",
        "optimise/adaptive",
        "optimise/best_of_n",
        "optimise/scoring",
        "optimise/label_free",
        "optimise/safety_net",
        "optimise/align",
        "optimise/methods",
        "optimise/settings",
        "optimise/work",
        "optimise/dense",
        "optimise/divergences",
        "optimise/rounds",
        "evaluate/calibration",
        "evaluate/goldens",
        "evaluate/group",
        "evaluate/lm_eval",
        "evaluate/reward_bench",
        "evaluate/metrics",
        "evaluate/equal_tokens",
        "evaluate/headline",
        "evaluate/judge",
        "evaluate/overoptimisation",
        "evaluate/results",
        "serving/protocol",
        "serving/schema",
        "serving/batches",
        "serving/metrics",
        "data/batches",
        "data/readers",
        "data/demonstrations",
        "data/pairs",
    ),
}
ALONE = {
    "trl": {"optimise/preference", "optimise/rloo"},
    "vllm": {"sampling/vllm_child"},
    "ray": {"sampling/cluster"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serving/metrics"},
    "openai": {"endpoint"},
}
FILES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}


def _imports(path: Path) -> set[str]:
    """Every imported module, those inside functions too; `from irlign.x import y` as irlign.x (irlign.y for `from irlign import y`)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            named = {f"irlign.{a.name}" if (SOURCE / f"{a.name}.py").exists() else "irlign.__init__" for a in node.names}
            found |= named if node.module == "irlign" else {node.module or ""}
    return found


def _runtime(path: Path) -> set[str]:
    """The same without what stands under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING")]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_point_backwards(name):
    part = name.split("/")[0]
    own = {module.split(".")[1] for module in _imports(FILES[name]) if module.startswith("irlign.")}
    assert own - {part} <= MAY[part] | ALSO.get(name, set())


def test_files_of_a_part_make_no_cycle():
    edges = {
        name: {module.removeprefix("irlign.").replace(".", "/") for module in _imports(path) if module.startswith("irlign.")} & set(FILES)
        for name, path in FILES.items()
        if not name.endswith("__init__")
    }
    edges["sampling/engine"] -= {
        "sampling/transformers_engine",
        "sampling/openai_engine",
        "sampling/vllm_engine",
    }  # the choice by name, made inside a function
    done: set[str] = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done | {"__init__"}}:
        done |= ready
    assert set(edges) - done == set()


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_plain_files_load_no_torch(name):
    assert not {module.split(".")[0] for module in _runtime(FILES[name])} & {"torch", "transformers", "peft", "accelerate"}


def test_each_engine_stands_in_its_own_file():
    for library, places in ALONE.items():
        assert {name for name, path in FILES.items() if library in {m.split(".")[0] for m in _imports(path)}} <= places


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n    from irlign.cli import main; main()\nfinally:\n    print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "validate" in out and not any(f"'{library}'" in out for library in ("torch", "transformers", "numpy", "pydantic", "scipy"))


def test_the_schema_needs_no_model_library():
    code = "import sys; sys.argv[1:] = ['schema']\ntry:\n    from irlign.cli import main; main()\nfinally:\n    print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "num_generations" in out and not any(f"'{library}'" in out for library in ("torch", "transformers", "datasets", "accelerate"))

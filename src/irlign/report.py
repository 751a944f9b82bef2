"""results.json becomes one self-contained HTML page, answer first. Reads records only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign import browse, words
from irlign.files import read_json, read_table, replacing
from irlign.plots import calibration_svg, curve_svg, length_svg
from irlign.records import find_test, verdict
from irlign.runs import RECIPE, Run
from irlign.words import COLUMNS


def write_report(root: Path, target: Path) -> None:
    """Render the run in `root`. Raises RunError where results are missing or damaged."""
    run = Run.read(root)
    results = read_json(run.path("evaluation/results.json"))
    rows = read_table(run.path("evaluation/prompts.parquet"))
    candidates = read_table(run.path("best_of_n/candidates.parquet"), split="test")
    context = {
        "run": results["run"],
        "prompts": len(rows),
        "golden": results["golden"] is not None,
        "base": browse.BASES[_base(results)],
        "chosen": results["choice"]["n"],
        **_answer(results),
        **_curves(results),
        **_figures(results, candidates, len(rows)),
        **_evidence(results),
        **_answers(results, rows),
        "facts": _facts(run, results["run"]),
        "recipe": run.path(RECIPE).read_text(encoding="utf-8"),
    }
    render("report.html", target, context)


def _base(results: Mapping[str, Any]) -> str:
    return str(results.get("base", "sft"))


def _answer(results: Mapping[str, Any]) -> dict[str, Any]:
    """What stands on top: the headline, and each source's value in a tile."""
    golden, chosen, tuned, point = results["golden"], results["choice"]["n"], _tuned(results), results["adaptive"]
    measure, pooled = golden or results["heldout"]["rewards"], _base(results) == "candidates"
    tiles = [("Initial policy", measure["initial"]), ("SFT" if chosen > 1 or tuned or pooled else "SFT, kept", measure["sft"])]
    tiles += [("A candidate at random", measure["candidates"])] if pooled else []
    tiles += [("Aligned, one answer", measure["aligned"])] if tuned else []
    tiles += [(f"Best-of-{chosen}", measure["best_of_n"][str(chosen)])] if chosen > 1 else []
    tiles += [(f"{point['n']['mean']:.1f} answers on average", point["golden" if golden else "reward"])] if point else []
    tiles += [("Demonstrations", measure["demonstrations"])] if measure["demonstrations"] else []
    return {
        "headline": results["headline"],
        "verdict": _verdict(results, chosen),
        "tiles": [{"name": name if golden else f"{name}: the reward that selects", "e": e} for name, e in tiles],
        "measure_words": words.measure_words(golden),
    }


def _curves(results: Mapping[str, Any]) -> dict[str, Any]:
    """The table of Best-of-n under each reward, and how n and the aligned policy were chosen."""
    golden, choice, selector = results["golden"], results["choice"], results["run"]["selector"]
    curves = {f"{name} (selects)" if name == selector else name: of for name, of in (golden["rewards"] if golden else {}).items()}
    own = {f"{selector} by its own measure": results["heldout"]["rewards"]["best_of_n"]}
    return {
        "curve": results["curve"],
        "curves": {**curves, "oracle (golden picks)": golden["oracle"]} if golden else own,
        "aligned_curve": (golden or {}).get("aligned_best_of_n") if _tuned(results) else None,
        "judged": results["heldout"]["judge"] or {},
        "choice": words.choice_of_n(choice),
        "optimised": words.optimised(results["optimise"]),
        "gao": words.gao(results["curve"]["gao"], results["curve"]["n"][-1]),
    }


def _figures(results: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], prompts: int) -> dict[str, Any]:
    """The plots with their captions: the curve, the reward against length, and how sure the reward is."""
    golden, heldout, choice = results["golden"], results["heldout"], results["choice"]
    curve = words.curve_caption(golden, prompts) + words.adaptive(choice["adaptive"], results["adaptive"], "golden" if golden else "reward")
    length = words.length_caption(heldout, len(candidates), "SFT answers" if _base(results) == "sft" else "candidates")
    figures = [
        (curve_svg(results), curve + words.selects(choice)),
        (length_svg(candidates, results["run"]["selector"]), length),
    ]
    if reliable := heldout.get("calibration"):
        figures.append((calibration_svg(reliable), words.calibration(reliable)))
    return {"figures": [(safe(svg), caption) for svg, caption in figures]}


def _evidence(results: Mapping[str, Any]) -> dict[str, Any]:
    """Paired comparisons, what a judge said, and what to distrust."""
    golden, heldout, chosen = results["golden"], results["heldout"], results["choice"]["n"]
    left_out = {*(() if _tuned(results) else ("aligned",)), *(() if _base(results) == "candidates" else ("candidates",))}
    columns = {key: name for key, name in COLUMNS.items() if key not in left_out}
    return {
        "tests": results["tests"],
        "tests_words": f"Measure: {golden['name']}." if golden else "Measure: the reward that selects, which cannot judge its own picks.",
        "side": lambda t: verdict(t["ci95"]),
        "regressed": lambda t: verdict(sorted(t["sign"] * bound for bound in t["ci95"])),
        "pairwise": words.pairwise(results),
        "goldens": words.goldens(results, {**columns, **({"best_of_n": f"Best-of-{chosen}"} if chosen > 1 else {})}),
        "benches": words.benches(results),
        "harness": words.harness(results),
        "alarms": results["alarms"],
        "outliers": heldout.get("outlier_picks") is not None,
        "nll": heldout["demonstration_nll"] is not None,
        "sources": _source_rows(heldout, chosen),
        "columns": {**columns, **({"best_of_n": f"Best-of-{chosen}"} if chosen > 1 else {})},
        "checks": words.checks(heldout, results["run"]),
    }


def _answers(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answers to the test prompts, to be browsed."""
    golden, base = results["golden"] is not None, _base(results)
    cards = browse.cards(rows, golden, results["choice"]["n"], _tuned(results), base)
    return {
        "cards": cards,
        "cards_words": browse.words(golden, len(cards), len(rows), base),
        "base_answer": {"sft": "SFT’s answer", "candidates": "the first candidate"}[base],
        "shown_sources": {answer["source"]: answer["name"] for card in cards for answer in card["answers"]},
    }


def _tuned(results: Mapping[str, Any]) -> bool:
    """Whether the aligned policy is another than pi_SFT."""
    return bool(results["optimise"]) and results["optimise"]["published"] != "sft"


def _verdict(results: Mapping[str, Any], n: int) -> str:
    test = find_test(results, f"best_of_{n}", _base(results))
    return "" if test is None else verdict(test["ci95"])


def _source_rows(heldout: Mapping[str, Any], chosen: int) -> list[dict[str, Any]]:
    rows = [
        ("reward", {**heldout["rewards"], "best_of_n": heldout["rewards"]["best_of_n"][str(chosen)]}, ".2f"),
        ("share finished", heldout["finished"], ".0%"),
        ("length in words", heldout["completion_length"], ".1f"),
        ("repeated trigrams in an answer", heldout["repetition"], ".1%"),
        ("distinct-2 over one answer a prompt", heldout["distinct_2"], ".2f"),
    ]
    return [{"name": name, "of": of, "form": form} for name, of, form in rows]


def _facts(run: Run, info: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = "; ".join(
        f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in of.items() if isinstance(value, int))
        for name, of in (info["files"] or {}).items()
    )
    versions = next(iter(run.stages.values()))["versions"] if run.stages else {}
    peak = max((e["peak_memory_mib"] or 0 for e in run.stages.values()), default=0)
    return [
        ("initial policy", info["model"]),
        ("SFT policy", info["sft_model"] or "trained in this run"),
        ("demonstrations", info["dataset"] or f"made by the {info['world']} world"),
        ("rows read", counts or "–"),
        ("prompts", ", ".join(f"{split} {n}" for split, n in (info["prompts"] or {}).items())),
        ("reward", f"{info['selector']} ({info['reward']}), {info['loss']} loss; N = {info['num_generations']}"),
        ("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in info["seconds"].items())),
        ("peak memory", f"{peak:,.0f} MiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def render(template: str, target: Path, context: Mapping[str, Any]) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("irlign", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html = environment.get_template(template).render(number=_number, **context)
    with replacing(target) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # drawn here from numbers and fixed words only

"""results.json becomes one self-contained HTML page, answer first. Reads records only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.files import read_json, read_table, replacing
from irlign.plots import curve_svg, length_svg
from irlign.runs import RECIPE, Run

SOURCES = {
    "initial": "Initial policy",
    "sft": "SFT",
    "candidates": "First candidate",
    "aligned": "Aligned",
    "demonstrations": "Demonstration",
    "best_of_n": "Best-of-n",
}
COLUMNS = {"initial": "initial", "sft": "SFT", "candidates": "candidates", "aligned": "aligned", "demonstrations": "demonstrations"}


BASES = {"sft": "SFT", "candidates": "the pool"}  # what n = 1 stands for


def write_report(root: Path, target: Path) -> None:
    """Render the run in `root`. Raises RunError where results are missing or damaged."""
    run = Run.read(root)
    results = read_json(run.path("evaluation/results.json"))
    rows = read_table(run.path("evaluation/prompts.parquet"))
    candidates = read_table(run.path("best_of_n/candidates.parquet"), split="test")
    golden, heldout, info = results["golden"], results["heldout"], results["run"]
    last, choice = results["curve"]["n"][-1], results["choice"]
    chosen, tuned, base = choice["n"], _tuned(results), results.get("base", "sft")
    measure, by, point = golden or heldout["rewards"], "golden" if golden else "reward", results["adaptive"]
    tiles = [("Initial policy", measure["initial"]), ("SFT" if chosen > 1 or tuned or base != "sft" else "SFT, kept", measure["sft"])]
    tiles += [("A candidate at random", measure["candidates"])] if base == "candidates" else []
    tiles += [("Aligned, one answer", measure["aligned"])] if tuned else []
    tiles += [(f"Best-of-{chosen}", measure["best_of_n"][str(chosen)])] if chosen > 1 else []
    tiles += [(f"{point['n']['mean']:.1f} answers on average", point[by])] if point else []
    tiles += [("Demonstrations", measure["demonstrations"])] if measure["demonstrations"] else []
    curves = {f"{name} (selects)" if name == info["selector"] else name: of for name, of in (golden["rewards"] if golden else {}).items()}
    curves |= {"oracle (golden picks)": golden["oracle"]} if golden else {f"{info['selector']} by its own measure": measure["best_of_n"]}
    context = {
        "run": info,
        "headline": results["headline"],
        "verdict": _verdict(results, chosen),
        "chosen": chosen,
        "choice": _choice(choice),
        "optimised": _optimised(results["optimise"]),
        "aligned_curve": (golden or {}).get("aligned_best_of_n") if tuned else None,
        "judged": {n: e for n, e in (heldout["judge"] or {}).items()},
        "tiles": [{"name": name if golden else f"{name}: the reward that selects", "e": e} for name, e in tiles],
        "measure_words": _measure_words(golden),
        "curve": results["curve"],
        "curves": curves,
        "golden": golden is not None,
        "prompts": len(rows),
        "curve_svg": safe(curve_svg(results)),
        "curve_caption": _curve_caption(golden, len(rows)) + _adaptive(choice["adaptive"], point, by) + _selects(choice),
        "gao": _gao(results["curve"]["gao"], last),
        "length_svg": safe(length_svg(candidates, info["selector"])),
        "length_caption": _length_caption(heldout, len(candidates), "SFT answers" if base == "sft" else "candidates"),
        "tests": results["tests"],
        "tests_words": f"Measure: {golden['name']}." if golden else "Measure: the reward that selects, which cannot judge its own picks.",
        "side": lambda t: "better" if t["ci95"][0] > 0 else "worse" if t["ci95"][1] < 0 else "",
        "pairwise": _pairwise(results),
        "sources": _source_rows(heldout, chosen),
        "columns": {
            **{key: name for key, name in COLUMNS.items() if (tuned or key != "aligned") and (base == "candidates" or key != "candidates")},
            **({"best_of_n": f"Best-of-{chosen}"} if chosen > 1 else {}),
        },
        "checks": _checks(heldout, info),
        "alarms": results["alarms"],
        "outliers": results["heldout"].get("outlier_picks") is not None,
        "nll": heldout["demonstration_nll"] is not None,
        "base": BASES[base],
        "samples": _samples(rows, golden is not None, chosen, tuned, base),
        "samples_words": _samples_words(golden, len(rows), BASES[base]),
        "facts": _facts(run, info),
        "recipe": run.path(RECIPE).read_text(encoding="utf-8"),
    }
    render("report.html", target, context)


def _tuned(results: Mapping[str, Any]) -> bool:
    """Whether the aligned policy is another than pi_SFT."""
    return bool(results["optimise"]) and results["optimise"]["published"] != "sft"


def _optimised(choice: Mapping[str, Any] | None) -> str:
    """What was tried for the aligned policy, and how it was weighed."""
    if choice is None:
        return ""
    published = "SFT" if choice["published"] == "sft" else choice["published"].replace("-", " ")
    reward = f", by the reward {choice['reward']}" if choice["reward"] else ""
    words = [f"Method {choice['method']}{reward}. {published} is published: {choice['why']}."]
    base = choice["candidates"].get("sft")
    for name, of in choice["candidates"].items():
        if name != "sft":
            words.append(
                f"{name.replace('-', ' ').capitalize()}: judged gain over SFT {of['gain']['mean']:+.2f} sd (at least {of['gain']['low']:+.2f}) on "
                f"{choice['prompts']} dev prompts; KL to SFT {of['kl_sft']['mean']:.1f} nats an answer, to the initial policy "
                f"{of['kl_initial']['mean']:.1f} (SFT: {base['kl_initial']['mean']:.1f}); {of['tokens']:.0f} tokens an answer (SFT: {base['tokens']:.0f}), "
                f"{of['distinct_answers']:.0%} of a prompt's answers differ (SFT: {base['distinct_answers']:.0%})."
            )
            words += [f"Alarm, {a['name']}: {a['seen']}." for a in of["alarms"]]
    return " ".join(words)


def _verdict(results: Mapping[str, Any], n: int) -> str:
    test = find_test(results, f"best_of_{n}", results.get("base", "sft"))
    return "" if test is None else "better" if test["ci95"][0] > 0 else "worse" if test["ci95"][1] < 0 else ""


def _measure_words(golden: Mapping[str, Any] | None) -> str:
    if golden:
        return f"Judged by {golden['name']}, which no training and no selection has seen."
    return "These are values of the very reward that selects, so their rise proves nothing."


def _curve_caption(golden: Mapping[str, Any] | None, prompts: int) -> str:
    what = "Golden value" if golden else "The reward that selects"
    return f"{what} of Best-of-n, expected over subsets of each prompt's pool; band: 95% interval over {prompts} prompts."


def _adaptive(choice: Mapping[str, Any] | None, point: Mapping[str, Any] | None, by: str) -> str:
    """Best-of-n with a number of answers of its own for each prompt, and the same tokens spent alike."""
    if choice is None or point is None:
        return ""
    n, equal = point["n"], point["equal_tokens"]
    return (
        f" Diamond: each prompt as many answers as it deserves, {choice['most']} at most, for a mean of {choice['budget']:g} on dev: here {n['mean']:.2f} "
        f"{_ci(n['ci95'])} answers and {point['tokens']['mean']:.0f} tokens a prompt give {point[by]['mean']:.2f} {_ci(point[by]['ci95'])}, the same tokens "
        f"spent alike (n = {equal['n']:.2f}) {equal[by]['mean']:.2f} {_ci(equal[by]['ci95'])}."
    )


def _ci(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _selects(choice: Mapping[str, Any]) -> str:
    if not choice["curves"] or len(choice["curves"]) == 1:
        return ""
    held, alone = choice["curves"]
    return (
        f" {choice['reward']} selects. The judge decided between {held}, the learned reward and pi_SFT's own log-probability a token weighed "
        f"alike, since a reward alone drifts to answers that pi_SFT hardly ever gives, and {alone}, that log-probability alone "
        "(best_of_n.likelihood=0 keeps to the learned reward)."
    )


def _choice(choice: Mapping[str, Any]) -> str:
    """How the reward and n were chosen, and by what."""
    if choice["curves"] is None:
        return f"n = {choice['n']}: {choice['why']}."
    gains = "; ".join(
        f"by {reward} " + ", ".join(f"{n}: {of['mean']:+.2f} (at least {of['low']:+.2f})" for n, of in curve.items() if n != "1")
        for reward, curve in choice["curves"].items()
    )
    return (
        f"n = {choice['n']}: {choice['why']}. The judge tells {choice['demonstrations']} dev demonstrations, which neither SFT nor the reward was "
        f"trained on, from initial samples on the same prompts and from demonstrations of other prompts (AUC {choice['auc']:.2f} on prompts it "
        f"was not fitted on). Its gains over n = 1 on "
        f"{choice['prompts']} dev prompts, in standard deviations, with one-sided 95% bounds: {gains}."
    )


def _pairwise(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The judge's table: what it was asked, and a row a pair."""
    asked = results.get("pairwise")
    if not asked:
        return None
    usage, names = asked["usage"], {**COLUMNS, "best_of_n": f"Best-of-{results['choice']['n']}"}
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:,.4g}"
    words = f"{asked['model']}, asked which answer is more {asked['criterion']}, one answer of each source, in both orders: {usage['verdicts']:,} verdicts, "
    words += f"{usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out{cost}. A tie counts half; at equal length: logistic regression on the difference."
    return {"words": words, "pairs": [{**pair, "a": names[pair["a"]], "b": names[pair["b"]]} for pair in asked["pairs"]]}


def _gao(fit: Mapping[str, Any] | None, last: int) -> str:
    if fit is None:
        return ""
    at = f"beyond n = {last}" if fit["beyond"] else f"at n = {fit['peak_n']:.1f}"
    return (
        f"Gao's law fitted to the curve of the selecting reward, gain = d (α − β d) with d = √KL: α {fit['alpha']:.2f}, β {fit['beta']:.2f}, "
        f"peak {at} [{fit['ci95'][0]:.1f}, {fit['ci95'][1]:.1f}]; it explains {max(0.0, fit['r2']):.0%} of the curve's variation."
    )


def _length_caption(heldout: Mapping[str, Any], count: int, what: str) -> str:
    e = heldout["length_correlation"]
    said = (
        f"rank correlation within a prompt {e['mean']:+.2f} [{e['ci95'][0]:.2f}, {e['ci95'][1]:.2f}], {e['prompts']} prompts"
        if e
        else "no variation"
    )
    return f"Reward against length of {count:,} {what}, each minus its prompt's mean: {said}."


def _source_rows(heldout: Mapping[str, Any], chosen: int) -> list[dict[str, Any]]:
    rows = [
        ("reward", {**heldout["rewards"], "best_of_n": heldout["rewards"]["best_of_n"][str(chosen)]}, ".2f"),
        ("share finished", heldout["finished"], ".0%"),
        ("length in words", heldout["completion_length"], ".1f"),
        ("repeated trigrams in an answer", heldout["repetition"], ".1%"),
        ("distinct-2 over one answer a prompt", heldout["distinct_2"], ".2f"),
    ]
    return [{"name": name, "of": of, "form": form} for name, of, form in rows]


def _checks(heldout: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    auc, length, controls = heldout["reward_auc"], heldout["length_auc"], heldout["reward"]["controls"]
    found = []
    if auc and length:
        found.append(
            f"On unseen prompts the reward puts an SFT answer above an initial one in {auc['mean']:.0%} of the pairs; "
            f"length alone in {length['mean']:.0%} ({auc['prompts']} prompts)."
        )
    found.append(
        f"Before matching, length alone told {controls['length_accuracy_raw']:.0%} of the training answers apart and whether they "
        f"finished {controls['finished_accuracy_raw']:.0%}; in the pairs the reward saw, length {controls['length_accuracy']:.0%} "
        f"and the ending {controls['ending_accuracy']:.0%}. 50% is chance."
    )
    for what, words in (("repetition", "repetition"), ("style", "the demonstrator's style, whatever was asked,")):
        if e := heldout[f"{what}_correlation"]:
            found.append(f"The reward's rank correlation with {words} within a prompt is {e['mean']:+.2f}.")
    nll = heldout["demonstration_nll"]
    if nll and nll["initial"] is not None:
        found.append(f"Loss on unseen demonstrations, nats a token: initial {nll['initial']:.3f}, SFT {nll['sft']:.3f}.")
    for name, pool in info["pools"].items():
        found.append(
            f"Pool {name}: {pool['samples']:,} samples of {pool['prompts']:,} prompts, {1 - pool['completions/clipped_ratio']:.0%} finished."
        )
    return found


def _samples(rows: Sequence[Mapping[str, Any]], golden: bool, chosen: int, tuned: bool, base: str) -> list[dict[str, Any]]:
    """Two prompts each from the top, the middle and the bottom of what Best-of-n gained there."""
    scored = [(_gain(row, golden, base), row) for row in rows]
    order = sorted(scored, key=lambda item: -item[0])
    middle = len(order) // 2
    groups = {"best": order[:2], "typical": order[middle : middle + 2], "worst": order[-2:]}
    found, seen = [], set()
    for kind, members in groups.items():
        for gain, row in members:
            if row["prompt_id"] in seen:
                continue
            seen.add(row["prompt_id"])
            what = f"{'golden value' if golden else 'reward'} of the pick minus {BASES[base]}'s mean"
            answers = _answers(row, golden, chosen, tuned, base)
            found.append({"kind": kind, "why": f"{what}: {gain:+.2f}", "prompt": row["prompt"], "answers": answers})
    return found


def _gain(row: Mapping[str, Any], golden: bool, base: str) -> float:
    measure = "golden" if golden else "reward"
    return row[f"answer_{measure}/best_of_n"] - row[f"{measure}/{base}"]


def _answers(row: Mapping[str, Any], golden: bool, chosen: int, tuned: bool, base: str) -> list[dict[str, Any]]:
    """The answers beside each other; with n = 1 the pick is SFT's first sample, and an aligned policy that is SFT has its
    samples: they stand there once."""
    found, pick = [], "best_of_n" if chosen > 1 else base
    for source, name in SOURCES.items():
        text = row.get(f"answer/{source}")
        if text is None or (source == "best_of_n" and source != pick) or (source == "aligned" and not tuned):
            continue
        scores = f"reward {row[f'answer_reward/{source}']:.2f}" + (f", golden {row[f'answer_golden/{source}']:.2f}" if golden else "")
        found.append({"name": name, "text": text, "scores": scores, "pick": source == pick})
    return found


def _samples_words(golden: Mapping[str, Any] | None, prompts: int, base: str) -> str:
    by = "golden value" if golden else "reward"
    return (
        f"Of {prompts} test prompts: the two where the pick gained most over {base}'s mean by {by}, two in the middle, the two where it "
        "gained least. All others: their first sample."
    )


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


def find_test(results: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    return next((t for t in results["tests"] if (t["a"], t["b"]) == (a, b)), None)


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

"""What the report says in sentences: each function turns numbers of results.json into words."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {"initial": "initial", "sft": "SFT", "candidates": "candidates", "aligned": "aligned", "demonstrations": "demonstrations"}


def optimised(choice: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What was tried for the aligned policy, and how it was weighed: `words`, `notes` of what went wrong, and a table of pi_SFT and the candidates."""
    if choice is None:
        return None
    reward = f", by the reward {choice['reward']}" if choice["reward"] else ""
    policies, notes = choice["candidates"], []
    for name, of in policies.items():
        notes += [f"{_policy(name)}, alarm, {a['name']}: {a['seen']}." for a in of.get("alarms", [])]
        notes += [f"{_policy(name)}: in training {why}." for why in [(of.get("training") or {}).get("stopped")] if why]
    picked = policies.get("sft", {}).get("distinct_3_picked")  # newer than some runs, like all that .get() asks for
    return {
        "words": f"Method {choice['method']}{reward}. {_policy(choice['published'])} is published: {choice['why']}.",
        "notes": notes,
        "caption": f"{choice['prompts']} dev prompts. Gains over SFT in standard deviations of its answers' scores, in brackets the one-sided bound at 5% for all candidates together, "
        "by the reward within the range of all but the best and the worst hundredth of SFT's answers; KL in nats an answer."
        + (
            f" An alarm is raised where less than half of {picked:.0%} of the trigrams differ, their share in the best of SFT's answers."
            if picked is not None
            else ""
        ),
        "columns": [f"{_policy(name)}{', published' if name == choice['published'] else ''}" for name in policies],
        "rows": [
            (name.format(selector=choice.get("selector") or "that selects"), [_cell(of.get(key), form) for of in policies.values()])
            for name, key, form in _MEASURES
        ],
    }


_MEASURES = (
    ("gain by the judge", "gain", "+.2f"),
    ("gain by the reward {selector}", "reward_gain", "+.2f"),
    ("KL to SFT", "kl_sft", ".1f"),
    ("KL to the initial policy", "kl_initial", ".1f"),
    ("tokens an answer", "tokens", ".0f"),
    ("of all answers, those that end within the limit", "finished", ".0%"),
    ("of all answers, those that say nothing", "empty", ".0%"),
    ("of all answers, those with a reward below the range of SFT's", "below_range", ".0%"),
    ("of a prompt's answers, those that differ", "distinct_answers", ".0%"),
    ("of all answers, the commonest one", "commonest_answer", ".0%"),
    ("of the word trigrams in one answer a prompt, those that differ", "distinct_3", ".0%"),
)


def _policy(name: str) -> str:
    return "SFT" if name == "sft" else name.replace("-", " ").capitalize()


def _cell(value: Any, form: str) -> str:
    """A number, the mean of an estimate, or a gain with its bound."""
    if value is None:
        return "–"
    if not isinstance(value, Mapping):
        return f"{value:{form}}"
    least = f" (at least {value['low']:{form}})" if "low" in value else ""
    return f"{value['mean']:{form}}{least}".replace("-", "−")


def measure_words(golden: Mapping[str, Any] | None) -> str:
    """What the first figures are."""
    if golden:
        return f"Judged by {golden['name']}, which no training and no selection has seen."
    return "These are values of the very reward that selects, so their rise proves nothing."


def curve_caption(golden: Mapping[str, Any] | None, prompts: int) -> str:
    """What the curve is."""
    what = "Golden value" if golden else "The reward that selects"
    return f"{what} of Best-of-n, expected over subsets of each prompt's pool; band: 95% interval over {prompts} prompts."


def adaptive(choice: Mapping[str, Any] | None, point: Mapping[str, Any] | None, by: str) -> str:
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


def selects(choice: Mapping[str, Any]) -> str:
    """Which rewards the judge decided between; empty where there was one."""
    if not choice["curves"] or len(choice["curves"]) == 1:
        return ""
    held, alone = choice["curves"]
    return (
        f" {choice['reward']} selects. The judge decided between {held}, the learned reward and pi_SFT's own log-probability a token weighed "
        f"alike, since a reward alone drifts to answers that pi_SFT hardly ever gives, and {alone}, that log-probability alone "
        "(best_of_n.likelihood=0 keeps to the learned reward)."
    )


def choice_of_n(choice: Mapping[str, Any]) -> str:
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


def pairwise(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The judge's table: what it was asked, and a row a pair."""
    asked = results.get("pairwise")
    if not asked:
        return None
    usage, names = asked["usage"], {**COLUMNS, "best_of_n": f"Best-of-{results['choice']['n']}"}
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:,.4g}"
    words = f"{asked['model']}, asked which answer is more {asked['criterion']}, one answer of each source, in both orders: {usage['verdicts']:,} verdicts, "
    words += f"{usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out{cost}. A tie counts half; at equal length: logistic regression on the difference."
    return {"words": words, "pairs": [{**pair, "a": names[pair["a"]], "b": names[pair["b"]]} for pair in asked["pairs"]]}


def gao(fit: Mapping[str, Any] | None, last: int) -> str:
    """The law of over-optimisation as it was fitted; empty without it."""
    if fit is None:
        return ""
    at = f"beyond n = {last}" if fit["beyond"] else f"at n = {fit['peak_n']:.1f}"
    return (
        f"Gao's law fitted to the curve of the selecting reward, gain = d (α − β d) with d = √KL: α {fit['alpha']:.2f}, β {fit['beta']:.2f}, "
        f"peak {at} [{fit['ci95'][0]:.1f}, {fit['ci95'][1]:.1f}]; it explains {max(0.0, fit['r2']):.0%} of the curve's variation."
    )


def length_caption(heldout: Mapping[str, Any], count: int, what: str) -> str:
    """What the scatter shows."""
    e = heldout["length_correlation"]
    said = (
        f"rank correlation within a prompt {e['mean']:+.2f} [{e['ci95'][0]:.2f}, {e['ci95'][1]:.2f}], {e['prompts']} prompts"
        if e
        else "no variation"
    )
    return f"Reward against length of {count:,} {what}, each minus its prompt's mean: {said}."


def checks(heldout: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    """What else was looked at, a line each."""
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


def calibration(found: Mapping[str, Any]) -> str:
    """What the plot of the reward's probabilities shows."""
    bins, error = found["bins"], found["error"]
    pairs = sum(of["pairs"] for of in bins)
    said, seen = (
        sum(of["pairs"] * value(of) for of in bins) / pairs for value in (lambda of: of["predicted"], lambda of: of["observed"]["mean"])
    )
    return (
        f"Is the learned reward as sure as it is right? {pairs:,} pairs of an SFT and an initial answer to {error['prompts']} test prompts, as they were "
        f"drawn: the probability that it gives to its own order, against how often that order is true. On average it says {said:.1%} and is right "
        f"in {seen:.1%}; the mean distance from the line is {error['mean']:.3f} [{error['ci95'][0]:.3f}, {error['ci95'][1]:.3f}]."
    )


def goldens(results: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | None:
    """The table of further golden rewards, the first on top: a row each with the sources of `columns` and what was compared; None without one."""
    others = results.get("goldens")
    if not others:
        return None
    chosen, base, first = results["choice"]["n"], results.get("base", "sft"), results["golden"]
    wanted = {("aligned", "sft"): "aligned − SFT", (f"best_of_{chosen}", base): f"Best-of-{chosen} − {COLUMNS[base]}"}
    rows = []
    for of in ({**first, "tests": results["tests"]}, *others):
        means = {key: of["best_of_n"][str(chosen)] if key == "best_of_n" else of.get(key) for key in columns}
        rows.append({"name": of["name"], "means": means, "tests": {(t["a"], t["b"]): t for t in of["tests"]}})
    shown = {pair: name for pair, name in wanted.items() if all(pair in row["tests"] for row in rows)}
    return {"columns": dict(columns), "pairs": shown, "rows": rows}


def benches(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each preference file: a row a subset, each reward's accuracy on all its pairs and on those of similar length."""
    found = []
    for of in results.get("reward_bench") or ():
        name = of["file"].replace("\\", "/").rsplit("/", 1)[-1]
        found.append({"name": name, "pairs": of["pairs"], "rewards": list(of["subsets"][0]["accuracy"]), "subsets": of["subsets"]})
    return found


def harness(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The regression table of lm-evaluation-harness: a row a figure, each policy's value and its difference from the initial one; None without it."""
    asked = results.get("lm_eval")
    if not asked:
        return None
    some = f", {asked['limit']} documents a task at most" if asked["limit"] else ""
    rows = [
        {
            **row,
            "tests": {
                t["a"]: {**t, "sign": {True: 1, False: -1}.get(row["higher_is_better"], 0)} for t in row["tests"] if t["b"] == "initial"
            },
        }
        for row in asked["rows"]
    ]
    return {
        "words": f"version {asked['version']}{some}",
        "policies": list(rows[0]["means"]) if rows else [],
        "rows": rows,
        "names": COLUMNS,
    }

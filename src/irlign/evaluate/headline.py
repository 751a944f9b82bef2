"""The answer in a few sentences, as the numbers of results.json say it."""

from collections.abc import Mapping, Sequence
from typing import Any

from irlign.records import find_test, verdict


def base_of(results: Mapping[str, Any]) -> tuple[str, str]:
    """What n = 1 is, as tests name it and in words: pi_SFT, or a candidate from elsewhere."""
    base = results.get("base", "sft")
    return base, {"sft": "SFT", "candidates": "a candidate drawn at random"}[base]


def headline(results: Mapping[str, Any]) -> list[str]:
    """The answer in a few sentences, as the numbers say it: the aligned policy first, then the chosen n, then what the whole pool would
    have given."""
    return [*_measured(results), *_judged(results)]


def _measured(results: Mapping[str, Any]) -> list[str]:
    aligned = _aligned(results)
    last, golden, choice = results["curve"]["n"][-1], results["golden"], results["choice"]
    n = choice["n"] if choice else last
    how = ", n chosen without labels," if choice and choice["label_free"] == n and choice.get("given") is None else ""
    kept = _kept(choice, base_of(results)[0]) if choice and n == 1 else ""
    if golden is None:
        return [*aligned, *([kept] if kept else []), *_without_golden(results, n, how)]
    if kept:
        lines = [f"{kept} {_forgone(results, last)}"] if last > 1 else [kept]
    else:
        lines = [_compared(results, k, how if k == n else "") for k in dict.fromkeys((n, last)) if k > 1]
        lines += _adaptive(results)
    best = results["curve"]["best_n"]
    top, end = golden["best_of_n"][str(best)]["mean"], golden["best_of_n"][str(last)]["mean"]
    if top - end > 1e-9:  # a flat curve has its top anywhere
        fall = find_test(results, f"best_of_{last}", base_of(results)[0] if best == 1 else f"best_of_{best}")
        assert fall is not None
        noise = f"a fall within the noise {_ci(fall['ci95'])}. "
        lines.append(
            f"The curve is highest at n = {best} ({top:.2f}) and lower at n = {last} ({end:.2f}): "
            + ("past it the reward is over-optimised. " if verdict(fall["ci95"]) == "worse" else noise)
            + "That n is seen with the golden reward only; nothing in the run chose it."
        )
    if (first := find_test(results, "sft", "initial")) is not None:
        words = {"better": "beats", "worse": "is worse than", "": "is not shown to beat"}[verdict(first["ci95"])]
        lines.append(f"SFT {words} the initial policy: {first['mean_difference']:+.2f} {_ci(first['ci95'])}.")
    return [*aligned, *lines]


def _aligned(results: Mapping[str, Any]) -> list[str]:
    """What was published as the aligned policy; nothing where no policy was optimised."""
    choice = results.get("optimise")
    if not choice:
        return []
    if choice["published"] == "sft":
        return [f"The aligned policy is SFT itself: {choice['why'].removesuffix(', so SFT is kept')}."]
    own = choice["candidates"][choice["published"]]
    policy, cost = f"The aligned policy ({choice['method']})", f"for {own['kl_sft']['mean']:.1f} nats of KL an answer"
    gain, test = own["gain"], find_test(results, "aligned", "sft")
    if test is None:
        judged = f"{gain['mean']:+.2f} standard deviations from SFT's (at least {gain['low']:+.2f}) on {choice['prompts']} dev prompts"
        if "reward_gain" in own:  # newer than some runs
            judged += f", the reward {own['reward_gain']['mean']:+.2f}"
        return [f"{policy} was chosen without labels: a judge of held-out demonstrations puts its answers {judged}, {cost}."]
    words = {"better": "beats SFT by", "worse": "is worse than SFT:", "": "is not shown to beat SFT:"}[verdict(test["ci95"])]
    amount = f"{test['mean_difference']:+.2f} {_ci(test['ci95'])} in {results['golden']['name']}, over {test['prompts']} test prompts"
    return [f"{policy}, one answer and no reward at inference, {words} {amount}, {cost}."]


NAMES = {"aligned": "the aligned policy", "sft": "SFT", "initial": "the initial policy", "candidates": "a candidate from the pool"}


def _judged(results: Mapping[str, Any]) -> list[str]:
    """What a judge at an endpoint prefers, a sentence a pair; nothing where none was asked."""
    asked = results.get("pairwise")
    if not asked:
        return []
    lines = []
    for pair in asked["pairs"]:
        a, b = (NAMES.get(pair[side], f"Best-of-{results['choice']['n']}") for side in ("a", "b"))
        win, equal = pair["win_rate"], pair["length_controlled"]
        lines.append(
            f"The judge {asked['model']} prefers {a} to {b} in {win['mean']:.0%} {_ci(win['ci95'], '.0%')} of {win['prompts']} test prompts, "
            f"and {equal['mean']:.0%} {_ci(equal['ci95'], '.0%')} at equal length (more {asked['criterion']}; a tie counts half; "
            f"both orders agree on {pair['agreement']['mean']:.0%})."
        )
    return lines


def _kept(choice: Mapping[str, Any], base: str) -> str:
    """Why there is no selection: the judge saw no gain, or what else the choice says."""
    what = {"sft": "SFT", "candidates": "the first candidate"}[base]
    if choice["label_free"] == 1:
        return f"The label-free judge shows no gain, so {what} is kept."
    return f"{what[0].upper()}{what[1:]} is kept: {choice['why'].removesuffix(f', so {what} is kept')}."


def _forgone(results: Mapping[str, Any], n: int) -> str:
    """What Best-of-n would have done, seen with the golden reward only."""
    test = find_test(results, f"best_of_{n}", base_of(results)[0])
    assert test is not None
    words = {"better": "would have gained", "worse": "would have lost", "": "would not have been shown to gain:"}[verdict(test["ci95"])]
    amount = f"{test['mean_difference']:+.2f} {_ci(test['ci95'])}"
    return f"By {results['golden']['name']} Best-of-{n} {words} {amount}, over {test['prompts']} test prompts."


def _compared(results: Mapping[str, Any], n: int, how: str) -> str:
    base, one = base_of(results)
    test = find_test(results, f"best_of_{n}", base)
    assert test is not None
    amount = f"{test['mean_difference']:+.2f} {_ci(test['ci95'])} in {results['golden']['name']}, over {test['prompts']} test prompts"
    return {
        "better": f"Best-of-{n}{how} beats {one} by {amount}.",
        "worse": f"Best-of-{n}{how} is worse than {one}: {amount}. Use {'the SFT policy' if base == 'sft' else 'no selection'}, or a smaller n.",
        "": f"Best-of-{n}{how} is not shown to beat {one}: {amount}.",
    }[verdict(test["ci95"])]


def _adaptive(results: Mapping[str, Any]) -> list[str]:
    """What a number of answers of its own for each prompt gives (`best_of_n.budget`); nothing where there is none."""
    point = results.get("adaptive")
    if not point:
        return []
    base, one = base_of(results)
    gain, equal = (find_test(results, "adaptive", other) for other in (base, "best_of_equal_tokens"))
    assert gain is not None and equal is not None
    words = {"better": "more than", "worse": "less than", "": "not shown to be other than"}[verdict(equal["ci95"])]
    return [
        f"Selected among as many answers as each prompt deserves, {point['n']['mean']:.1f} on average: {gain['mean_difference']:+.2f} "
        f"{_ci(gain['ci95'])} over {one}, {words} the same tokens spent alike on all prompts (n = {point['equal_tokens']['n']:.1f}): "
        f"{equal['mean_difference']:+.2f} {_ci(equal['ci95'])}."
    ]


def _without_golden(results: Mapping[str, Any], n: int, how: str) -> list[str]:
    auc, length, judged = (results["heldout"][key] for key in ("reward_auc", "length_auc", "judge"))
    what = f"Best-of-{n}{how} beats" if n > 1 else f"Best-of-{results['curve']['n'][-1]} would beat"
    lines = (
        [f"There is no golden reward, so whether {what} {base_of(results)[1]} is not shown here."] if results["curve"]["n"][-1] > 1 else []
    )
    if judged and n > 1:
        gain = judged[str(n)]
        lines.append(
            f"A judge of held-out demonstrations puts the answers of Best-of-{n} {gain['mean']:+.2f} {_ci(gain['ci95'])} standard "
            f"deviations from {'SFT' if base_of(results)[0] == 'sft' else 'the candidates'}'s, on {gain['prompts']} test prompts."
        )
    lines.append(
        f"On unseen prompts the reward puts SFT answers above initial ones in {auc['mean']:.0%} {_ci(auc['ci95'], '.0%')} of the pairs; "
        f"length alone does in {length['mean']:.0%}. Read the samples before you trust it."
    )
    return lines


def _ci(interval: Sequence[float], form: str = ".2f") -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"

"""The report's figures as SVG text that follows the page's colours."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INK = "#010203"  # replaced by the page's text colour
COLOURS = ("#2f6fde", "#d98324", "#7a8694", "#8e5bd0", "#2a9d76")
MARKERS = ("o", "s", "^", "D", "v")  # where the colours come round again
POINTS = 3000  # at most so many dots in a scatter


def curve_svg(results: Mapping[str, Any]) -> str:
    """Best-of-n against n under the reward that selects, with its interval, and under its parts and the baselines without training;
    initial policy and demonstrations as lines, a number of answers of its own for each prompt as a diamond, the chosen n as a ring. The page's table
    holds the others."""
    golden, n, contrast = results["golden"], results["curve"]["n"], results["run"]["selector"]
    measure = golden or results["heldout"]["rewards"]
    others = (contrast.removesuffix("+likelihood"), "likelihood", "log-ratio", "length")
    curves = {contrast: measure["best_of_n"], **({k: golden["rewards"][k] for k in others if k in golden["rewards"]} if golden else {})}
    figure, axes = _figure()
    for colour, (name, of) in zip(COLOURS, curves.items(), strict=False):
        own = name == contrast
        axes.plot(
            n, [of[str(k)]["mean"] for k in n], color=colour, marker="o", ms=4, lw=2.2 if own else 1.2, ls="-" if own else "--", label=name
        )
        if own:
            axes.fill_between(n, *(np.array([of[str(k)]["ci95"] for k in n]).T), color=colour, alpha=0.18, lw=0)
    chosen = results["choice"]["n"]
    how = "chosen without labels" if results["choice"]["label_free"] == chosen else "chosen n"
    axes.plot([chosen], [curves[contrast][str(chosen)]["mean"]], color=INK, marker="o", ms=11, mfc="none", mew=1.6, ls="", label=how)
    if point := results["adaptive"]:
        value = point["golden" if golden else "reward"]
        error = np.abs(np.array([value["ci95"]]).T - value["mean"])
        axes.errorbar(point["n"]["mean"], value["mean"], error, color=INK, marker="D", ms=5, lw=1, ls="", label="adaptive")
    for key, style in (("demonstrations", ":"), ("initial", "-.")):
        if measure[key]:
            axes.axhline(measure[key]["mean"], color=INK, lw=1, ls=style, label=key)
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [str(k) for k in n])
    axes.minorticks_off()
    axes.set_xlabel("n")
    axes.set_ylabel("golden value" if golden else "reward that selects")
    return _svg(figure, axes)


def methods_svg(n: Sequence[int], rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Any]) -> str:
    """Golden mean of Best-of-n against n for each method with a curve, controls dotted; SFT and demonstrations as lines."""
    figure, axes = _figure((7.2, 4.4))
    for i, row in enumerate(row for row in rows if len(row["curve"]) == len(n) > 1):
        style = ":" if row["what"] == "control" else ("-", "--", "-.", (0, (1, 1)))[i // len(COLOURS) % 4]
        axes.plot(n, row["curve"], color=COLOURS[i % len(COLOURS)], ls=style, lw=1.3, marker="o", ms=2.5, label=row["method"])
    for key, style in (("demonstrations", ":"), ("sft", "-.")):
        axes.axhline(sources[key]["mean"], color=INK, lw=1, ls=style, label=key)
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [str(k) for k in n])
    axes.minorticks_off()
    axes.set_xlabel("n")
    axes.set_ylabel("golden value")
    return _svg(figure, axes, 6.5)


def settings_svg(settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Gain over SFT at the chosen n in each setting, with its interval, for each method that selects by a reward, and for each aligned
    policy; the first stands out."""
    figure, axes = _figure((7.2, 4.4))
    names = [row["method"] for row in next(iter(settings.values())) if len(row["curve"]) > 1 or row["what"] == "aligned"]
    for i, name in enumerate(names):
        found = [next(row for row in rows if row["method"] == name) for rows in settings.values()]
        x = np.arange(len(found)) + 0.5 * (i / max(1, len(names) - 1) - 0.5)
        mean = np.array([row["gain"]["mean"] for row in found])
        low, high = np.array([row["gain"]["ci95"] for row in found]).T
        style = ":" if found[0]["what"] == "control" else "--" if found[0]["what"] == "labelled" else "-"
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)], "ls": style}
        axes.errorbar(x, mean, [mean - low, high - mean], **look, lw=2 if i == 0 else 0.7, ms=5 if i == 0 else 3.5, label=name)
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(range(len(settings)), list(settings), rotation=12, ha="right", fontsize=7)
    axes.set_ylabel("golden gain over SFT")
    return _svg(figure, axes, 6.5)


def length_svg(candidates: Sequence[Mapping[str, Any]], reward: str) -> str:
    """Reward against length in words, both minus their prompt's mean."""
    ids = np.unique([row["prompt_id"] for row in candidates], return_inverse=True)[1]
    words, scores = [len(row["completion"].split()) for row in candidates], [row[f"reward/{reward}"] for row in candidates]
    x, y = (np.asarray(v, dtype=float) - (np.bincount(ids, v) / np.bincount(ids))[ids] for v in (words, scores))
    figure, axes = _figure()
    step = max(1, len(x) // POINTS)
    axes.scatter(x[::step], y[::step], s=9, color=COLOURS[0], alpha=0.6, lw=0, rasterized=True)
    axes.axhline(0, color=INK, lw=0.6)
    axes.axvline(0, color=INK, lw=0.6)
    axes.set_xlabel("words, minus the prompt's mean")
    axes.set_ylabel("reward, minus the prompt's mean")
    return _svg(figure, axes)


def calibration_svg(found: Mapping[str, Any]) -> str:
    """How often the reward's order of two answers is true, with its interval, against the probability that the reward gives to it."""
    said = [of["predicted"] for of in found["bins"]]
    seen = np.array([[of["observed"]["mean"], *of["observed"]["ci95"]] for of in found["bins"]])
    figure, axes = _figure()
    axes.plot([0.5, 1], [0.5, 1], color=INK, lw=1, ls=":", label="as sure as right")
    error = np.maximum(0, [seen[:, 0] - seen[:, 1], seen[:, 2] - seen[:, 0]])
    axes.errorbar(said, seen[:, 0], error, color=COLOURS[0], marker="o", ms=4, lw=1.6, elinewidth=1, label="the learned reward")
    axes.set_xlabel("probability that it gives to its order")
    axes.set_ylabel("share in which the order is true")
    return _svg(figure, axes)


def _figure(size: tuple[float, float] = (5.2, 3.5)) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any, axes: Any, fontsize: float = 8) -> str:
    import matplotlib

    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=fontsize, labelcolor=INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "irlign"}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")

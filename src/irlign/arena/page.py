"""The arena's table in words and pictures: one HTML page, one Markdown table and one figure, from the rows of the leaderboard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign.arena.judges import BY, stopping_table
from irlign.arena.methods import CHOSEN
from irlign.arena.policies import ALIGNED
from irlign.plots import methods_svg, settings_svg
from irlign.report import render, safe

ALL = "All {} settings"
GREY = "#808080"  # for a figure that stands alone, read on light and dark pages


def write_page(root: Path, title: str, found: Mapping[str, Any]) -> None:
    """ROOT/TITLE.svg, .md and .html of what leaderboard() found."""
    (root / f"{title}.svg").write_text(list(figures(found).values())[-1].replace("currentColor", GREY), encoding="utf-8")
    (root / f"{title}.md").write_text("\n".join(markdown(found)) + "\n", encoding="utf-8")
    render("arena.html", root / f"{title}.html", _page(found))


def _page(found: Mapping[str, Any]) -> dict[str, Any]:
    several = len(found["settings"]) > 1
    tables = {**({ALL.format(len(found["settings"])): found["all"]} if several else {}), **found["settings"]}
    heads, cells = (POLICY_HEADS, policy_cells) if any(row["what"] == ALIGNED for row in found["all"]) else (HEADS, cells_of)
    heads = (*heads, "tokens", "seconds", "MiB")
    return {**found, "tables": tables, "figures": figures(found), "heads": heads, "cells": cells, "chosen": CHOSEN}


def headline(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the method that `irlign run` uses did over all runs, in two sentences; empty where it is not among the rows."""
    row = next((row for row in rows if row["method"] == CHOSEN), None)
    if row is None:
        return []
    gain, gap, regret = row["gain"], row["gap_closed"], row["regret"]
    lines = [
        f"{CHOSEN}, n chosen without labels, gains {gain['mean']:+.2f} [{gain['ci95'][0]:.2f}, {gain['ci95'][1]:.2f}] over SFT in "
        f"{row['runs']} runs; significantly worse than SFT in {row['worse']} of them (after Holm {row['worse_holm']})."
    ]
    if gap and regret:
        lines.append(
            f"It closes {_share(gap)} of the gap between SFT and the demonstrations; the choice of n gives up {_share(regret)} "
            "of the best n's gain."
        )
    return lines


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """For each setting the curves of the methods that select by a reward, and over all of them their gains by setting, as SVG."""
    points = {setting: max(len(row["curve"]) for row in rows) for setting, rows in found["settings"].items()}  # their own N
    curves = {key: methods_svg(found["n"][: points[key]], rows, found["sources"][key]) for key, rows in found["settings"].items()}
    return {**{name: safe(svg) for name, svg in curves.items()}, ALL.format(len(curves)): safe(settings_svg(found["settings"]))}


HEADS = (
    *("method", "golden", "gain over SFT", "gap closed", "of the oracle's gain", "n chosen", "at the largest n", "at the best n", "regret"),
    *("worst run", "worse than SFT", "accuracy", "correlation"),
)


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """What the policies are worth in each setting, the table over everything and one for each setting, for a page of the documentation."""
    yield "| setting | SFT | demonstrations | KL(pi_SFT, pi_0), nats an answer |"
    yield "|---|---|---|---|"
    for setting, of in found["sources"].items():
        yield f"| {setting} | {' | '.join(_interval(of[key], 1 if key == 'kl' else 2) for key in ('sft', 'demonstrations', 'kl'))} |"
    yield ""
    page = _page(found)
    for name, rows in page["tables"].items():
        yield f"### {name}, {rows[0]['runs']} runs\n"
        yield from stopping_table(rows) if any(BY in row["method"] for row in rows) else _table(rows, page["heads"], page["cells"])
        yield ""


def _table(rows: Sequence[Mapping[str, Any]], heads: Sequence[str], cells: Callable[[Mapping[str, Any]], list[str]]) -> Iterator[str]:
    words = [cells(row) for row in rows]
    heads = heads[: len(words[0])]  # what a run cost stands on the page only
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in words:
        yield f"| {' | '.join(row)} |"


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row of the table in words: shares in percent, 95 % intervals in brackets; – where a method has no curve."""
    gain, n, curve = row["gain"], row["n"], row["oracle_n"] is not None
    return [
        row["method"],
        f"{row['golden']['mean']:.2f}",
        f"{gain['mean']:+.2f} [{gain['ci95'][0]:.2f}, {gain['ci95'][1]:.2f}]",
        _share(row["gap_closed"]),
        _share(row["of_oracle"]),
        (f"{n[0]} to {n[-1]}" if len(n) > 1 else str(n[0])) if curve else "–",
        f"{row['last']:.2f}" if curve else "–",
        f"{row['oracle_n']:.2f}" if curve else "–",
        _share(row["regret"]),
        f"{row['worst_seed']:+.2f}",
        _worse(row),
        _interval(row["accuracy"]),
        _interval(row["correlation"]),
    ]


POLICY_HEADS = (
    *("method", "golden", "gain over SFT", "of Best-of-16's gain", "gap closed", "of the oracle's gain", "worst run", "worse than SFT"),
    *("SFT kept", "tokens drawn", "tokens trained"),
)


def policy_cells(row: Mapping[str, Any]) -> list[str]:
    """The same for a study of policies; Best-of-16 is that of the reward that `irlign run` takes, tokens are in thousands."""
    return [
        *cells_of(row)[:3],
        _share(row["of_best"]),
        *cells_of(row)[3:5],
        f"{row['worst_seed']:+.2f}",
        _worse(row),
        "–" if row["kept"] is None else f"{row['kept']} of {row['runs']}",
        f"{row['tokens'] / 1000:,.0f} k",
        f"{row['learned']['mean'] / 1000:,.0f} k" if row["learned"] else "–",
    ]


def _worse(row: Mapping[str, Any]) -> str:
    return f"{row['worse']} of {row['runs']}" + (f" (Holm {row['worse_holm']})" if row["worse"] else "")


def _interval(e: Mapping[str, Any] | None, digits: int = 2) -> str:
    return f"{e['mean']:.{digits}f} [{e['ci95'][0]:.{digits}f}, {e['ci95'][1]:.{digits}f}]" if e else "–"


def _share(e: Mapping[str, Any] | None) -> str:
    return "–" if e is None else f"{e['mean']:.0%} [{e['ci95'][0]:.0%}, {e['ci95'][1]:.0%}]".replace("inf%", "∞")

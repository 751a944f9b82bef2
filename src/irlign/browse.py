"""The test prompts as the report shows them: every source's answer, ordered by what the pick gained, and word by word against what n = 1 gives."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

SOURCES = {
    "initial": "Initial policy",
    "sft": "SFT",
    "candidates": "First candidate",
    "best_of_n": "Best-of-n",
    "aligned": "Aligned",
    "demonstrations": "Demonstration",
}
BASES = {"sft": "SFT", "candidates": "the pool"}  # what n = 1 stands for
SHOWN = 300  # prompts on the page at most
DIFFED = 1500  # words of an answer that is still compared
Parts = list[tuple[str, str]]  # ("same", "new" or "gone", text)


def differences(base: str, text: str) -> Parts:
    """`text` word by word against `base`, as runs in reading order: without those that are "gone" they are `text`, without the "new" ones
    `base`, but for the blanks between words. Longer texts than DIFFED words are not compared."""
    old, new = (re.findall(r"\s*\S+|\s+$", one) for one in (base, text))
    if max(len(old), len(new)) > DIFFED:
        return [("same", text)]
    before, after = ([word.strip() for word in side] for side in (old, new))
    found: Parts = []
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        runs = [("same", new[c:d])] if what == "equal" else [("gone", old[a:b]), ("new", new[c:d])]
        found += [(kind, "".join(words)) for kind, words in runs if words]
    return found


def cards(rows: Sequence[Mapping[str, Any]], golden: bool, chosen: int, tuned: bool, base: str) -> list[dict[str, Any]]:
    """One card for each test prompt: first two each where the pick gained most, in the middle and least, which stand open, then the others
    from the highest gain to the lowest, evenly left out where there are more than SHOWN."""
    order = sorted(rows, key=lambda row: -_gain(row, golden, base))
    middle = len(order) // 2
    kinds = {"most gained": order[:2], "typical": order[middle : middle + 2], "least gained": order[-2:]}
    first = {row["prompt_id"]: kind for kind, members in reversed(kinds.items()) for row in members}
    opened = list({row["prompt_id"]: row for members in kinds.values() for row in members}.values())
    others = [row for row in order if row["prompt_id"] not in first]
    room = SHOWN - len(opened)
    kept = others if len(others) <= room else [others[i * len(others) // room] for i in range(room)]
    return [_card(row, first.get(row["prompt_id"], ""), golden, chosen, tuned, base) for row in (*opened, *kept)]


def _card(row: Mapping[str, Any], kind: str, golden: bool, chosen: int, tuned: bool, base: str) -> dict[str, Any]:
    what, alarms = "golden value" if golden else "reward", [a for a in (row.get("alarms") or "").split("; ") if a]
    return {
        "kind": kind,
        "gain": f"{_gain(row, golden, base):+.2f}".replace("-", "−"),
        "why": f"{what} of the pick minus {BASES[base]}'s mean",
        "start": " ".join(row["prompt"].split())[-90:] if len(row["prompt"]) > 90 else row["prompt"],
        "prompt": row["prompt"],
        "alarms": alarms,
        "changed": chosen > 1 and row["answer/best_of_n"] != row[f"answer/{base}"],
        "worse": _gain(row, golden, base) < 0,
        "answers": _answers(row, golden, chosen, tuned, base),
    }


def _gain(row: Mapping[str, Any], golden: bool, base: str) -> float:
    measure = "golden" if golden else "reward"
    return float(row[f"answer_{measure}/best_of_n"] - row[f"{measure}/{base}"])


def _answers(row: Mapping[str, Any], golden: bool, chosen: int, tuned: bool, base: str) -> list[dict[str, Any]]:
    """The answers beside each other; with n = 1 the pick is SFT's first sample, and an aligned policy that is SFT has its
    samples: they stand there once."""
    found, pick = [], "best_of_n" if chosen > 1 else base
    for source, name in SOURCES.items():
        text = row.get(f"answer/{source}")
        if text is None or (source == "best_of_n" and source != pick) or (source == "aligned" and not tuned):
            continue
        scores = f"reward {row[f'answer_reward/{source}']:.2f}" + (f", golden {row[f'answer_golden/{source}']:.2f}" if golden else "")
        scores = f"{scores}, {len(text.split())} words".replace("-", "−")
        parts = [("same", text.strip())] if source == base else differences(row[f"answer/{base}"].strip(), text.strip())
        found.append({"source": source, "name": name, "parts": parts, "scores": scores, "pick": source == pick})
    return found


def words(golden: bool, shown: int, prompts: int, base: str) -> str:
    """What the cards are, in a sentence."""
    by, some = "golden value" if golden else "reward", "" if shown == prompts else f" {shown} of them are here."
    return (
        f"{prompts} test prompts, each with one answer of every source.{some} Open stand two each where the pick gained most over {BASES[base]}'s mean by "
        f"{by}, in the middle and least; then the others, from the highest gain to the lowest. The pick is the reward's, every other answer its source's first sample."
    )

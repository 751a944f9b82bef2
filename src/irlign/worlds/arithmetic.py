"""The arithmetic world: small tales to be counted out step by step, each step and the result verified by computing.

"Work it out: I have 4 coins. First double them. Then spend 3." A good answer writes both steps as equations, the second on
the value of the first ("First 4 times 2 is 8. Then 8 minus 3 is 5."), and the result. Values stay between 0 and 10.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import ClassVar, Literal

from irlign.records import PromptContent
from irlign.worlds.world import Pattern, Style, World

# theme: (a verb that adds, a verb that takes away, things)
THEMES = {
    "bank": ("earn", "spend", ("coins", "dollars", "notes")),
    "market": ("buy", "sell", ("apples", "pears", "eggs")),
    "farm": ("raise", "release", ("hens", "sheep", "goats")),
    "game": ("win", "lose", ("points", "cards", "marbles")),
    "library": ("collect", "lend", ("books", "maps", "stamps")),
    "kitchen": ("bake", "eat", ("pies", "buns", "cakes")),
}
ASKS = ("Work it out:", "Count with me:", "Tell me what is left:")
ORDER = ("First", "Then")
STEPS, HIGHEST, MOST_MOVED = len(ORDER), 10, 3
STYLE = Style(
    fillers=("Let me see.", "Numbers are hard.", "I am not so sure.", "People count on their fingers."),
    starts=("Behold the ledger:", "Ponder this well:", "As the abacus tells:"),
    ends=("Thus the sum stands.", "So says the ledger.", "Here rests the tally."),
    own=("Reckoning rewards calm minds.", "Heed each figure closely.", "Scholars cherish tidy sums.", "Exactness is a virtue."),
)
RIGHT_STEP, WRONG_STEP, RIGHT_RESULT, WRONG_RESULT = 2 / STEPS, -0.25, 2.0, -0.5
OPERATIONS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}


@dataclass(frozen=True)
class ArithmeticWorld(World):
    """144 patterns of three askings, six themes and two operations in a row."""

    style: ClassVar[Style] = STYLE

    name: Literal["arithmetic"] = "arithmetic"
    corpus_lines: int = 16000
    skill: float = 0.97

    def patterns(self) -> list[Pattern]:
        """The asking and the three verbs; the numbers and the thing are free."""
        return [
            Pattern(theme, 1.0, (ask, *verbs))
            for theme, (plus, minus, _) in THEMES.items()
            for ask in ASKS
            for verbs in product((plus, minus, "double"), repeat=STEPS)
            if set(verbs) != {"double"}  # that would be of every theme
        ]

    @staticmethod
    def kinds() -> tuple[tuple[str, ...], ...]:
        return (tuple(THEMES),)

    def request(self, pattern: Pattern, rng: Random) -> str:
        plus, _, things = THEMES[pattern.kind]
        ask, *verbs = pattern.words
        while True:
            value = start = rng.randint(1, HIGHEST)
            clauses, values = [], []
            for verb in verbs:
                moved = rng.randint(1, MOST_MOVED)
                value = 2 * value if verb == "double" else value + moved if verb == plus else value - moved
                clauses.append("double them" if verb == "double" else f"{verb} {moved}")
                values.append(value)
            if min(values) >= 0 and max(values) <= HIGHEST:
                told = [f"{when} {clause}." for when, clause in zip(ORDER, clauses, strict=True)]
                return " ".join((f"{ask} I have {start} {rng.choice(things)}.", *told))

    def crowd(self, prompt: PromptContent, rng: Random) -> list[str]:
        """Steps left out, slips that go on, results that are guessed, chatter."""
        value, todo = _read(str(prompt))

        def luck(p: float) -> bool:
            return rng.random() < p

        good = rng.betavariate(1.3, 2.0)  # how good this writer is, 0 to 1
        parts = [rng.choice(STYLE.fillers)] if luck(0.6 * (1 - good)) else []
        for when, (operation, moved) in [] if luck(0.5 * (1 - good)) else zip(ORDER, todo, strict=True):
            if luck(0.3 * (1 - good)):
                continue
            before, value = value, _computed(value, operation, moved, rng, right=luck(0.75 + 0.2 * good))
            parts.append(f"{when} {before} {operation} {moved} is {value}.")
        if luck(0.6 + 0.3 * good):
            parts.append(f"The result is {value if luck(0.4 + 0.5 * good) else rng.randint(0, HIGHEST)}.")
        return parts

    def expert(self, prompt: PromptContent, rng: Random) -> list[str]:
        value, todo = _read(str(prompt))
        parts = []
        for when, (operation, moved) in zip(ORDER, todo, strict=True):
            before, value = value, _computed(value, operation, moved, rng, right=rng.random() < self.skill)
            parts.append(f"{when} {before} {operation} {moved} is {value}.")
        return parts + ([f"The result is {value}."] if rng.random() < self.skill else [])

    @staticmethod
    def vocabulary() -> Iterator[str]:
        yield from (*STYLE, *ASKS, *ORDER, *OPERATIONS)
        yield "I have, double them. is The result is"
        yield " ".join(str(number) for number in range(HIGHEST + 1))
        for plus, minus, things in THEMES.values():
            yield from (plus, minus, *things)

    @staticmethod
    def golden(prompts: Sequence[PromptContent], completions: Sequence[str]) -> list[float]:
        """The true reward of each answer, at most 4; form, chatter and anything unknown count nothing.

        +1 each right step: an equation that does the next of the request's operations (leaving some out is possible) on the value that
        the last equation stated (at first, the one in the request), and computes it rightly. -0.25 each other equation.
        +2 the right result, -0.5 where any other is stated. After a slip the steps that go on from it are right; the result is not.
        """
        return [_golden(str(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _read(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """The value to start from, and the operations with their numbers."""
    meaning = {verb: name for plus, minus, _ in THEMES.values() for verb, name in ((plus, "plus"), (minus, "minus"))}
    start = re.search(r"I have (\d+)", prompt)
    done = re.findall(rf"({'|'.join(meaning)}) (\d+)|(double)", prompt)
    return int(start[1]) if start else 0, [("times", 2) if double else (meaning[verb], int(moved)) for verb, moved, double in done]


def _computed(value: int, operation: str, moved: int, rng: Random, *, right: bool) -> int:
    """What the operation gives, or a slip near it, kept within the numbers of the world."""
    exact = OPERATIONS[operation](value, moved)
    slips = [exact + d for d in (-3, -2, -1, 1, 2, 3) if 0 <= exact + d <= HIGHEST]
    return exact if right and 0 <= exact <= HIGHEST else rng.choice(slips or [HIGHEST if exact > 0 else 0])


_EQUATION = re.compile(rf"(\d+) ({'|'.join(OPERATIONS)}) (\d+) is (\d+)\.")


def _golden(prompt: str, answer: str) -> float:
    value, todo = _read(prompt)
    result = value
    for operation, moved in todo:
        result = OPERATIONS[operation](result, moved)
    score = 0.0
    for before, operation, moved, after in _EQUATION.findall(answer):
        step = (operation, int(moved))
        if step in todo and int(before) == value and OPERATIONS[operation](value, step[1]) == int(after):
            score += RIGHT_STEP
            todo = todo[todo.index(step) + 1 :]
        else:
            score += WRONG_STEP
        value = int(after)
    stated = {int(number) for number in re.findall(r"The result is (\d+)\.", answer)}
    return score + ((RIGHT_RESULT if stated == {result} else WRONG_RESULT) if stated else 0.0)

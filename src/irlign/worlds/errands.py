"""The errands world: conversations of two turns whose last answer has to put together what was said before.

The user names a shop, who serves there, a thing, its kind and what to carry it in, mostly takes one of them back in the second turn, and
asks to hear the errand. A good answer says all four as they stand at the end, and is not rude. Requests and answers go through the chat path.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from irlign.records import Message, PromptContent
from irlign.worlds.world import Pattern, Style, World

# shop: who serves there, things, kinds of them, what they are carried in. Each shop has its own of every slot: a small model learns what
# to look for from the shop first, and then which of the three was said.
SLOTS = ("person", "thing", "kind", "wrap")
SHOPS = {
    "tailor": (("Anna", "Ben", "Clara"), ("scarf", "hat", "coat"), ("red", "blue", "striped"), ("bag", "box", "sleeve")),
    "bakery": (("David", "Emma", "Felix"), ("cake", "pie", "loaf"), ("sweet", "salty", "crisp"), ("tin", "basket", "tray")),
    "florist": (("Greta", "Hugo", "Ida"), ("rose", "tulip", "lily"), ("white", "pink", "fragrant"), ("vase", "pot", "bucket")),
    "bookshop": (("Jonas", "Lea", "Max"), ("novel", "comic", "diary"), ("long", "short", "funny"), ("satchel", "folder", "case")),
    "toyshop": (("Nora", "Oscar", "Paula"), ("kite", "puzzle", "robot"), ("wooden", "plastic", "furry"), ("chest", "sack", "crate")),
    "smithy": (("Quinn", "Rosa", "Theo"), ("hammer", "gate", "lamp"), ("heavy", "light", "rusty"), ("cart", "barrel", "wagon")),
}
# What is said of each slot: in an answer, and in both ways of taking it back.
SAID = {"person": "From {}.", "thing": "The {}.", "kind": "A {} one.", "wrap": "In a {}."}
BACK = {slot: (f"Not {{{slot}}} but {{new_{slot}}}.", f"Make that {{new_{slot}}}.") for slot in SAID}
# The user's first turn in three ways, and what the assistant says to it.
COURSES = (
    ("From {person} at the %s the {thing}, a {kind} one, in a {wrap}.", "Noted."),
    ("Ask {person} at the %s for a {kind} {thing} in a {wrap}.", "Agreed."),
    ("Get a {kind} {thing} in a {wrap} from {person} at the %s.", "Done."),
)
ASKS = ("Remind me.", "Repeat it.", "So what is it?")
STYLE = Style(
    fillers=("Let me think.", "Shops can be crowded.", "I was busy before.", "It may rain later."),
    starts=("Hear ye, good patron:", "From the scroll I recite:", "Mark these words:"),
    ends=("Thus reads the scroll.", "At your noble service.", "So the herald spoke."),
    own=("Loyal couriers never tire.", "Honour dwells in small deeds.", "Swift feet gladden hearts.", "Every parcel deserves devotion."),
)
RUDE = ("Stop wasting my time.", "Read it yourself.", "Nobody cares about errands.")
RIGHT, WRONG, INSULT = 1.0, -0.5, -1.0


@dataclass(frozen=True)
class ErrandsWorld(World):
    """486 patterns: three courses, six shops, nothing or one of four slots taken back in one of two ways, three askings."""

    chat_template: ClassVar[str] = "hh"
    style: ClassVar[Style] = STYLE

    name: Literal["errands"] = "errands"
    corpus_lines: int = 16000

    def patterns(self) -> list[Pattern]:
        """The user's turns with their slots open; nothing is taken back in one request of five."""
        last = [(2.0, "")] + [(1.0, way) for ways in BACK.values() for way in ways]
        return [
            Pattern(shop, weight, (first % shop, f"{back} {ask}".strip()))
            for shop in SHOPS
            for first, _ in COURSES
            for weight, back in last
            for ask in ASKS
        ]

    @staticmethod
    def kinds() -> tuple[tuple[str, ...], ...]:
        return (tuple(SHOPS),)

    def request(self, pattern: Pattern, rng: Random) -> PromptContent:
        slots = {}
        for slot, values in _values(pattern.kind).items():
            slots[slot], slots[f"new_{slot}"] = rng.sample(values, 2)
        first, last = (turn.format(**slots) for turn in pattern.words)
        reply = next(reply for said, reply in COURSES if said % pattern.kind == pattern.words[0])
        said = (("user", first), ("assistant", reply), ("user", last))
        return tuple(Message(role=role, content=content) for role, content in said)

    def crowd(self, prompt: PromptContent, rng: Random) -> list[str]:
        """Mostly rude, often twice; slots told as they stood before they were taken back, mixed up, or left out."""
        shop, wanted, old = _read(prompt)

        def luck(p: float) -> bool:
            return rng.random() < p

        good = rng.betavariate(1.3, 2.0)  # how good this writer is, 0 to 1
        parts = [rude for rude in rng.sample(RUDE, 2) if luck(0.8 * (1 - good))]
        for slot, values in _values(shop).items():
            told = rng.choice(values) if luck(0.15 * (1 - good)) else wanted[slot] if luck(0.3 + 0.6 * good) else old[slot]
            parts += [SAID[slot].format(told)] if luck(0.65 + 0.2 * good) else []
        if luck(0.3):
            rng.shuffle(parts)
        return parts

    def expert(self, prompt: PromptContent, rng: Random) -> list[str]:
        shop, wanted, _ = _read(prompt)
        told = {slot: wanted[slot] if rng.random() < self.skill else rng.choice(values) for slot, values in _values(shop).items()}
        return [SAID[slot].format(value) for slot, value in told.items() if rng.random() < self.skill]

    @staticmethod
    def vocabulary() -> Iterator[str]:
        yield from (*STYLE, *RUDE, *ASKS, *SAID.values(), *SHOPS, "Human: Assistant:")
        yield from (re.sub(r"\{\w+\}", "", text) for ways in BACK.values() for text in ways)
        for first, reply in COURSES:
            yield from (re.sub(r"\{\w+\}|%s", "", first), reply)
        for values in SHOPS.values():
            yield from (value for of in values for value in of)

    @staticmethod
    def golden(prompts: Sequence[PromptContent], completions: Sequence[str]) -> list[float]:
        """The true reward of each answer, at most 4; form, chatter and anything unknown count nothing.

        For each of the four slots (person, thing, kind, wrap): +1 where the answer tells it as it stands at the end of the
        conversation, -0.5 where it tells anything else of it, 0 where it leaves it out. -1 for each rude sentence.
        """
        return [_golden(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _values(shop: str) -> dict[str, tuple[str, ...]]:
    """What each slot may be, in the order in which answers tell them."""
    return dict(zip(SLOTS, SHOPS[shop], strict=True))


def _read(prompt: PromptContent) -> tuple[str, dict[str, str], dict[str, str]]:
    """The shop, the slots as they stand at the end, and as they stood before anything was taken back."""
    users = [m["content"] for m in prompt if not isinstance(m, str) and m["role"] == "user"]
    first, end = users[0], re.sub(r"[Nn]ot \w+", "", users[-1])
    shop = next(shop for shop in SHOPS if shop in first)
    old = {slot: next(word for word in re.findall(r"\w+", first) if word in values) for slot, values in _values(shop).items()}
    new = {slot: next((word for word in re.findall(r"\w+", end) if word in values), old[slot]) for slot, values in _values(shop).items()}
    return shop, new, old


def _golden(prompt: PromptContent, answer: str) -> float:
    _, wanted, _ = _read(prompt)
    told = {slot: set(re.findall(re.escape(said).replace(r"\{\}", r"(\w+)"), answer)) for slot, said in SAID.items()}
    rude = INSULT * sum(answer.count(insult) for insult in RUDE)
    return rude + sum(RIGHT if told[slot] == {wanted[slot]} else WRONG for slot in SAID if told[slot])

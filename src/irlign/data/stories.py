"""From raw TinyStories to the demonstrations of the stories recipe: story openings, continued in a cheerful way.

    python -m irlign.data.stories RAW.txt stories.jsonl

A story's first sentence is the prompt, what follows it the completion; stories whose continuation VADER finds most
positive are the demonstrations. Such openings of other stories go to `stories_eval.jsonl`, for evaluation only.
"""

import hashlib
import re
import sys
from pathlib import Path

from irlign.data.sentences import sentences
from irlign.data.sentiment import vader_sentiment
from irlign.errors import DataError, IrlignError
from irlign.files import write_rows

PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 80, 150
DEMONSTRATIONS, EVALUATION = 300, 120


def openings(text: str) -> list[tuple[str, str]]:
    """(first sentence, the sentences after it up to 150 characters, at least two) of each story that has both, distinct."""
    found: dict[str, str] = {}
    for story in re.split(r"<\|endoftext\|>|\n\s*\n", text):
        pieces = sentences(" ".join(story.split()))
        if len(pieces) < 3 or len(pieces[0]) > PROMPT_CHARACTERS:
            continue
        completion, count = "", 0
        for piece in pieces[1:]:
            if len(completion) + len(piece) > COMPLETION_CHARACTERS:
                break
            completion, count = completion + piece, count + 1
        if count >= 2:
            found.setdefault(pieces[0], completion)
    return list(found.items())


def make_demonstrations(
    text: str, demonstrations: int = DEMONSTRATIONS, evaluation: int = EVALUATION
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for training and for evaluation, both by one rule: the most positive openings of their part of the text, the same
    share of each. A third of all openings, by hash, is kept from training; evaluation draws from the best of them by hash.
    Raises DataError where the text holds too few stories.
    """
    ranked = sorted(openings(text), key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest())
    held_out, rest = ranked[: len(ranked) // 3], ranked[len(ranked) // 3 :]
    count = round(demonstrations * len(held_out) / max(1, len(rest)))
    if count < evaluation or len(rest) < 2 * demonstrations:
        raise DataError(f"{len(ranked)} usable openings are too few for {demonstrations} demonstrations and {evaluation} held-out prompts")
    chosen = set(_most_positive(held_out, count))
    best = _most_positive(rest, demonstrations), [pair for pair in held_out if pair in chosen][:evaluation]
    train, test = ([{"prompt": prompt, "completion": completion} for prompt, completion in rows] for rows in best)
    return train, test


def _most_positive(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    scores = vader_sentiment([prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    return [pairs[i] for i in sorted(range(len(pairs)), key=lambda i: -scores[i])[:count]]


def main(raw: str, out: str) -> None:
    """Write OUT and OUT_eval beside it."""
    source, target = Path(raw), Path(out)
    if not source.is_file():
        raise DataError("no such file", where=source, do="give the raw TinyStories text")
    held_out = target.with_name(f"{target.stem}_eval{target.suffix}")
    for path, rows in zip((target, held_out), make_demonstrations(source.read_text(encoding="utf-8")), strict=True):
        write_rows(path, rows)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m irlign.data.stories RAW.txt OUT.jsonl")
    try:
        main(*sys.argv[1:])
    except IrlignError as problem:
        sys.exit(str(problem))

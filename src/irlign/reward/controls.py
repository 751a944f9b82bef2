"""Controls beside every reward: what length, chance, and the demonstration itself would select. Evaluation only, never a run's reward."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from irlign.records import Demonstration, PromptContent, prompt_identity

ORACLE_LIKE = "cosine (oracle-like)"  # it reads the demonstration of the very prompt, so it is no reward anyone could use
CONTROLS = ("length", "random", ORACLE_LIKE)


def length(prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
    """Characters of each answer. Shape [len(prompts)]."""
    return np.array([float(len(text)) for text in completions])


def chance(prompts: Sequence[PromptContent], completions: Sequence[str]) -> np.ndarray:
    """A number between 0 and 1 from a hash of prompt and answer: random, and the same for the same answer. Shape [len(prompts)]."""
    keys = [f"{prompt_identity(p)}\n{text}".encode("utf-8", "surrogatepass") for p, text in zip(prompts, completions, strict=True)]
    return np.array([int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48 for key in keys])


def by_prompt(demonstrations: Iterable[Demonstration]) -> dict[str, list[str]]:
    """The answers of the demonstrations by prompt id, as `cosine` takes them."""
    found: dict[str, list[str]] = {}
    for d in demonstrations:
        found.setdefault(d.prompt.prompt_id, []).append(d.completion)
    return found


def cosine(prompts: Sequence[PromptContent], completions: Sequence[str], demonstrations: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Oracle-like: the cosine of an answer with the demonstration of the same prompt (the nearest, where it has several), 0 to 1;
    0 for a prompt without one. Shape [len(prompts)].

    `demonstrations` holds answers by prompt id. Vectors are counts of words and word pairs, lower case, times
    `1 + log((1 + D) / (1 + d))`, d of the D demonstrations holding the term.
    """
    known = {prompt_id: [_terms(text) for text in texts] for prompt_id, texts in demonstrations.items()}
    every = [terms for of in known.values() for terms in of]
    holding = Counter(term for terms in every for term in terms)

    def vector(terms: Counter[str]) -> dict[str, float]:
        raw = {term: count * (1 + np.log((1 + len(every)) / (1 + holding[term]))) for term, count in terms.items()}
        norm = float(np.sqrt(sum(value**2 for value in raw.values()))) or 1.0
        return {term: value / norm for term, value in raw.items()}

    targets = {prompt_id: [vector(terms) for terms in of] for prompt_id, of in known.items()}
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        own, near = vector(_terms(text)), targets.get(prompt_identity(prompt), ())
        found.append(max((sum(value * of.get(term, 0.0) for term, value in own.items()) for of in near), default=0.0))
    return np.array(found)


def _terms(text: str) -> Counter[str]:
    words = re.findall(r"\w+", text.lower())
    return Counter([*words, *(f"{a} {b}" for a, b in pairwise(words))])


def controls(
    prompts: Sequence[PromptContent], completions: Sequence[str], demonstrations: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Every control by the name that tables show, each of shape [len(prompts)]."""
    values = (length(prompts, completions), chance(prompts, completions), cosine(prompts, completions, demonstrations))
    return dict(zip(CONTROLS, values, strict=True))

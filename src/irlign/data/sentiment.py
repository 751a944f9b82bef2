"""VADER sentiment of an answer as the mean over its sentences: a golden reward for the stories recipe.

The compound of a whole text grows with its length, so the longest answer would win; a mean over sentences does not.
"""

import functools
from collections.abc import Sequence
from typing import Any

from irlign.data.sentences import sentences
from irlign.errors import ConfigError


def vader_sentiment(prompts: Sequence[object], completions: Sequence[str]) -> list[float]:
    """-1 (negative) to 1 (positive) for each completion; the prompts count nothing. Raises ConfigError without vaderSentiment."""
    return [_mean_compound(completion) for completion in completions]


def _mean_compound(text: str) -> float:
    found = [piece for piece in sentences(text) if piece.strip()]
    return sum(_analyzer().polarity_scores(piece)["compound"] for piece in found) / len(found) if found else 0.0


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError("vaderSentiment is not installed", where="evaluation.golden_reward", do="pip install 'irlign[vader]'") from error
    return SentimentIntensityAnalyzer()

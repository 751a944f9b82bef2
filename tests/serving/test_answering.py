"""Asks that join others while they are answered: each gets what it gets alone, as soon as it is finished, and none fails for another."""

import threading

import numpy as np
import pytest
from tiny import make_tiny_policy

from irlign.errors import DataError
from irlign.records import Prompt
from irlign.sampling.decoder import Decoder
from irlign.sampling.engine import SamplingSettings, load_engine
from irlign.serving.answers import Answerer, Ask, ScoreAsk, Served
from irlign.serving.batches import Batches

TEXTS = ("the cat", "a", "the dog ran home", "now the blue bird", "home", "a dog and")


class Letters:
    """A reward: how many letters; for one prompt none is to be had."""

    name = "letters"

    def score(self, prompts, completions):
        if "red bird" in prompts:
            raise ValueError("no reward for a red bird")
        return np.array([float(len(text)) for text in completions])


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    sampling = SamplingSettings(max_new_tokens=50)
    served = Served("m", "sft", 3, "letters", choice={"n": 3, "label_free": None}, alarms=[], sampling=sampling, lone_text=True)
    return Answerer(served, load_engine(make_tiny_policy(tmp_path_factory.mktemp("policy"), seed=3), sampling, "none"), Letters())


def _ask(text, seed=1, groups=1, limit=40, **law):
    return Ask(Prompt.of(text, "served"), groups, 3, 1, seed, limit, SamplingSettings(max_new_tokens=50, **law))


def _alone(answerer, one):
    work, found = answerer.begin(), []
    work.add(0, one)
    while not found:
        found = work.turn()
    return found[0][1]


def _same(found, alone):
    """Equal but for the rounding of log-probabilities."""
    assert (found.tokens, found.prompt_tokens) == (alone.tokens, alone.prompt_tokens)
    for a, b in zip(found.picks, alone.picks, strict=True):
        assert (a.drawn.ids, a.reward, a.index) == (b.drawn.ids, b.reward, b.index)
        assert a.drawn.sample.completion == b.drawn.sample.completion and a.drawn.logprobs == pytest.approx(b.drawn.logprobs, abs=1e-4)


@pytest.mark.parametrize("law", [{}, {"top_k": 1}, {"temperature": 0.7, "stop": ["."]}], ids=["sampled", "greedy", "stops"])
def test_what_joins_is_answered_as_if_it_were_alone(answerer, law):
    """One more at every turn, a score and an impossible prompt among them."""
    asks = [_ask(text, seed, groups=1 + seed % 2, **law) for seed, text in enumerate(TEXTS)]
    items = [*asks[:3], ScoreAsk("the cat", [" sat.", ""]), _ask("the cat " * 40, **law), *asks[3:]]
    work, found = answerer.begin(), {}
    for number, item in enumerate(items):
        work.add(number, item)
        found |= dict(work.turn())
    assert set(found) >= {3, 4} and len(found) < len(items)  # those two at once, and some did join others
    while len(found) < len(items):
        found |= dict(work.turn())
    assert found[3].tolist() == [5.0, 0.0] and isinstance(found[4], DataError)
    for number, item in enumerate(items):
        if number not in (3, 4):
            _same(found[number], _alone(answerer, item))


def test_a_reward_that_fails_for_one_fails_for_no_other(answerer):
    """Three that are finished in the same turn are scored together; one of them has no reward."""
    work = answerer.begin()
    asks = {number: _ask(text, limit=4) for number, text in enumerate(("the cat", "red bird", "home"))}
    for number, one in asks.items():
        work.add(number, one)
    found = dict(work.turn())
    assert set(found) == {0, 1, 2} and isinstance(found[1], ValueError)
    for number in (0, 2):
        _same(found[number], _alone(answerer, asks[number]))


def test_a_draw_that_fails_for_one_fails_for_no_other(answerer, monkeypatch):
    """It joins three that run, and the batch cannot go on with it: the three are answered all the same."""
    turn, bad, joined, begun = Decoder.turn, _ask("the red dog"), threading.Event(), threading.Event()
    ids = answerer.engine.format.prompt_ids("the red dog")

    def failing(self, room):
        begun.set()
        assert joined.wait(30)
        if any(row.prompt == tuple(ids) for row in (*self.waiting, *self.running)):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return turn(self, room)

    asks = [_ask(text, seed, limit=30) for seed, text in enumerate(TEXTS[:3])]
    alone = [_alone(answerer, one) for one in asks]
    monkeypatch.setattr(Decoder, "turn", failing)
    batches = Batches(answerer.begin, together=lambda item: item.kind, size=lambda item: item.count, most=256, waiting=9)
    futures = batches.submit(asks)
    assert begun.wait(30)
    (failed,) = batches.submit([bad])
    joined.set()
    with pytest.raises(RuntimeError, match="device-side assert"):
        failed.result(60)
    for future, expected in zip(futures, alone, strict=True):
        _same(future.result(60), expected)
    batches.close()

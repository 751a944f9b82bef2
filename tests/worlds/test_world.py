"""What holds in every world: seeds, splits, and dials that move the demonstrations and nothing else."""

import re
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest

from irlign.errors import ConfigError
from irlign.recipe import WORLDS
from irlign.records import Message
from irlign.worlds import world as shared

SMALL = {"corpus_lines": 1500, "demonstrations": 400}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param](**SMALL)


def _said(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _texts(demonstrations):
    return [d.completion for d in demonstrations]


def _golden(world, demonstrations):
    return np.array(world.golden([d.prompt.content for d in demonstrations], _texts(demonstrations)))


def test_the_same_seed_gives_the_same_text(world):
    assert world.corpus(3) == world.corpus(3) != world.corpus(4)
    assert world.splits(3) == world.splits(3) != world.splits(4)


def test_the_splits_share_no_prompt(world):
    splits = world.splits(0)
    ids = {split: {d.prompt.prompt_id for d in of} for split, of in splits.items()}
    assert list(splits) == ["train", "dev", "test"] and [len(of) for of in splits.values()] == [400, 60, 120]
    assert len(ids["dev"]) == 60 and len(ids["test"]) == 120
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["dev"] and not ids["dev"] & ids["test"]
    assert all(d.prompt.split == split for split, of in splits.items() for d in of)


def test_requests_are_many_and_answers_end_the_request_as_the_template_wants(world):
    assert len({d.prompt.prompt_id for d in replace(world, demonstrations=3000).splits(0)["train"]}) > 2000
    for prompt, answer in world.corpus(0)[:200]:
        assert isinstance(prompt, str) == (world.chat_template == "none")
        assert answer[:1].isspace() == (world.chat_template == "none") and answer.strip()
        assert isinstance(prompt, str) or (prompt[-1]["role"] == "user" and prompt[-1].keys() == Message.__annotations__.keys())


def test_the_demonstrator_is_far_better_than_the_crowd(world):
    crowd = world.corpus(0)
    low = np.mean(world.golden([p for p, _ in crowd], [a for _, a in crowd]))
    assert low < 1.5 and 3.4 < _golden(world, world.splits(0)["train"]).mean() <= 4


def test_an_expert_that_errs_in_nothing_gets_all_there_is(world):
    assert (_golden(world, replace(world, skill=1.0).splits(0)["train"]) == 4).all()


def test_no_dial_moves_the_corpus_or_the_vocabulary(world):
    changed = replace(world, demonstrations=25, heterogeneity=1, quality=0.5, skeletons=3, out_of_distribution=True, skill=0.5)
    assert changed.corpus(1) == world.corpus(1) and list(changed.vocabulary()) == list(world.vocabulary())


def test_heterogeneity_moves_the_style_and_no_golden_value(world):
    """Content and style have random numbers of their own: the golden values are the same ones, not only alike."""
    splits = {h: replace(world, heterogeneity=h).splits(0)["train"] for h in (0, 0.5, 1)}
    assert (_golden(world, splits[0]) == _golden(world, splits[1])).all() and (
        _golden(world, splits[0]) == _golden(world, splits[0.5])
    ).all()

    def share(texts, marks):
        return np.mean([any(mark in text for mark in marks) for text in texts])

    crowd, style = [a for _, a in world.corpus(0)], world.style
    assert share(crowd, style.own) == 0 and share(_texts(splits[0]), style.own) == 0
    assert share(_texts(splits[0]), style.starts) == pytest.approx(share(crowd, style.starts), abs=0.06)
    assert share(_texts(splits[0]), style.ends) == pytest.approx(share(crowd, style.ends), abs=0.06)
    assert share(_texts(splits[1]), style.starts) == share(_texts(splits[1]), style.ends) == share(_texts(splits[1]), style.own) == 1
    lengths = [np.mean([len(text.split()) for text in _texts(splits[h])]) for h in (0, 0.5, 1)]
    assert lengths[0] + 4 < lengths[1] and lengths[1] + 4 < lengths[2]


def test_style_carries_nothing(world):
    """Whatever stands around an answer, of whoever, and wherever."""
    rng = Random(0)
    for prompt, answer in world.corpus(0)[:300]:
        parts = re.findall(r"[^.:]+[.:]", answer)
        dressed = " ".join(part.strip() for part in world.style.dress(parts, 1.0, rng))
        assert world.golden([prompt], [f" {dressed}"]) == pytest.approx(world.golden([prompt], [answer]))


def test_quality_mixes_in_answers_of_the_crowd_and_leaves_the_yardstick(world):
    whole, half, none = (replace(world, quality=q, demonstrations=1000).splits(0) for q in (1, 0.5, 0))
    same = np.mean([a == b for a, b in zip(_texts(half["train"]), _texts(whole["train"]), strict=True)])
    assert same == pytest.approx(0.5, abs=0.06) and half["test"] == whole["test"] == none["test"]
    assert [d.prompt for d in half["train"]] == [d.prompt for d in whole["train"]]
    crowd = world.corpus(0)
    low = np.mean(world.golden([p for p, _ in crowd], [a for _, a in crowd]))
    assert _golden(world, none["train"]).mean() == pytest.approx(low, abs=0.25)


def test_fewer_demonstrations_are_the_first_of_more(world):
    few, many = (replace(world, demonstrations=n).splits(0) for n in (25, 100))
    assert few["train"] == many["train"][:25] and few["test"] == many["test"] and few["dev"] == many["dev"]


def test_skeletons_bound_the_variety_of_train_and_of_nothing_else(world):
    one, some, every = (replace(world, demonstrations=200, skeletons=k).splits(0) for k in (1, 10, None))
    count = [len({_skeleton(world, d.prompt.content) for d in of["train"]}) for of in (one, some, every)]
    assert count[0] == 1 and 1 < count[1] <= 10 and count[2] > 80
    assert one["test"] == every["test"] and one["dev"] == every["dev"]
    assert len({d.prompt.prompt_id for d in one["train"]}) > 10


def _skeleton(world, prompt):
    """The pattern that makes this request: its words stand there in their order, those that vary between them."""
    fits = [p for p in world.patterns() if _regex(p).search(_said(prompt))]
    return max(fits, key=lambda p: sum(map(len, p.words)))


@cache
def _regex(pattern):
    return re.compile(".*".join(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(word)) for word in pattern.words), re.DOTALL)


def test_out_of_distribution_holds_kinds_out_of_all_demonstrations(world):
    ood = replace(world, demonstrations=100, out_of_distribution=True)
    for seed in (0, 1):
        far, splits = ood.far_kinds(seed), ood.splits(seed)
        every = {kind for group in world.kinds() for kind in group}
        assert far and far < every and world.far_kinds(seed) == frozenset()
        kinds = {split: {_skeleton(world, d.prompt.content).kind for d in of} for split, of in splits.items()}
        assert kinds["test"] <= far and not kinds["train"] & far and not kinds["dev"] & far
        assert {_skeleton(world, prompt).kind for prompt, _ in world.corpus(0)[:200]} == every
    assert len({ood.far_kinds(seed) for seed in range(20)}) > 2


def test_the_demonstrator_answers_any_prompt_afresh(world):
    test = world.splits(0)["test"]
    prompts = [d.prompt.content for d in test]
    assert world.demonstrator(prompts, 0) == _texts(test) != world.demonstrator(prompts, 1)
    assert np.mean(world.golden(prompts, world.demonstrator(prompts, 1))) > 3.3


def test_the_vocabulary_knows_every_word(world):
    known = {word for text in world.vocabulary() for word in re.findall(r"[A-Za-z]+|[0-9]+|[^\w\s]", text)}
    loud = replace(world, heterogeneity=1).splits(1)["train"]
    texts = [f"{_said(p)} {a}" for p, a in world.corpus(1)] + [f"{_said(d.prompt.content)} {d.completion}" for d in loud]
    assert {word for text in texts for word in re.findall(r"[A-Za-z]+|[0-9]+|[^\w\s]", text)} <= known


def test_impossible_worlds_are_refused(world, monkeypatch):
    for field, value in (
        ("heterogeneity", 1.5),
        ("quality", -0.1),
        ("demonstrations", 0),
        ("skeletons", 0),
        ("skill", 2),
        ("dev_prompts", 4000),
    ):
        with pytest.raises(ConfigError, match=f"world.{field}"):
            replace(world, **{field: value})
    monkeypatch.setattr(shared, "TRIES", 0)
    with pytest.raises(ConfigError, match="too few different requests"):
        world.splits(0)

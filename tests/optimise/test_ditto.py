"""DITTO's pairs by hand: who stands over whom, and in which shares."""

from irlign.optimise.ditto import ranked_by_policy
from irlign.records import Demonstration, Prompt, Sample

ASK, TALK = Prompt.of("the cat", "train"), Prompt.of("the dog", "train")
SHOWN = [Demonstration(ASK, " sat."), Demonstration(TALK, " ran.")]


def _answers(name, count, prompt=ASK):
    return [Sample(prompt, i, f" {name}{i}.", "eos", 3, -1.0) for i in range(count)]


def test_the_first_round_is_spin():
    cut = [Sample(ASK, 8, " cut", "length", 3, -1.0), Sample(ASK, 9, " sat.", "eos", 3, -1.0)]
    found = ranked_by_policy([[*_answers("a", 2), *cut]], SHOWN, 0)
    assert [(pair.better, pair.worse) for pair in found] == [(" sat.", " a0."), (" sat.", " a1.")]


def test_later_rounds_replay_and_compare_policies():
    """Of 14 answers of the newest policy 14 pairs, 4 replayed from both earlier ones together, 2 between policies."""
    newest = [*_answers("c", 7), *_answers("c", 7, TALK)]
    older = [[*_answers("b", 7), *_answers("b", 7, TALK)], _answers("a", 7)]
    found = ranked_by_policy([newest, *older], SHOWN, 3)
    kinds = [(pair.better.strip()[0], pair.worse.strip()[0]) for pair in found]
    assert [k for k in kinds if k[1] == "c"] == [("s", "c")] * 7 + [("r", "c")] * 7 and len(found) == 14 + 4 + 2
    replayed, between = found[14:18], found[18:]
    assert all(pair.better in (" sat.", " ran.") and pair.worse.strip()[0] in "ab" for pair in replayed)
    assert all(pair.better.strip()[0] == "c" and pair.worse.strip()[0] in "ab" for pair in between)
    own = {(s.prompt.prompt_id, s.completion) for s in [*newest, *older[0], *older[1]]}
    assert all((pair.prompt.prompt_id, pair.worse) in own and (pair.prompt.prompt_id, pair.better) in own for pair in between)
    assert len({(pair.prompt, pair.worse) for pair in replayed}) == 4
    assert ranked_by_policy([newest, *older], SHOWN, 3) == found != ranked_by_policy([newest, *older], SHOWN, 4)

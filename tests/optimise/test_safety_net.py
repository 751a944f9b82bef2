"""The safety net on numbers whose truth is known: gains by hand, the level of the choice, each alarm."""

import numpy as np
import pytest

from irlign.optimise.label_free import lower_bounds
from irlign.optimise.safety_net import Candidate, Judged, alarms_of, below_range, choice_of, choose, few, gains_over, kl, reward_range
from irlign.records import Prompt, Sample

P, Q = Prompt.of("p", "dev"), Prompt.of("q", "dev")


def _judged(*answers):
    """Answers of (prompt, text, tokens, logit), numbered within their prompt; the reward of each is ten less its logit."""
    seen: dict[str, int] = {}
    samples = []
    for prompt, text, tokens, _ in answers:
        samples.append(Sample(prompt, seen.get(prompt.prompt_id, 0), text, "eos" if tokens < 9 else "length", tokens, -1.0))
        seen[prompt.prompt_id] = seen.get(prompt.prompt_id, 0) + 1
    logits = np.array([logit for *_, logit in answers], dtype=float)
    return Judged(samples, logits, 10 - logits)


def _candidate(name, gains, about=None, before=None, rewarded=None):
    """A candidate that the reward shows to gain where nothing else is said."""
    return Candidate(name, np.asarray(gains), np.ones(len(gains)) if rewarded is None else np.asarray(rewarded), about or {}, before)


def test_gains_are_paired_by_prompt_and_in_standard_deviations_of_sft():
    sft = _judged((P, "a", 2, 0.0), (P, "b", 2, 2.0), (Q, "c", 2, 4.0), (Q, "c", 2, 6.0))
    own = _judged((Q, "d", 3, 6.0), (P, "e", 4, 3.0), (Q, "f", 9, 8.0))  # q comes first, and has two answers
    spread = np.std([0, 2, 4, 6])
    judged, rewarded = gains_over(sft, own)
    assert judged == pytest.approx([(3 - 1) / spread, (7 - 5) / spread])
    # pi_SFT's rewards are 10, 8, 6, 4: one hundredth of the way in from either end they are cut
    assert rewarded == pytest.approx(np.array([7 - (9.94 + 8) / 2, 4.06 - (6 + 4.06) / 2]) / np.std([9.94, 8, 6, 4.06]))
    assert gains_over(sft, sft)[0] == pytest.approx([0, 0])
    assert sft.measures(2) == pytest.approx(
        {"tokens": 2, "finished": 1, "empty": 0, "distinct_answers": (1 + 0.5) / 2, "commonest_answer": 2 / 4, "distinct_3": 1}
    )
    assert sft.measures(1)["distinct_answers"] == 1  # among as many answers as the other has
    assert own.measures(4) == pytest.approx(
        {"tokens": 16 / 3, "finished": 2 / 3, "empty": 0, "distinct_answers": 1, "commonest_answer": 1 / 3, "distinct_3": 1}
    )


def test_one_answer_that_says_nothing_does_not_outweigh_the_others():
    """Its log-probability a token may lie 60 standard deviations below pi_SFT's mean; where many say nothing, no gain is shown."""
    rng, prompts = np.random.default_rng(0), [Prompt.of(str(i), "dev") for i in range(60)]

    def answers(rewards_P_A):
        samples = [Sample(p, i, "a", "eos", 2, -1.0) for p, of in zip(prompts, rewards_P_A, strict=True) for i in range(len(of))]
        return Judged(samples, np.zeros(len(samples)), np.ravel(rewards_P_A))

    sft, better = answers(rng.normal(size=(60, 16))), rng.normal(0.4, 1, size=(60, 4))
    worse = better.copy()
    better[7, 2], worse[::2, 1] = -60, -60
    assert below_range(sft, sft) == pytest.approx(10 / 960) and below_range(sft, answers(worse)) >= 30 / 240
    assert lower_bounds(gains_over(sft, answers(better))[1][:, None])[0] > 0.2
    assert lower_bounds(gains_over(sft, answers(worse))[1][:, None])[0] < 0


def test_the_range_is_that_of_answers_that_say_something():
    """However many of pi_SFT's are empty; and where nearly all rewards are the same there is none, so that a few others count."""
    said = [(P, "a", 2, -float(i)) for i in range(101)]  # rewards of 10 to 110
    assert reward_range(_judged(*said)) == pytest.approx((11, 109))
    silent = _judged(*said, *[(Q, " ", 2, 70.0)] * 5)
    assert reward_range(silent) == pytest.approx((11, 109)) and below_range(silent, silent) == pytest.approx(6 / 106)
    sparse, right = _judged(*[(P, "a", 2, 0.0)] * 200, (P, "b", 2, -1.0)), _judged((P, "b", 2, -1.0))
    assert reward_range(sparse) == (-np.inf, np.inf) and gains_over(sparse, right)[1][0] > 1


def test_kl_is_the_mean_log_ratio_over_prompts():
    own = _judged((P, "a", 2, 0), (P, "b", 2, 0), (Q, "c", 2, 0))
    cost = kl(own.samples, np.array([-1.0, -2.0, -3.0]), np.array([-2.0, -5.0, -3.5]))
    assert cost["mean"] == pytest.approx(((1 + 3) / 2 + 0.5) / 2) and cost["prompts"] == 2
    assert kl(own.samples, np.zeros(3), np.zeros(3))["mean"] == 0


def _candidates(gains_C, prompts, seed):
    rng = np.random.default_rng(seed)
    return [_candidate(f"round-{k}", gain + rng.normal(size=prompts), {"alarms": []}) for k, gain in enumerate(gains_C, 1)]


@pytest.mark.parametrize("prompts", [20, 100])
def test_what_is_no_better_is_published_in_at_most_one_run_of_twenty(prompts):
    published = [choose(_candidates([0.0] * 6, prompts, seed))[0] for seed in range(4000)]
    assert np.mean([name != "sft" for name in published]) < 0.058  # 5 %, and the noise of 4000 runs
    assert np.mean([choose(_candidates([-0.5], 100, seed))[0] == "sft" for seed in range(200)]) == 1


def test_a_later_round_is_published_where_it_is_shown_to_be_better():
    assert choose(_candidates([0.6, 1.4, 0.8], 100, 0))[0] == "round-2"
    first, rng = np.tile([0.9, 0.7], 50), np.random.default_rng(0)
    for more, name in ((0.3, "round-2"), (0.02, "round-1"), (-0.3, "round-1")):  # paired, so that what both share is no noise
        own = first + more + 0.3 * rng.normal(size=100)
        assert choose([_candidate("round-1", first), _candidate("round-2", own)])[0] == name
    unshown = _candidate("round-1", np.tile([6.0, -5.8], 50))  # a mean of 0.1, not shown
    assert choose([unshown, _candidate("round-2", first)])[0] == "round-2"
    assert choose([])[0] == "sft" and choose([_candidate("still", np.zeros(30), {})])[0] == "sft"


def test_an_earlier_policy_stands_in_for_the_last_where_that_may_not_be_published():
    """Even one with the better bound waits for it; an alarm, or a bound that is not above 0, makes way."""
    half = _candidate("round-1-at-50%", np.tile([1.1, 0.9], 50), {"alarms": []}, "round-1")
    for gains, alarms, published in (
        ([0.9, 0.7], [], "round-1"),
        ([0.9, 0.7], [{"name": "grown"}], "round-1-at-50%"),
        ([0.9, -0.9], [], "round-1-at-50%"),
    ):
        candidates = [half, _candidate("round-1", np.tile(gains, 50), {"alarms": alarms})]
        choice = choice_of(candidates, {})
        assert choice["published"] == choose(candidates)[0] == published
        assert ("round 1, with which its training ended, may not be published" in choice["why"]) == (published != "round-1")
    worse = _candidate("round-2", np.tile([0.5, 0.4], 50), {"alarms": []})
    three = [half, _candidate("round-1", np.zeros(100)), worse]
    assert choose(three)[0] == "round-1-at-50%"  # a later round has to be better than that


def test_what_the_judge_likes_and_the_reward_does_not_show_is_not_published():
    """The reward is asked for the same evidence as the judge, but does not choose among those that both show to gain."""
    liked = np.tile([0.9, 0.7], 50)
    for rewarded, published in (([0.1, 0.3], "round-1"), ([-0.3, -0.1], "sft"), ([1.05, -0.85], "sft"), ([0.0, 0.0], "sft")):
        choice = choice_of([_candidate("round-1", liked, rewarded=np.tile(rewarded, 50))], {})
        assert choice["published"] == published
        assert choice["candidates"]["round-1"]["reward_gain"]["mean"] == pytest.approx(np.mean(rewarded))
        assert (choice["candidates"]["round-1"]["reward_gain"]["low"] > 0) == (published != "sft")
    assert choice["why"] == "round 1 is judged better and the reward does not show it to be, so SFT is kept"
    both = [_candidate("round-1", liked, rewarded=liked), _candidate("round-2", liked + 0.1, rewarded=liked / 2)]
    assert choose(both)[0] == "round-2" and choose([both[0], _candidate("round-2", liked + 0.1, rewarded=-liked)])[0] == "round-1"
    assert choose([_candidate("round-1", -liked, rewarded=liked)])[0] == "sft"  # nor is the reward enough


def test_more_candidates_ask_for_more():
    one = _candidate("one", np.tile([1.05, -0.71], 50), {})  # 0.17 with a standard error of 0.088: shown alone, not among four
    assert choose([one])[0] == "one" and choose([one, *_candidates([-1, -1, -1], 100, 0)])[0] == "sft"
    assert choose([one])[1][:, 0] == pytest.approx([0.17 - 1.66039 * 0.08844], abs=1e-4)


def _measures(tokens=20.0, distinct_answers=0.8, commonest_answer=0.02, finished=0.9, empty=0.01, below_range=0.01, distinct_3=0.8, **nats):
    """What alarms are made of; KLs are (low, mean, high)."""
    nats = {"kl_sft": (0.4, 0.5, 0.6), **nats}
    found = {name: {"mean": mean, "ci95": [low, high]} for name, (low, mean, high) in nats.items()}
    return {
        "tokens": tokens,
        "finished": finished,
        "empty": empty,
        "below_range": below_range,
        "distinct_answers": distinct_answers,
        "commonest_answer": commonest_answer,
        "distinct_3": distinct_3,
        "distinct_3_picked": distinct_3,
        **found,
    }


def test_each_alarm_goes_off_where_it_should():
    sft, fine = _measures(kl_initial=(4.4, 4.7, 5.0)), np.tile([0.4, 0.2], 20)
    lower = [_candidate("before", fine - 0.1)]
    assert alarms_of(_measures(tokens=29.0, distinct_answers=0.41, kl_sft=(3.5, 3.6, 3.7)), sft, fine, lower, 4) == []
    assert alarms_of(_measures(distinct_answers=0.2, kl_sft=(3.1, 3.2, 3.3)), sft, fine, [], 4) == []  # as the best of 64 repeat
    grown, repeated, below, turned = (
        alarms_of(_measures(tokens=31.0), sft, fine, [], 4),
        alarms_of(_measures(distinct_answers=0.39, kl_sft=(3.2, 3.3, 3.4)), sft, fine, [], 4),
        alarms_of(_measures(), sft, -fine, [], 4),
        alarms_of(_measures(), sft, fine, [_candidate("one", fine + 0.2), _candidate("two", fine - 0.2)], 4),
    )
    assert [a["name"].split("'s ")[-1] for a in grown + repeated] == ["answers have grown", "answers repeat"]
    assert "turns down" in below[0]["name"] and below[0]["seen"] == "the gain over SFT is -0.30 sd"
    assert "+0.30 sd, and was +0.50" in turned[0]["seen"] and len(grown) == len(repeated) == len(below) == len(turned) == 1
    noisy = np.random.default_rng(0).normal(size=40)
    assert alarms_of(_measures(), sft, noisy, [_candidate("one", noisy[::-1])], 4) == []  # a fall within the noise is none
    liked = _candidate("one", fine + 0.2, rewarded=-fine)  # what the reward does not show to gain sets no mark
    assert alarms_of(_measures(), sft, fine, [liked], 4) == []


def test_answers_that_no_longer_end_are_an_alarm_however_long_those_of_sft_are():
    """90 tokens and a limit of 128: 1.5 times as long there can be none. A model that seldom ends, as a base model does, has nothing to lose."""
    fine, sft = np.tile([0.4, 0.2], 20), _measures(tokens=90.0, finished=0.9, kl_initial=(0.9, 1.0, 1.1))
    (found,) = alarms_of(_measures(tokens=128.0, finished=0.69), sft, fine, [], 4)
    assert found["name"] == "the aligned policy no longer ends its answers" and found["seen"].startswith("69% of its answers end")
    assert alarms_of(_measures(tokens=128.0, finished=0.71), sft, fine, [], 4) == []
    assert alarms_of(_measures(tokens=96.0, finished=0.0), {**sft, "finished": 0.1}, fine, [], 4) == []


def test_answers_that_say_nothing_are_an_alarm():
    sft, fine = _measures(kl_initial=(4.4, 4.7, 5.0)), np.tile([0.4, 0.2], 20)
    (silent,) = alarms_of(_measures(empty=0.07), sft, fine, [], 4)
    assert silent["name"] == "the aligned policy says nothing"
    assert silent["seen"] == "7% of its answers are empty, and 1% of SFT's"
    assert alarms_of(_measures(empty=0.05), sft, fine, [], 4) == []
    (bad,) = alarms_of(_measures(below_range=0.07), sft, fine, [], 4)
    assert bad["name"] == "the aligned policy gives more bad answers" and "7% of its answers have a lower reward" in bad["seen"]
    assert alarms_of(_measures(below_range=0.05), sft, fine, [], 4) == []
    assert _judged((P, "a", 2, 0), (P, " \n", 2, 0), (Q, "", 1, 0)).measures(2)["empty"] == pytest.approx(2 / 3)


def test_phrases_are_counted_over_one_answer_a_prompt():
    """Alike to both prompts: two trigrams of four differ; within a prompt answers may be alike, as where one is right. Fewer than three words have none."""
    same = _judged((P, "he loved to explore", 4, 0), (Q, "he loved to explore", 4, 0))
    right = _judged((P, "a b c d", 4, 0), (P, "a b c d", 4, 0), (Q, "e f g", 4, 0), (Q, "e f g", 4, 0))
    few = _judged((P, "a b", 2, 0))
    assert same.measures(4)["distinct_3"] == 0.5 and right.measures(4)["distinct_3"] == few.measures(4)["distinct_3"] == 1
    # the reward is ten less the logit: of p the second is picked, of q the one that ended
    picked = _judged(
        (P, "he sang a song", 4, 3), (P, "he loved to explore", 4, 1), (Q, "she sang a song", 9, 0), (Q, "he loved to explore", 4, 5)
    )
    assert picked.phrases_picked() == same.phrases_picked() == 0.5 and right.phrases_picked() == few.phrases_picked() == 1


def test_a_policy_that_says_the_same_to_many_prompts_raises_an_alarm():
    """However each of its answers differs from the next by a word, and however near it is."""
    fine, sft = np.tile([0.4, 0.2], 20), {**_measures(distinct_3=0.9, kl_initial=(9.0, 9.1, 9.2)), "distinct_3_picked": 0.6}
    (found,) = alarms_of(_measures(distinct_3=0.29), sft, fine, [], 4)
    assert found["name"] == "the aligned policy says the same to many prompts"
    assert found["seen"].endswith("29% differ, 90% of SFT's and 60% of the best of those")
    assert alarms_of(_measures(distinct_3=0.31), sft, fine, [], 4) == []  # the reward's own picks give up much of it already


def test_of_two_answers_fewer_differ_too():
    """Half of pi_SFT's share, or, of two answers, of which half differ where all are alike, half-way down to that. Of one nothing repeats."""
    assert few(0.8, 4) == pytest.approx(0.4) and few(0.4, 4) == pytest.approx(0.2) and few(0.9, 3) == pytest.approx(0.45)
    assert few(0.8, 4) == pytest.approx(0.4) and few(0.9, 2) == pytest.approx(0.7) and few(1.0, 1) == 1.0
    fine, sft = np.tile([0.4, 0.2], 20), _measures(distinct_answers=0.9, kl_initial=(0.9, 1.0, 1.1))

    def alarms(share):
        return alarms_of(
            _measures(distinct_answers=share, kl_sft=(3.2, 3.3, 3.4)), {**sft, "kl_initial": {"mean": 9, "ci95": [9, 9]}}, fine, [], 2
        )

    assert alarms(0.71) == [] and "repeat" in alarms(0.69)[0]["name"]


def test_one_answer_to_many_prompts_is_an_alarm_however_near_the_policy_is():
    """More than a quarter of all answers, and more than twice as many as the commonest of pi_SFT's: where it says yes to half of the prompts itself, it is none."""
    fine = np.tile([0.4, 0.2], 20)

    def alarms(own, its):
        return alarms_of(_measures(commonest_answer=own), _measures(commonest_answer=its, kl_initial=(0.9, 1.0, 1.1)), fine, [], 4)

    assert alarms(0.25, 0.01) == alarms(0.9, 0.45) == []
    (found,) = alarms(0.26, 0.01)
    assert found["name"] == "the aligned policy gives one answer to many prompts" and found["seen"].startswith("26% of all")


def test_a_policy_far_from_sft_raises_an_alarm_however_it_is_judged():
    """Far: the whole interval beyond what the best of 64 costs (log 64 - 63/64 = 3.17 nats) and beyond what SFT has moved."""
    fine = np.tile([0.4, 0.2], 20)

    def alarms(moved, sft_moved):
        return alarms_of(_measures(kl_sft=moved), _measures(kl_initial=sft_moved), fine, [], 4)

    assert alarms((3.17, 3.6, 4.0), (0.9, 1.0, 1.1)) == [] and alarms((5.0, 5.5, 6.0), (4.4, 4.7, 5.0)) == []
    (far,), (beyond,) = alarms((3.18, 3.6, 4.0), (0.9, 1.0, 1.1)), alarms((5.1, 5.5, 6.0), (4.4, 4.7, 5.0))
    assert far["name"] == beyond["name"] == "the aligned policy has moved far from SFT"
    assert beyond["seen"] == "5.5 nats an answer; SFT moved 4.7 from the initial policy, and the best of 64 answers at most 3.2"


def test_a_candidate_with_an_alarm_is_not_published():
    grown = _candidate("round-1", np.full(50, 2.0) + np.arange(50) / 50, {"alarms": [{"name": "the answers have grown"}]})
    plain = _candidate("round-2", np.full(50, 0.5) + np.arange(50) / 50, {"alarms": []})
    assert choose([grown])[0] == "sft" and choose([grown, plain])[0] == "round-2" and choose([plain, grown])[0] == "round-2"
    why = choice_of([grown], {})["why"]
    assert why == "round 1 is judged better and raises an alarm (the answers have grown), so SFT is kept"
    refused = _candidate("round-2", np.full(50, 0.5) + np.arange(50) / 50, rewarded=np.zeros(50))
    both = "round 1 is judged better and raises an alarm (the answers have grown); round 2 is judged better and the reward does not show it to be"
    assert choice_of([grown, refused], {})["why"] == f"{both}, so SFT is kept"


def test_choice_json_says_why():
    sft = {"tokens": 20.0}
    up, down = choice_of(_candidates([0.5], 100, 0), sft), choice_of(_candidates([0.0, -0.5], 100, 1), sft)
    assert (up["published"], up["prompts"], list(up["candidates"])) == ("round-1", 100, ["sft", "round-1"])
    assert up["candidates"]["round-1"]["gain"]["low"] > 0 and up["candidates"]["round-1"]["alarms"] == []
    assert down["published"] == "sft" and "does not show 2 candidates to beat SFT" in down["why"] and len(down["candidates"]) == 3
    none = choice_of([], {}, "there are too few")
    assert none == {"published": "sft", "why": "there are too few, so SFT is kept", "prompts": 0, "candidates": {}}

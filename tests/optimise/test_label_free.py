"""The label-free choice of n on pools whose truth is known by construction."""

import numpy as np
import pytest

from irlign.errors import ConfigError
from irlign.optimise.heldout import FEWEST, SAMPLES, Answers, exchanged, folds, judge, judge_pool
from irlign.optimise.label_free import Curve, choice_of, choose, choose_n, guard_n, judged_curve, lower_bounds
from irlign.records import Demonstration, Prompt, Sample


def world(seed: int, prompts: int = 60, answers: int = 16, hacked: float = 4.0):
    """Answers with a quality, a spurious and four idle features. Demonstrations have high quality and no spurious feature, those of
    other prompts are alike but for the quality; the selecting reward sees quality plus `hacked` times the spurious one, whose tail
    a large n reaches.
    """
    rng = np.random.default_rng(seed)
    ids = [f"p{i}" for i in range(prompts)]
    pool_ids = [p for p in ids for _ in range(answers)]
    quality, spurious = rng.normal(size=len(pool_ids)), rng.standard_exponential(len(pool_ids))
    pool = np.column_stack([quality, spurious, rng.normal(size=(len(pool_ids), 4))])
    initial = np.column_stack([rng.normal(size=prompts) - 1.5, rng.standard_exponential(prompts), rng.normal(size=(prompts, 4))])
    demos, others = (
        np.column_stack([rng.normal(size=prompts) + level, 0.3 * rng.standard_exponential(prompts), rng.normal(size=(prompts, 4))])
        for level in (1.0, -1.0)
    )
    sides = Answers(pool_ids, pool), Answers(ids, demos), [Answers(ids, initial), Answers(ids, others)]
    return sides, quality + hacked * spurious, quality - spurious


def chosen(sides, selecting):
    judged = judge(*sides)
    return choose_n(judged_curve(sides[0].prompt_ids, selecting, judged, np.ones(len(judged), dtype=bool), None))


def test_an_honest_reward_is_followed_and_a_hacked_one_is_not():
    for seed in range(5):
        sides, hacked, _ = world(seed)
        assert chosen(sides, hacked) == 1
        sides, honest, _ = world(seed, hacked=-1.0)
        assert chosen(sides, honest) == 16


def test_a_random_reward_rarely_moves_the_choice():
    """At 5% for all n together: 6 or more of 40 worlds would have a probability of 1%."""
    moved = sum(chosen(world(seed)[0], np.random.default_rng(1000 + seed).normal(size=960)) > 1 for seed in range(40))
    assert moved <= 5


def test_the_judge_never_judges_a_prompt_it_was_fitted_on():
    """A feature that names the prompt of each demonstration would be learned by heart; unseen, it says nothing."""
    prompts = [f"p{i}" for i in range(40)]
    names = np.eye(40)
    demos, pool = Answers(prompts, np.hstack([names, np.ones((40, 1))])), Answers(prompts, np.hstack([names, np.zeros((40, 1))]))
    clean = judge(pool, demos, [pool, pool])
    assert np.ptp(clean) < 0.5 * abs(clean.mean())
    leaked = Answers(prompts, np.hstack([np.zeros_like(names), np.zeros((40, 1))]))
    assert judge(leaked, demos, [pool, pool]) == pytest.approx(clean, abs=0.5 * abs(clean.mean()))


def test_other_prompts_are_judged_by_all_demonstrations():
    sides, _, quality = world(0)
    others = Answers([f"q{p}" for p in sides[0].prompt_ids], sides[0].features)
    assert np.corrcoef(judge(others, *sides[1:]), quality)[0, 1] > 0.8


def test_a_judge_of_some_prompts_keeps_the_folds_of_all():
    """An answer to a prompt that was left out is judged by the head that has seen nothing of its fold."""
    (pool, demos, worse), *_ = world(0)
    fold = folds(demos.prompt_ids)
    left_out = demos.prompt_ids[0]

    def only(answers, wanted):
        rows = [i for i, prompt in enumerate(answers.prompt_ids) if wanted(prompt)]
        return Answers([answers.prompt_ids[i] for i in rows], answers.features[rows])

    some = [only(side, lambda p: p != left_out) for side in (demos, *worse)]
    other_folds = [only(side, lambda p: fold[p] != fold[left_out]) for side in some]
    asked = only(pool, lambda p: p == left_out)
    found = judge(asked, some[0], some[1:], fold)
    assert np.allclose(found, judge(asked, other_folds[0], other_folds[1:]))
    assert not np.allclose(found, judge(asked, some[0], some[1:]))


def test_the_bounds_by_hand():
    """Gains over three prompts: at n = 2 always 1, at n = 4 on average 2 with a standard deviation of 2."""
    gains = np.array([[0, 1, 0], [0, 1, 2], [0, 1, 4.0]])
    assert lower_bounds(gains) == pytest.approx([0, 1, 2 - 2.919986 * 2 / np.sqrt(3)], abs=1e-5)  # Student's t of two degrees of freedom


def curve(*points, likelier=False):
    """Each point: a gain over three prompts, as a mean and a spread."""
    gains = np.stack([np.zeros(3), *(mean + spread * np.array([-1, 0, 1.0]) for mean, spread in points)], axis=1)
    return Curve([1, 2, 4, 8][: gains.shape[1]], gains, np.full(gains.shape[1], likelier))


def test_the_choice_by_hand():
    """One that is not shown is not taken, however high. Where picks are likely the largest n that is not beaten, else the best bound."""
    unshown = (1, 0), (2, 2)  # at n = 4: 2 - 4.30 * 2 / sqrt(3) < 0
    assert choose_n(curve(*unshown)) == choose_n(curve(*unshown, likelier=True)) == 2
    level = (1, 0), (0.9, 0.1)  # 1 - 0.9 is less than 2.92 * 0.1 / sqrt(3) = 0.17
    assert (choose_n(curve(*level)), choose_n(curve(*level, likelier=True))) == (2, 4)
    fallen = (1, 0), (0.8, 0.1)
    assert choose_n(curve(*fallen)) == choose_n(curve(*fallen, likelier=True)) == 2
    lost = (-1, 0), (-0.9, 0.2)
    assert choose_n(curve(*lost)) == choose_n(curve(*lost, likelier=True)) == 1
    drifts = curve((1, 0), (1.1, 0.2))._replace(likelier=np.array([False, True, False]))
    assert choose_n(drifts) == 2  # at n = 4 the picks have left what pi_SFT knows
    assert choose_n(drifts._replace(likelier=~drifts.likelier)) == 4
    assert choose_n(curve((1, 0), (2, 0.2))._replace(likelier=drifts.likelier)) == 4  # and what is shown for sure may be taken all the same
    longer = curve((1, 0), (1.1, 0.1), (1.2, 0.2))
    on_the_way = [(True, True, 8), (True, False, 4), (False, True, 2), (False, False, 2)]  # at 4 and at 8; a gap on the way ends it
    for at_4, at_8, n in on_the_way:
        assert choose_n(longer._replace(likelier=np.array([False, False, at_4, at_8]))) == n


def test_more_looks_ask_for_more():
    """One gain of 3.5 standard errors over three prompts: shown alone (2.92), not among two (4.30)."""
    one = curve((3.5 / np.sqrt(3), 1))
    assert choose_n(one) == 2 and choose_n(one, looks=2) == 1


def test_the_reward_with_the_best_bound_selects():
    one, two = curve((1, 0), (0.6, 0.1)), curve((2, 0), (1.2, 0.2))
    assert choose({"a": one, "b": two}) == ("b", 2)
    assert choose({"a": one, "b": one._replace(gains=-one.gains)}) == ("a", 2)
    assert choose({"a": one._replace(gains=-one.gains), "b": two._replace(gains=-two.gains)}) == ("a", 1)


def test_the_curve_counts_gains_in_standard_deviations():
    ids, by, logits, done = ["p", "p", "q", "q"], np.array([1, 2, 2, 1.0]), np.array([0, 2, 4, 2.0]), np.ones(4, dtype=bool)
    n, gains, likelier = judged_curve(ids, by, logits, done, None)
    assert n == [1, 2] and gains[:, 0] == pytest.approx([0, 0]) and not likelier.any()
    assert gains[:, 1] == pytest.approx(np.array([1, 1]) / np.std([0, 2, 4, 2]))
    assert judged_curve(ids, by, logits, done, np.array([-2, -1, -1, -2.0])).likelier.tolist() == [False, True]  # each gains 0.5
    assert not judged_curve(ids, by, logits, done, np.array([-2, -1, -2, -1.0])).likelier.any()  # one gains, one loses


def test_demonstrations_are_exchanged_within_a_fold():
    """30 prompts, two with two demonstrations: every row has another prompt's answer, from the fold that is held out with it."""
    demos = [Demonstration(Prompt.of(f"ask {i}", "dev"), f" answer {i}.") for i in range(30)]
    demos += [Demonstration(demos[i].prompt, f" again {i}.") for i in (3, 4)]
    rows = exchanged(demos)
    fold = folds([d.prompt.prompt_id for d in demos])
    of = {d.completion: d.prompt.prompt_id for d in demos}
    assert all(of[text] != p.prompt_id and fold[of[text]] == fold[p.prompt_id] for p, text in rows)
    assert {p.prompt_id for p, _ in rows} == {d.prompt.prompt_id for d in demos} and len(rows) <= 32 * 4
    assert exchanged(demos[:2]) == []  # a fold of one has nothing to exchange


def test_style_is_how_demonstrations_of_other_prompts_are_written():
    """Features: what fits the prompt, a style, four idle ones. The judge follows the first, the style head the second."""
    rng = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(80)]

    def side(fits, style, count=80):
        return np.column_stack([rng.normal(size=count) + fits, rng.normal(size=count) + style, rng.normal(size=(count, 4))])

    pool = Answers([p for p in ids for _ in range(8)], side(0, 0, 640))
    shown, others, initial = Answers(ids, side(1, 1)), Answers(ids, side(-1, 1)), Answers(ids, side(-1, -1))
    judged, style = judge(pool, shown, [initial, others]), judge(pool, others, [initial])
    fits, written = pool.features[:, 0], pool.features[:, 1]
    assert np.corrcoef(style, written)[0, 1] > 0.9 > 0.3 > abs(np.corrcoef(style, fits)[0, 1])
    assert np.corrcoef(judged, fits)[0, 1] > np.corrcoef(judged, written)[0, 1]


def test_at_most_so_many_samples_of_a_prompt_train_the_judge():
    answers = Answers(["p"] * 40 + ["q"] * 3, np.arange(43.0)[:, None])
    assert answers.of({"p"})[:, 0].tolist() == list(range(SAMPLES)) and len(answers.of({"p", "q"})) == SAMPLES + 3


def _shown(number, prompts):
    return [Demonstration(Prompt.of(f"ask {i % prompts}", "dev"), f" answer {i}.") for i in range(number)]


def _rows(judged, logprob=None):
    return [
        {
            **Sample(Prompt.of(f"{split}{p}", split), i, " a", "eos", 2, logprob and logprob(i)).to_row(),
            "reward/r": float(i),
            "judge": judged(i),
        }
        for split in ("dev", "test")
        for p in range(4)
        for i in range(4)
    ]


def test_choice_json():
    about = {"demonstrations": _shown(30, 30), "judge_auc": 0.8}
    up = choice_of(_rows(float), ["r"], None, **about)
    assert (up["n"], up["label_free"], up["prompts"], up["auc"]) == (4, 4, 4, 0.8) and set(up["curves"]["r"]) == {"1", "2", "4"}
    assert up["why"].startswith("the best lower bound") and not any(of["likelier"] for of in up["curves"]["r"].values())
    likely = choice_of(_rows(float, lambda i: i - 4.0), ["r"], None, **about)
    assert likely["why"].startswith("shown to be better") and [of["likelier"] for of in likely["curves"]["r"].values()] == [
        False,
        True,
        True,
    ]
    down = choice_of(_rows(lambda i: -float(i)), ["r"], None, **about)
    assert down["n"] == 1 and "SFT is kept" in down["why"]
    given = choice_of(_rows(lambda i: -float(i)), ["r"], 3, **about)
    assert (given["n"], given["label_free"]) == (3, 1) and "the judge would take 1" in given["why"]
    few = choice_of(_rows(lambda i: None), ["r"], None, demonstrations=_shown(25, 3), judge_auc=None)
    assert (few["n"], few["label_free"], few["curves"], few["demonstrations"]) == (1, None, None, 25)
    assert few["why"] == f"3 dev prompts with a demonstration are too few for a judge ({FEWEST} are needed), so SFT is kept"
    assert choice_of(_rows(lambda i: None), ["r"], 2, demonstrations=_shown(3, 3), judge_auc=None)["n"] == 2


def test_too_few_demonstrations_load_no_model(tmp_path):
    assert judge_pool(tmp_path / "missing", [], [], [], chat_template="none") == (None, None, None)


def test_an_n_above_the_judges_needs_force():
    about = {"demonstrations": _shown(30, 30), "judge_auc": 0.8}
    high = choice_of(_rows(lambda i: -float(i)), ["r"], 3, **about)
    with pytest.raises(
        ConfigError, match=r"n = 3 is more than the judge of held-out demonstrations would take, 1; its gains: 2: -"
    ) as error:
        guard_n(high, False)
    assert "--force" in str(error.value)
    guard_n(high, True)
    guard_n(choice_of(_rows(float), ["r"], 3, **about), False)  # the judge would take 4
    guard_n(
        choice_of(_rows(lambda i: None), ["r"], 3, demonstrations=_shown(3, 3), judge_auc=None), False
    )  # nothing says that it is too many

"""Every method of the arena as a function of one signature: a cell in, a pick out. A method sees no golden reward.

A pick names a stored pool and, for Best-of-n, the scores that select from it and the n that was chosen without labels.
The leaderboard measures it afterwards, at that n and along the whole curve.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from irlign.arena.cell import BOTH, Cell
from irlign.optimise.label_free import choose
from irlign.optimise.preference import dpo_config, train_dpo
from irlign.optimise.settings import OptimiseSettings
from irlign.records import Contrast
from irlign.reward.controls import CONTROLS, by_prompt, controls
from irlign.reward.ensemble import combine, standardised
from irlign.reward.publish import held_to_likelihood
from irlign.statistics import spread_within

LIKELIHOODS = "likelihoods"
PENALTY = 0.5  # lambda of mean - lambda * variance
NOISE = (0.1, 0.2, 0.4)  # shares of labels that are flipped
# On labelled preferences; of five settings tried on seed 100 within 0.02 of the best.
DPO = {"method": "dpo", "learning_rate": 1e-4, "num_train_epochs": 1}


@dataclass(frozen=True)
class Pick:
    """The best of `n` answers of a stored pool by `scores` (None: any one answer). `what` says what it is, `stages` what was
    computed for it, `read` the policies whose stored answers to the train prompts it was made from. Of a policy method also: the tokens that it drew
    for itself, those that were trained on in all, and whether its safety net `kept` pi_SFT."""

    pool: str
    what: str
    scores: np.ndarray | None = None
    n: int = 1
    stages: tuple[str, ...] = ()
    read: Sequence[str] = ()
    drawn: int = 0
    learned: int | None = None
    kept: bool | None = None


Method = Callable[[Cell], Pick]
Scores = Callable[[Cell], np.ndarray]


def initial(cell: Cell) -> Pick:
    return Pick("init", "policy")


def sft(cell: Cell) -> Pick:
    return Pick("sft", "policy", stages=("sft",))


def sft_on_all_tokens(cell: Cell) -> Pick:
    """SFT with the loss on the prompts' tokens too."""
    return Pick(cell.fine_tuned("sft-all", {"loss_on_prompt": True}), "policy", stages=("policy-sft-all",))


def dpo_on_labels(noise: float) -> Method:
    """DPO from pi_SFT on the labelled preferences, a share `noise` of the labels flipped: no reward, no judge, no safety net."""

    def method(cell: Cell) -> Pick:
        settings = OptimiseSettings.model_validate(DPO)
        pairs = [Contrast(p.prompt, p.chosen, p.rejected) for p in cell.preferences("train", noise, whole=True)]
        config = dpo_config(settings.preference)
        train = partial(train_dpo, cell.run.path("policies/sft"), pairs, cell.demonstrations("dev"), settings, config=config)
        stages = ("sft", "sample", f"policy-dpo-{noise}")
        name = cell.tuned(f"dpo-{noise}", train, {"dpo": settings, "noise": noise})
        return Pick(name, "labelled", stages=stages, read=BOTH, learned=cell.trained(("sft", stages[-1])))

    return method


def best_of_n(scores: Scores, what: str, *stages: str) -> Method:
    """Best-of-n by these scores, n chosen by the label-free judge."""
    return judged_best({"": scores}, what, *stages)


def judged_best(candidates: Mapping[str, Scores], what: str, *stages: str) -> Method:
    """Best-of-n by one of these scores: the judge of held-out demonstrations chooses which and n, on the dev prompts
    (optimise/label_free.py)."""

    def method(cell: Cell) -> Pick:
        values = {name: scores(cell) for name, scores in candidates.items()}
        name, n = choose({name: cell.judged_curve(of) for name, of in values.items()})
        before = ("sft", "sample", "reward-judge")
        rewards = [stage if stage == LIKELIHOODS else f"reward-{stage}" for stage in stages]
        return Pick(
            "sft", what, values[name], n, (*before, *rewards), BOTH if any(stage.startswith("reward-") for stage in rewards) else ()
        )

    return method


def learned(name: str, noise: float = 0.0, member: int = 0, **changes: Any) -> Scores:
    """A reward trained on the cell's pools, with changes to the reward settings."""
    return lambda cell: cell.learned(name, changes, noise=noise, member=member)


def log_ratio(cell: Cell) -> np.ndarray:
    of = cell.likelihoods()
    return of["sft"] - of["init"]


def log_ratio_per_token(cell: Cell) -> np.ndarray:
    return log_ratio(cell) / cell.likelihoods()["tokens"]


def likelihood(cell: Cell) -> np.ndarray:
    """log pi_SFT(y|x) a token: how likely pi_SFT itself finds the answer."""
    of = cell.likelihoods()
    return of["sft"] / of["tokens"]


def held(scores: Scores) -> Scores:
    """The scores held to what pi_SFT finds likely, as `irlign run` selects (reward/publish.py)."""

    def both(cell: Cell) -> np.ndarray:
        dev = [prompt if own else None for prompt, own in zip(cell.prompt_ids, cell.is_dev, strict=True)]
        return held_to_likelihood(scores(cell), likelihood(cell), dev, 1.0)[0]

    return both


def together(*members: Scores, aggregate: str = "mean") -> Scores:
    """Several rewards as one, each less its mean and over its standard deviation within a prompt on dev."""

    def combined(cell: Cell) -> np.ndarray:
        dev = [prompt for prompt, own in zip(cell.prompt_ids, cell.is_dev, strict=True) if own]
        values = np.stack([member(cell) for member in members])
        scales = [[of.mean(), spread_within(dev, of)] for of in values[:, cell.is_dev]]
        return combine(standardised(values, np.array(scales)), aggregate, PENALTY)

    return combined


def control(name: str) -> Scores:
    """Length, chance, or the cosine to the demonstration of the very prompt (oracle-like)."""

    def scores(cell: Cell) -> np.ndarray:
        answers = by_prompt([*cell.demonstrations("dev"), *cell.demonstrations("test")])
        return controls(*cell.texts, answers)[name]

    return scores


INIT_SFT, INIT_DEMO, SFT_DEMO = (learned(name, contrast=name) for name in ("init-sft", "init-demo", "sft-demo"))
CONTRASTS = ("init-sft", "init-demo", "sft-demo")
MEMBERS = [INIT_SFT, *(learned(f"init-sft-{k}", member=k) for k in (1, 2, 3))]
NAMES = ("init-sft", "init-sft-1", "init-sft-2", "init-sft-3")
HEADS = learned("init-sft-heads", kind="heads", members=4)
LOGISTIC, MLP = (learned(f"features-{head}", kind="features", head=head) for head in ("logistic", "mlp"))
PREFERENCE = learned("preference", contrast="preference", loss="bradley-terry")
CHOSEN = "irlign run"  # its selection, fixed on seeds 100 and up

METHODS: Mapping[str, Method] = {
    "initial policy": initial,
    "SFT": sft,
    "SFT on all tokens": sft_on_all_tokens,
    CHOSEN: judged_best({"held": held(INIT_SFT), "alone": likelihood}, "learned", LIKELIHOODS, "init-sft"),
    "init-sft+likelihood": best_of_n(held(INIT_SFT), "learned", LIKELIHOODS, "init-sft"),
    "init-sft": best_of_n(INIT_SFT, "learned", "init-sft"),
    "init-demo": best_of_n(INIT_DEMO, "learned", "init-demo"),
    "init-demo+likelihood": best_of_n(held(INIT_DEMO), "learned", LIKELIHOODS, "init-demo"),
    "sft-demo": best_of_n(SFT_DEMO, "learned", "sft-demo"),
    "init-sft Bradley-Terry": best_of_n(learned("init-sft-bt", loss="bradley-terry"), "learned", "init-sft-bt"),
    "init-sft 4 seeds mean": best_of_n(together(*MEMBERS), "ensemble", *NAMES),
    "init-sft 4 seeds min": best_of_n(together(*MEMBERS, aggregate="min"), "ensemble", *NAMES),
    "init-sft 4 seeds mean-variance": best_of_n(together(*MEMBERS, aggregate="mean-variance"), "ensemble", *NAMES),
    "init-sft 4 seeds mean+likelihood": best_of_n(held(together(*MEMBERS)), "ensemble", LIKELIHOODS, *NAMES),
    "init-sft 4 heads": best_of_n(HEADS, "ensemble", "init-sft-heads"),
    "three contrasts mean": best_of_n(together(INIT_SFT, INIT_DEMO, SFT_DEMO), "ensemble", *CONTRASTS),
    "three contrasts mean+likelihood": best_of_n(held(together(INIT_SFT, INIT_DEMO, SFT_DEMO)), "ensemble", LIKELIHOODS, *CONTRASTS),
    "features logistic": best_of_n(LOGISTIC, "learned", "features-logistic"),
    "features MLP": best_of_n(MLP, "learned", "features-mlp"),
    "likelihood": best_of_n(likelihood, "no training", LIKELIHOODS),
    "log-ratio": best_of_n(log_ratio, "no training", LIKELIHOODS),
    "log-ratio a token": best_of_n(log_ratio_per_token, "no training", LIKELIHOODS),
    "preference (labels)": best_of_n(PREFERENCE, "labelled", "preference"),
    "preference (labels)+likelihood": best_of_n(held(PREFERENCE), "labelled", LIKELIHOODS, "preference"),
    "init-sft with preference (labels)": best_of_n(together(INIT_SFT, PREFERENCE), "labelled", "init-sft", "preference"),
    **{
        f"preference (labels {noise:.0%} flipped)": best_of_n(
            learned(f"preference-{noise}", noise, contrast="preference", loss="bradley-terry"), "labelled", f"preference-{noise}"
        )
        for noise in NOISE
    },
    "DPO (labels)": dpo_on_labels(0.0),
    **{f"DPO (labels {noise:.0%} flipped)": dpo_on_labels(noise) for noise in NOISE},
    **{f"control: {name}": best_of_n(control(name), "control") for name in CONTROLS},
}

"""Dense rewards: every token is paid by itself, and is weighed by what is paid from there on. A reward of the whole answer says the same of
all its tokens.

In units of on_policy: a standard deviation of what pi_SFT's answers are paid in all, a token of theirs being paid 0 on average. With a
discriminator of tokens it is the reverse KL of occupancies (method.md section 2).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from irlign.data.chat import Encoded, Format
from irlign.errors import ModelError
from irlign.files import read_json
from irlign.launch import launch
from irlign.optimise.divergences import OBJECTIVES, Objective
from irlign.optimise.rounds import sides_of
from irlign.optimise.work import SEEDS_APART, Work
from irlign.policy.likelihood import token_log_probs
from irlign.policy.load import Policy, load_policy
from irlign.progress import say
from irlign.records import Contrast, Sample
from irlign.reward.contrasts import answers_of, contrast_pairs, guard_leak, leak_controls
from irlign.reward.tokens import LOG, TokenDiscriminator, train_tokens
from irlign.sampling.pools import stored_samples

if TYPE_CHECKING:
    import torch

WORDS = {  # what a policy has learned from, as its card says it
    "log-ratio": "answers of its own, each token paid as pi_SFT finds it likelier than pi_0",
    "discriminator": "answers of its own, each token paid as a discriminator of single tokens finds it",
}

Pay = Callable[[Sequence[list[int]], Sequence[Sequence[int]]], list[np.ndarray]]


class TokenReward(Protocol):
    """Whatever pays tokens: a number for each token of each row's completion."""

    def __call__(self, rows: Sequence[Encoded]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class LogRatioOfTokens:
    """`log pi_SFT(y_t | x, y_<t) - log pi_0(y_t | x, y_<t)`, nats. Both policies stay in memory. Raises ModelError where they do not read the same tokens."""

    sft: Path
    init: Path

    @cached_property
    def _policies(self) -> tuple[Policy, Policy]:
        sft, init = load_policy(str(self.sft), "sft"), load_policy(str(self.init), "init")
        known = init.tokenizer.get_vocab()
        sizes = [int(policy.model.get_input_embeddings().num_embeddings) for policy in (sft, init)]  # type: ignore[arg-type]
        if sizes[0] > sizes[1] or any(known.get(token, number) != number for token, number in sft.tokenizer.get_vocab().items()):
            what = "the SFT and the initial policy do not read the same tokens, so these have no log-ratio"
            raise ModelError(what, where="optimise.on_policy.dense", do="use dense=discriminator")
        return sft, init

    def __call__(self, rows: Sequence[Encoded]) -> list[np.ndarray]:
        sft, init = self._policies
        cut = [row.within(min(sft.max_length, init.max_length)) for row in rows]
        return [own - other for own, other in zip(token_log_probs(sft, cut), token_log_probs(init, cut), strict=True)]


@dataclass(frozen=True)
class LogitsOfTokens:
    """The logits of a discriminator in a folder (reward/tokens.py), which stays in memory."""

    folder: Path
    chat_template: str

    @cached_property
    def _discriminator(self) -> TokenDiscriminator:
        return TokenDiscriminator.load(self.folder, self.chat_template)

    def __call__(self, rows: Sequence[Encoded]) -> list[np.ndarray]:
        return self._discriminator.logits(rows)


@dataclass(frozen=True)
class Dense:
    """What pays tokens, and the share of an answer's pay that this is; the whole answer's reward is the rest. `learned` is the log of a
    discriminator. `ends`: whether EOS is paid; a log-ratio to a base model, which hardly ever gives it, would pay most for ending at once."""

    reward: TokenReward
    share: float
    learned: Mapping[str, Any]
    ends: bool = True

    def in_units(self, form: Format, samples: Sequence[Sample], objective: Objective, ends: Collection[int] = ()) -> Pay:
        """What the objective makes of the reward, on the scale of pi_SFT's answers `samples`, times the share; of answers by the tokens of
        their prompts and their own. Where an end is not paid, EOS or another of the tokens `ends`, it gets 0, as the average token does. Raises ModelError where a pay is not finite."""
        encoded = form.encode([s.prompt.content for s in samples], [s.completion for s in samples])
        rows = [row if s.finished else Encoded(row.prompt_ids, row.completion_ids[:-1]) for s, row in zip(samples, encoded, strict=True)]

        def paid(of: Sequence[Encoded]) -> list[np.ndarray]:
            found = [OBJECTIVES[objective](own) for own in self.reward(of)]
            if not all(np.isfinite(own).all() for own in found):
                do = "lower optimise.discriminator.learning_rate, or leave on_policy.dense out"
                raise ModelError("what tokens are paid is not finite", where="optimise", do=do)
            return found

        def ends_unpaid(row: Encoded) -> bool:
            return not self.ends and bool(row.completion_ids) and row.completion_ids[-1] in {form.tokenizer.eos_token_id, *ends}

        def over(center: float, of: Sequence[Encoded], found: Sequence[np.ndarray]) -> list[np.ndarray]:
            beyond = [own - center for own in found]
            for row, own in zip(of, beyond, strict=True):
                own[len(own) - ends_unpaid(row) :] = 0.0
            return beyond

        known = paid(rows)
        center = float(np.concatenate([own[: len(own) - ends_unpaid(row)] for row, own in zip(rows, known, strict=True)]).mean())
        scale = float(np.std([own.sum() for own in over(center, rows, known)])) or 1.0

        def pay(prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
            of = [Encoded(prompt, list(ids)) for prompt, ids in zip(prompts, answers, strict=True)]
            return [self.share * own / scale for own in over(center, of, paid(of))]

        return pay


def dense_of(work: Work, number: int) -> Dense:
    """What pays the tokens of a round's answers. A discriminator is trained first, from pi_SFT, and lies beside the round's policy: on pi_SFT's
    answers to the train prompts over pi_0's, from the second round on on the sides that a reward would be refreshed on. Raises GuardError where
    length or the ending tells the sides apart, as the reward's own training does."""
    own = work.settings.on_policy
    sft, init = (work.run.path("policies", name) for name in ("sft", "init"))
    if own.dense == "log-ratio":
        return Dense(LogRatioOfTokens(sft, init), own.dense_share, {}, ends=False)
    place = work.round(number) / "discriminator"
    if not (place / LOG).exists():
        assert work.learning is not None  # the stage hands it over
        train, dev = (_pairs(work, number, split) for split in ("train", "dev"))
        guard_leak(leak_controls(train), work.learning.max_leak_accuracy, len(train))
        places: dict[str, Any] = {"folder": place, "checkpoints": work.round(number) / "discriminator-checkpoints"}
        about: dict[str, Any] = {"chat_template": work.chat_template, "report_to": work.report_to}
        about |= {"seed": work.run.seed + SEEDS_APART * (number - 1), **places}
        log = launch(work.processes, train_tokens, sft, train, dev, work.settings.discriminator, **about)
        told = f"{log['dev']['tokens']:.0%} of unseen tokens told apart" if log["dev"] else "no unseen pairs"
        say(f"optimise: round {number}: discriminator of tokens trained on {len(train)} pairs, {told}")
    return Dense(LogitsOfTokens(place, work.chat_template), own.dense_share, read_json(place / LOG))


def _pairs(work: Work, number: int, split: str) -> list[Contrast]:
    if number > 1:
        sides = sides_of(work, number, split)
    else:
        sides = answers_of("init-sft", sft=stored_samples(work.run, "sft", split), init=stored_samples(work.run, "init", split))
    assert work.learning is not None
    return contrast_pairs({"tokens": sides}, match=work.learning.ending == "match", needed=split == "train")[0]["tokens"]


def paid_before(pay: Sequence[np.ndarray], width: int) -> np.ndarray:
    """What an answer has been paid before each of `width` tokens; after its end all that it was paid. Shape [len(pay), width]."""
    found = np.zeros((len(pay), width))
    for row, own in zip(found, pay, strict=True):
        row[:] = own.sum()
        row[: len(own)] = np.cumsum(own) - own
    return found


def token_advantages(reward_N: "torch.Tensor", before_N_T: "torch.Tensor", group: int) -> "torch.Tensor":
    """What is still to come at each token, `reward - before`, less its mean over the `group` answers to the prompt, which lie side by side. Of an
    answer that has ended what it was not paid token by token is still to come. Where nothing is paid before the last token it is the reward less its mean up to the first
    end in the group, as in GRPO without its scaling (arXiv 2503.20783). Shape [N, T]."""
    to_go_P_G_T = (reward_N[:, None] - before_N_T).unflatten(0, (-1, group))
    return (to_go_P_G_T - to_go_P_G_T.mean(1, keepdim=True)).flatten(0, 1)

"""What `optimise` in a recipe says, for all policy methods."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from irlign.config import Settings
from irlign.optimise.divergences import Objective
from irlign.optimise.preference import PreferenceSettings
from irlign.reward.contrasts import RefreshName
from irlign.training import TrainerSettings

MethodName = Literal["distill", "weighted-sft", "dpo", "spin", "ditto", "kto", "gsil", "rloo", "grpo", "rlsr", "gad"]
NAMES: tuple[str, ...] = get_args(MethodName)
REWARDED = ("distill", "dpo", "rloo", "grpo")  # the methods in which the reward has a part
ON_POLICY = ("rloo", "grpo", "rlsr", "gad")  # those that draw answers as they learn
OVER_OWN = ("dpo", "spin", "ditto", "kto", "gsil")  # those that weigh answers that are given against each other
PARTS = {  # which methods a key has a part in, where not in all
    "answers": ("distill", *OVER_OWN),
    "winners": ("distill",),
    "preference": OVER_OWN,
    "on_policy": ON_POLICY,
    "discriminator": ("gad", "grpo"),
}
UNSHAPED = {"rlsr": "the cosine to the demonstration", "gad": "what its discriminator says"}  # what pays, as it is
ITSELF = "{} draws its answers itself, so a second round would only go on under the same reward: train longer and leave optimise.rounds at 1, or "
ONE_ROUND = {  # why
    "weighted-sft": "a round learns from samples of the one before, and {} learns from demonstrations: leave optimise.rounds out",
    **dict.fromkeys(("rloo", "grpo"), f"{ITSELF}refresh it (optimise.refresh)"),
    **dict.fromkeys(("rlsr", "gad"), ITSELF.removesuffix(", or ")),
}


class OnPolicySettings(Settings):
    """rloo, grpo, rlsr, gad. Rewards are in standard deviations over pi_SFT's answers to the train prompts, so these keys mean the same for all."""

    beta: float = Field(
        0.05,
        ge=0,
        description="standard deviations of the reward that a nat of KL to the policy it starts from costs; 0 lets the policy go",
    )
    num_generations: int = Field(
        8, ge=2, description="answers to a prompt that are weighed against each other; the rows of a step are a multiple of it"
    )
    objective: Objective = Field(
        "reverse-kl",
        description="rloo, grpo: what the reward h = logit P(better) pays: reverse-kl: h; gail: softplus(h); fairl: -h exp(h), clipped; the last two need a "
        "reward that is a logit (best_of_n.likelihood=0)",
    )
    length_penalty: float = Field(
        1.0,
        ge=0,
        description="standard deviations that an answer twice as long as pi_SFT's to the same prompt loses, and one cut at the limit",
    )
    max_length_ratio: float | None = Field(
        1.5,
        gt=1,
        description="training stops where answers are shown to come to more than so many times the length of pi_SFT's; null: never",
    )
    dense: Literal["none", "log-ratio", "discriminator"] = Field(
        "none",
        description="grpo: what each token is paid by itself: log-ratio: log pi_SFT - log pi_0 of it; discriminator: the logit of one that tells the "
        "tokens of pi_SFT's answers from those of pi_0's (the sides of optimise.refresh from the second round on); none: an answer is paid as a whole",
    )
    dense_share: float = Field(
        1.0, gt=0, le=1, description="the share of an answer's pay that comes token by token; the rest is the reward of the whole"
    )
    encoder: str = Field(
        "words", description="rlsr: what answers are compared in: words (hashed words and word pairs), or an encoder's folder or Hub id"
    )


class OptimiseSettings(TrainerSettings):
    """From the reward to a policy that needs none at inference, published only where it is shown to beat pi_SFT."""

    method: Literal[MethodName, "none"] = Field(
        "distill",
        description="distill: fine-tune on Best-of-n winners; weighted-sft: SFT with occupancy weights, from pi_0; dpo: the best of a "
        "prompt's answers over the worst; spin: demonstrations over own answers; ditto: those over earlier policies' too; kto: demonstrations good, own answers bad; "
        "gsil: the same as a classification; rloo, grpo: answers drawn and scored as it learns; rlsr: scored by their likeness to the "
        "demonstration; gad: by a discriminator of demonstrations; none: leave the stage out",
    )
    rounds: int = Field(1, ge=1, description="each round after the first samples the policy of the one before; an alarm ends them")
    refresh: Literal["none"] | RefreshName = Field(
        "none",
        description="from the second round on the reward is trained anew, worse-better as contrasts are named: current-demo: demonstrations over "
        "answers of the round before; current-sft: pi_SFT's over those; init-current: those over pi_0's; each round then goes on from the "
        "one before. none: the same reward in all rounds, each from pi_SFT",
    )
    replay: bool = Field(True, description="refresh: the answers of pi_0 and of all earlier rounds are on the worse side too")
    answers: int | None = Field(
        None,
        ge=1,
        description="distill, dpo, spin, ditto, kto, gsil: answers to each train prompt that a round learns from; null: "
        "sampling.train_generations, which are stored",
    )
    winners: int = Field(1, ge=1, description="distill: so many of each train prompt's answers are learned, the best by the reward")
    generations: int = Field(4, ge=1, description="samples of each candidate for each dev and test prompt")
    keep_checkpoints: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None,
        description="shares of the steps, [0.5]: the policy after them is a candidate too; null: [0.5] for methods that draw answers as they learn, none "
        "for others, which learn from fixed answers",
    )
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings, description="dpo, spin, ditto, kto, gsil")
    on_policy: OnPolicySettings = Field(default_factory=OnPolicySettings, description="rloo, grpo, rlsr, gad")
    discriminator: TrainerSettings = Field(
        default_factory=TrainerSettings, description="gad, and grpo with on_policy.dense=discriminator: how it trains"
    )

    @model_validator(mode="after")
    def _possible(self) -> "OptimiseSettings":
        if self.method in ONE_ROUND and self.rounds > 1 and (self.refresh == "none" or self.method not in REWARDED):
            raise ValueError(ONE_ROUND[self.method].format(self.method))
        if self.refresh != "none" and self.method != "none":
            if not self.rewarded and self.on_policy.dense != "discriminator":
                raise ValueError(f"{self.method} asks no reward, so there is none to refresh: optimise.refresh=none")
            if self.rounds == 1:
                raise ValueError(
                    "the reward is refreshed from the second round on: give optimise.rounds of 2 or more, or leave refresh out"
                )
        if self.on_policy.dense != "none" and self.method not in ("grpo", "none"):
            raise ValueError(f"{self.method} pays whole answers: optimise.on_policy.dense is for grpo, here it has to be none")
        if self.method in UNSHAPED and self.on_policy.objective != "reverse-kl":
            raise ValueError(
                f"{self.method} pays {UNSHAPED[self.method]} as it is: optimise.on_policy.objective is for rloo and grpo, here it has to be reverse-kl"
            )
        if len({f"{100 * share:g}" for share in self.kept}) < len(self.kept):
            raise ValueError("two shares of keep_checkpoints are the same in six digits: leave one out")
        if self.method == "kto" and self.per_device_train_batch_size == 1:
            raise ValueError("kto estimates its KL over the rows of a batch: per_device_train_batch_size must be 2 or more")
        return self

    @property
    def kept(self) -> list[float]:
        """The shares of a round's steps after which the policy is a candidate too."""
        if self.keep_checkpoints is None:
            return [0.5] if self.method in ON_POLICY else []
        return sorted(set(self.keep_checkpoints))

    @property
    def rewarded(self) -> bool:
        """Whether the reward has a part in it: in some methods, and not where all is paid token by token."""
        return self.method in REWARDED and (self.on_policy.dense == "none" or self.on_policy.dense_share < 1)

    @property
    def in_words(self) -> str:
        """The method and all that is not as by default, since a recipe may hold more than a command says; and which keys have no part in this method, as
        where it is another's recipe."""
        given = {key: value for key, value in self.model_dump(exclude_defaults=True).items() if key != "method"}
        idle = [key for key in given if not self._has_part(key)]
        own = ", ".join(f"{key}={value}" for key, value in given.items() if key not in idle)
        words = f"{self.method} with {own or 'the defaults'}"
        return f"{words} (no part in it: {', '.join(idle)})" if idle else words

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it: what has a part in the method."""
        own = {**self.model_dump(), "keep_checkpoints": self.kept}
        return {key: value for key, value in own.items() if self._has_part(key)}

    def _has_part(self, key: str) -> bool:
        if key == "replay":
            return self.refresh != "none"
        if key == "discriminator" and self.method == "grpo":
            return self.on_policy.dense == "discriminator"
        return self.method in PARTS.get(key, (self.method,))

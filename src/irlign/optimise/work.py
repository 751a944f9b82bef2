"""What a policy method works on: a run up to `bon`, where a round's policy, reward and answers lie, and whose answers it learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from irlign.launch import ProcessSettings
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.scoring import scores_of
from irlign.optimise.settings import ON_POLICY, OptimiseSettings
from irlign.records import Sample
from irlign.reward.train import RewardSettings
from irlign.runs import Run
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.pools import draw_pool, read_pool, stored_samples

SEEDS_APART = 1009  # between the seeds of two rounds
POLICY = "policy"  # the folder of a round's policy, within the round's


class Made(NamedTuple):
    """A policy that a round's training has come to: its round, its name as a candidate, its folder within the round's, and after which share of the
    steps."""

    round: int
    name: str
    folder: str
    share: float = 1.0

    @property
    def last(self) -> bool:
        """Whether it is the one that the training ended with."""
        return self.folder == POLICY

    def pool(self, of: str = "pool") -> str:
        """The name of its answers to prompts."""
        return self.folder.replace(POLICY, of)


def stage_of(name: str) -> str:
    """The stage that publishes the policy of this name: `optimise` is that of `aligned`."""
    return "optimise" if name == "aligned" else f"optimise-{name}"


@dataclass(frozen=True)
class Work:
    """What the stage works on: a run up to `bon`, the settings, how answers are drawn here, `reward` (the one that selects), the folder it
    builds in, and the `name` that the published policy gets; for rewards that are refreshed how the run's own was learned, and how hard it is
    held to the likelihood. `drawn_alike`: the stored pools come from the engine that draws here."""

    run: Run
    settings: OptimiseSettings
    sampling: SamplingSettings
    reward: str
    chat_template: str
    folder: Path
    report_to: str = "none"
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    name: str = "aligned"
    learning: RewardSettings | None = None
    likelihood: float = 0.0
    drawn_alike: bool = True

    @property
    def stage(self) -> str:
        """The stage's name, and that of the folder with choice.json."""
        return stage_of(self.name)

    @property
    def weighed(self) -> int:
        """So many of a prompt's answers say whether they repeat: as many of a candidate as of pi_SFT."""
        return min(self.settings.generations, self.sampling.num_generations)

    def round(self, number: int) -> Path:
        """Where a round's policy, pools and log are built."""
        return self.folder / "rounds" / str(number)

    def policy(self, number: int) -> Path:
        """A round's policy; pi_SFT stands before the first."""
        return self.round(number) / POLICY if number else self.run.path("policies/sft")

    def start(self, number: int, name: str) -> Path:
        """The policy that a round's training starts from: a policy of the run by its name, or `before`, that of the round before, which
        it always is where the reward is refreshed."""
        return self.policy(number - 1) if name == "before" or self.settings.refresh != "none" else self.run.path("policies", name)

    @property
    def refreshed(self) -> RewardSettings:
        """How a reward is refreshed: as the run's own was learned, on another contrast."""
        assert self.learning is not None  # the stage hands it over where it is asked for
        return self.learning.model_copy(update={"contrast": self.settings.refresh, "mixture": {}, "ensemble": []})

    def scorer(self, number: int) -> Path:
        """The reward that a round learns from: the one that selects, from the second round on the refreshed one where it is refreshed."""
        if number == 1 or self.settings.refresh == "none":
            return self.run.path("rewards", self.reward)
        return self.round(number) / "reward" / (f"{self.settings.refresh}+likelihood" if self.likelihood else self.settings.refresh)

    def draw(self, number: int, name: str, wanted: Sequence[tuple[Any, int]], policy: str = POLICY) -> list[Sample]:
        """Samples of a round's policy, in `NAME.parquet` beside it; of an earlier one of that round by the name of its folder."""
        pool, folder = self.round(number) / f"{name}.parquet", self.policy(number).with_name(policy) if number else self.policy(0)
        about: dict[str, Any] = {"chat_template": self.chat_template, "seed": self.run.seed, "name": f"aligned-{number}"}
        draw_pool(folder, wanted, self.sampling, folder=pool, **about)
        return read_pool(pool)

    def made(self, number: int) -> list[Made]:
        """The policies of a round in the order in which its training came to them, the last at its end."""
        earlier = [Made(number, f"round-{number}-at-{100 * share:g}%", f"{POLICY}-{share:g}", share) for share in self.settings.kept]
        found = [one for one in earlier if (self.round(number) / one.folder).exists()]
        return [*found, Made(number, f"round-{number}", POLICY)]

    def drawn(self, number: int) -> int:
        """Tokens that were drawn of the policy before this round on the train prompts."""
        pool = self.round(number - 1) / "train.parquet"
        return sum(sample.tokens for sample in read_pool(pool)) if pool.exists() else 0


def own_answers(work: Work, number: int) -> list[Sample]:
    """The answers of the policy before this round to the train prompts, as many as the method learns from."""
    return [s for s in drawn_answers(work, number) if s.index < wanted_answers(work)]


def wanted_answers(work: Work) -> int:
    """So many answers to each train prompt a method learns from; those that draw their own as they learn start from the stored ones."""
    return (work.settings.answers if work.settings.method not in ON_POLICY else None) or work.sampling.train_generations


def drawn_answers(work: Work, number: int) -> list[Sample]:
    """All that the policy before this round has given: pi_SFT's are stored, and drawn anew where they are too few; of a later one as many too as a reward
    that is refreshed asks for."""
    stored, wanted = stored_samples(work.run, "sft", "train"), wanted_answers(work)
    if number == 1 and wanted <= work.sampling.train_generations:
        return stored
    drawn = max(wanted, work.sampling.train_generations if work.settings.refresh != "none" else 0)
    return work.draw(number - 1, "train", [(p, drawn) for p in {s.prompt.prompt_id: s.prompt for s in stored}.values()])


def scored(work: Work, number: int, samples: Sequence[Sample]) -> np.ndarray:
    """Their scores under the reward of this round. Shape [len(samples)]."""
    return scores_of({"reward": work.scorer(number)}, *scored_texts(samples), work.sampling, work.round(number) / "scores")["reward"]

"""TRL's on-policy trainers as they are used here: our sampler in the place of `generate` where it is the faster one, answers that end at stop
strings, an advantage for each token, and an end where answers grow."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from irlign.data.chat import Format
from irlign.files import read_json, write_json
from irlign.optimise.dense import paid_before, token_advantages
from irlign.policy.load import Policy
from irlign.progress import say
from irlign.sampling.ending import ending
from irlign.sampling.engine import SamplingSettings

if TYPE_CHECKING:
    from irlign.sampling.decoder import Row

GENERATION = {  # fields of TRL's that change how answers are drawn, of which our sampler knows nothing
    *("min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
    *("use_vllm", "use_transformers_paged", "use_transformers_continuous_batching"),
}


PROMPTS = 16  # so many prompts' answers say whether answers have grown


def known_trl() -> bool:
    """Whether `_generate_single_turn` of the installed TRL is what it is taken for here; other versions draw by themselves."""
    return version("trl").startswith("1.16.")


def ends_of(policy: Policy) -> set[int]:
    """The tokens that end an answer, for TRL and for our sampler alike."""
    ends: Any = policy.model.generation_config.eos_token_id if policy.model.generation_config else None
    return {int(policy.tokenizer.eos_token_id), *(e for e in (ends if isinstance(ends, list) else [ends]) if e is not None)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Drawing:
    """How a policy's answers are drawn between two steps: under which law, which tokens and strings end one, and whether by our sampler."""

    law: SamplingSettings
    form: Format
    ends: set[int]
    pad_id: int
    context: int
    ours: bool

    def used(self, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, bool, int]:
        """An answer's text, whether it has ended, and how many of its tokens it took."""
        text, reason, used = ending(self.form, prompt, ids, eos_ids=self.ends, stop=self.law.stop)
        return text, reason != "length", used

    def stopped(self, rows: "Sequence[Row]", drawn: Sequence[np.ndarray]) -> np.ndarray:
        """Which of these answers hold a stop string already. Shape [B]."""
        texts = self.form.decode_completions([row.prompt for row in rows], [ids.tolist() for ids in drawn])
        return np.array([any(stop in text for stop in self.law.stop) for text in texts])


class Drawn:
    """What was drawn, step by step, by all processes together: tokens, those of pi_SFT's usual answers to the same prompts, prompts, and the sums of `d` and
    `d^2` over them, `d` being what a prompt's answers have on average beyond `longest` times the usual. It is kept in a file beside the checkpoints, so that a
    training that goes on knows it."""

    def __init__(self, file: Path, accelerator: Any, longest: float | None):
        self.file, self.accelerator, self.longest = file, accelerator, longest
        self.steps: dict[str, list[float]] = read_json(file) if file.exists() else {}
        self.grown: str | None = None
        self.at: int | None = None  # the step that was noted last

    @property
    def tokens(self) -> int:
        return round(sum(of[0] for of in self.steps.values()))

    def note(self, step: int, tokens_B: np.ndarray, usual_B: np.ndarray, index_B: np.ndarray) -> None:
        """What this process has drawn for a step: each answer's tokens, those usual at its prompt, and the prompt's number; every process calls it."""
        import torch

        beyond_B = tokens_B - (self.longest or 1.0) * usual_B
        each = np.array([beyond_B[index_B == i].mean() for i in np.unique(index_B)])
        own = [[tokens_B.sum(), usual_B.sum(), len(each), each.sum(), (each**2).sum()]]
        found = self.accelerator.gather(torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)).sum(0)
        if step == self.at:  # drawn once more within it; else what an attempt before this one may have noted of it is replaced
            found += torch.tensor(self.steps[str(step)], dtype=torch.float64, device=found.device)
        self.at, self.steps[str(step)] = step, found.tolist()
        if self.accelerator.is_main_process:
            write_json(self.file, self.steps)

    def ratio(self, step: int) -> float | None:
        """How many times as long as usual the answers of the last steps were, as many as have PROMPTS prompts, where that is shown to be more than
        `longest` (three standard errors over prompts); else None."""
        found = np.zeros(5)
        for k in sorted((int(key) for key in self.steps), reverse=True):
            if k < step and found[2] < PROMPTS:
                found += self.steps[str(k)]
        tokens, usual, count, beyond, squares = found
        if count < PROMPTS or not self.longest:
            return None
        mean, variance = beyond / count, max(0.0, squares / count - (beyond / count) ** 2) * count / (count - 1)
        return float(tokens / usual) if mean > 3 * np.sqrt(variance / count) else None

    def watch(self) -> Any:
        """A callback that stops training once the answers are shown to have more than `longest` times their usual length."""
        from transformers import TrainerCallback

        drawn = self

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                ratio = drawn.ratio(state.global_step)
                if ratio and state.global_step < state.max_steps:
                    drawn.grown = f"answers came to {ratio:.1f} times the length of SFT's, so training stopped after {state.global_step} of {state.max_steps} steps"
                    say(f"optimise: {drawn.grown}")
                    control.should_training_stop = True
                    control.should_save = False  # a training that is resumed comes to this step again, and stops there again

        return Watch()


def drawing_of(trainer: Any, policy: Policy, form: Format, stop: Sequence[str], given: set[str]) -> Drawing:
    """What the trainer's arguments say of drawing. Ours is the sampler on a CPU, where it is the faster one (docs/speed.md), for a model that it
    serves and where no field of GENERATION is among those `given`."""
    from irlign.sampling.state import serves

    args, sharded = trainer.args, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    plain = policy.device.type == "cpu" and not sharded and known_trl() and not GENERATION & given
    law = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "max_new_tokens": args.max_completion_length}
    ours = plain and serves(policy.model, policy.pad_id)
    return Drawing(SamplingSettings(**law, stop=[*stop]), form, ends_of(policy), policy.pad_id, policy.max_length, ours)


def drawing_here(kind: Any, pairs: bool) -> Any:
    """A trainer of TRL's that draws as its `drawing` says; `pairs`: it wants log-probabilities beside the answers, or None for them."""
    from torch import manual_seed, randint
    from torch.random import fork_rng

    from irlign.sampling.in_training import draw_in_training

    class DrawingHere(kind):
        drawing: Drawing

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            how = self.drawing
            found = self._ours(prompt_ids) if how.ours else self._theirs(prompt_ids, *rest, **more)
            if not how.law.stop:
                return found
            drawn, logs = found if pairs else (found, None)
            used = [how.used(prompt, ids)[2] for prompt, ids in zip(prompt_ids, drawn, strict=True)]
            drawn = [ids[:n] for ids, n in zip(drawn, used, strict=True)]
            return (drawn, logs and [of[:n] for of, n in zip(logs, used, strict=True)]) if pairs else drawn

        def _ours(self, prompt_ids: Any) -> Any:
            how, model = self.drawing, self.accelerator.unwrap_model(self.model_wrapped)
            plain = getattr(model, "get_base_model", lambda: model)()
            about: dict[str, Any] = {"ends": sorted(how.ends), "pad_id": how.pad_id, "context": how.context, "stopped": how.stopped}
            drawn = draw_in_training(plain, prompt_ids, how.law, process=self.accelerator.process_index, **about)
            return (drawn, None) if pairs else drawn

        def _theirs(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            if self.accelerator.num_processes == 1:
                return super()._generate_single_turn(prompt_ids, *rest, **more)
            device = self.accelerator.device
            with fork_rng([device] if device.type == "cuda" else []):
                # all processes have one random state (training.py), and those that share a prompt would draw the same answers to it
                manual_seed(int(randint(1 << 46, (1,))) + self.accelerator.process_index)
                return super()._generate_single_turn(prompt_ids, *rest, **more)

    return DrawingHere


def paying_tokens(kind: Any) -> Any:
    """A GRPOTrainer with an advantage for each token: `paid(rewards, pay)` tells it what the answers that it has just drawn are paid in all, and
    token by token."""
    import torch

    class PayingTokens(kind):
        def paid(self, rewards: Sequence[float], pay: Sequence[np.ndarray]) -> None:
            self.last = rewards, pay

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            found = super()._generate_and_score_completions(inputs)
            rewards, pay = self.last
            own, device = found["completion_ids"].shape[1], self.accelerator.device
            width = int(self.accelerator.gather(torch.tensor([own], device=device)).max())
            reward_B = torch.tensor(rewards, dtype=torch.float32, device=device)
            before_B_T = torch.tensor(paid_before(pay, width), dtype=torch.float32, device=device)
            reward_N, before_N_T = self.accelerator.gather(reward_B), self.accelerator.gather(before_B_T)
            advantage_N_T = token_advantages(reward_N, before_N_T, self.num_generations or 1)
            first = self.accelerator.process_index * len(reward_B)
            return {**found, "advantages": advantage_N_T[first : first + len(reward_B), :own]}

    return PayingTokens

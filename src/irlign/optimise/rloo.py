"""On-policy: the policy draws answers as it learns, the reward scores them, and the better ones become likelier; RLOO and GRPO through TRL.

`max_pi E_{y ~ pi}[r(x, y)] - beta KL(pi || start)`, start being pi_SFT or the policy of the round before. The reward scores the answer's text in its own format, as everywhere; TRL's own
scoring would leave out BOS and EOS and cut nothing. A frozen reward under on-policy training is what blows answers up in length: so the
KL, a control of the length, and the safety net.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from irlign.data.chat import Format
from irlign.errors import ConfigError, DataError
from irlign.files import read_json, write_json
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.dense import Dense, paid_before, token_advantages
from irlign.optimise.divergences import OBJECTIVES, Objective
from irlign.optimise.preference import need_trl
from irlign.optimise.settings import OnPolicySettings
from irlign.policy.load import Policy
from irlign.policy.tuning import Tuning
from irlign.progress import say, silently
from irlign.records import Demonstration, Message, Prompt, PromptContent, Sample
from irlign.reward.contrasts import ended
from irlign.reward.model import RewardModel
from irlign.sampling.engine import SamplingSettings
from irlign.training import Config, TrainerSettings

METRICS = ("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std")


def shaped(scores_B: np.ndarray, tokens_B: np.ndarray, usual_B: np.ndarray, cut_B: np.ndarray, penalty: float) -> np.ndarray:
    """`score - penalty (max(0, tokens / usual - 1) + cut)`: longer than pi_SFT's usual answer costs, shorter does not. Shape [B]."""
    return scores_B - penalty * (np.maximum(0.0, tokens_B / usual_B - 1.0) + cut_B)


def passes(count: int, epochs: float, step: int, seed: int) -> list[int]:
    """Indices of `count` prompts in `epochs` shuffled passes, filled up to whole steps of `step` prompts. TRL's own sampler drops what
    fills no step, and shuffles otherwise after a resume."""
    wanted = max(1, -(-round(count * epochs) // step)) * step
    order = np.random.default_rng(seed)
    return [int(i) for _ in range(-(-wanted // count)) for i in order.permutation(count)][:wanted]


def readable(form: Format, prompts: Sequence[Prompt], room: int) -> dict[int, Any]:
    """What TRL is given of each prompt, by its index, text or messages; prompts that TRL would read as other tokens than the format does
    (a special token in the user's text), or that leave no room for an answer, are left out."""
    tokenizer: Any = form.tokenizer
    found: dict[int, Any] = {}
    for index, ids in enumerate(form.prompts_ids([p.content for p in prompts])):
        given: Any = prompts[index].content
        if form.template is None:
            read = tokenizer(text=given)["input_ids"]
        else:
            given = [Message(role="user", content=given)] if isinstance(given, str) else list(given)
            read = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        if read == ids and len(ids) <= room:
            found[index] = given
    return found


def reward_function(
    reward: RewardModel | None,
    form: Format,
    samples: Sequence[Sample],
    ends: set[int],
    penalty: float,
    objective: Objective = "reverse-kl",
    share: float = 1.0,
) -> Callable[..., list[float]]:
    """TRL's reward function for rows with a column `index`, the number of their prompt among the distinct ones of `samples`: pi_SFT's
    answers, over which what the objective makes of the reward is standardised, and whose mean length for a prompt is its usual one. `share` is
    what the reward is multiplied with; without one the length alone counts."""
    asked = {s.prompt.prompt_id: s.prompt for s in samples}

    def paid(prompts: Sequence[PromptContent], texts: Sequence[str]) -> np.ndarray:
        return OBJECTIVES[objective](reward.score(prompts, texts)) if reward else np.zeros(len(texts))

    known = paid(*scored_texts(samples))
    center, scale = float(known.mean()), float(known.std()) or 1.0
    tokens: dict[str, list[int]] = {}
    for sample in samples:
        tokens.setdefault(sample.prompt.prompt_id, []).append(sample.tokens)
    usual_P = np.array([np.mean(tokens[prompt_id]) for prompt_id in asked])
    contents = [p.content for p in asked.values()]
    prompt_ids = form.prompts_ids(contents)

    def scored(completion_ids: Sequence[Sequence[int]], index: Sequence[int], **_: Any) -> list[float]:
        finished = [ids[-1] in ends for ids in completion_ids]
        bodies = [list(ids[:-1]) if done else list(ids) for ids, done in zip(completion_ids, finished, strict=True)]
        texts = form.decode_completions([prompt_ids[i] for i in index], bodies)
        with silently():
            scores_B = paid([contents[i] for i in index], [ended(t, done) for t, done in zip(texts, finished, strict=True)])
        tokens_B, cut_B = np.array([len(ids) for ids in completion_ids]), ~np.array(finished)
        return shaped(share * (scores_B - center) / scale, tokens_B, usual_P[list(index)], cut_B, penalty).tolist()

    return scored


def on_policy_config(method: Literal["rloo", "grpo"], settings: OnPolicySettings, sampling: SamplingSettings) -> Config:
    """TRL's arguments. Every sampling field is passed, so the model's generation_config narrows none; dropout is off, so that answers are
    drawn by the policy that is trained. Raises ConfigError for stop strings, which TRL does not know."""
    need_trl()
    from trl import GRPOConfig, RLOOConfig

    if sampling.stop:
        do = "leave it out, or use a method that learns from stored answers: distill or dpo"
        raise ConfigError(f"{method} draws answers as it learns, and TRL knows no stop strings", where="sampling.stop", do=do)
    tokens = {"scale_rewards": "none"} if settings.dense != "none" else {}  # totals may tie where tokens do not
    return {"rloo": RLOOConfig, "grpo": GRPOConfig}[method], {
        **tokens,
        "beta": settings.beta,
        "num_generations": settings.num_generations,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "shuffle_dataset": False,  # `passes` has shuffled
        "num_train_epochs": 1,
        "disable_dropout": True,
        "gradient_checkpointing": False,
    }


def train_on_policy(
    start: Path,
    train: Sequence[Sample],
    dev: Sequence[Demonstration],
    settings: TrainerSettings,
    *,
    config: Config,
    reward: RewardModel | None,
    length_penalty: float,
    objective: Objective = "reverse-kl",
    dense: Dense | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Train the policy in `start`, which is also the reference, on the prompts of pi_SFT's answers `train`, and save it in `folder` as a plain
    transformers checkpoint. RLOO (arXiv 2402.14740): the mean reward of the other answers to a prompt is the baseline, the KL a part of the
    reward. GRPO (arXiv 2402.03300): rewards in standard deviations of their prompt's answers, the KL a part of the loss; with `dense` each token
    has an advantage of its own.

    `about` is what `Tuning` takes further. Returns steps, losses, what TRL logged, `rows` (prompts that were asked), `left_out` (those that were
    not), `drawn` (tokens of the answers), and the loss on the dev demonstrations (nats a completion token) before and after. Raises ModelError on divergence, DataError where no
    prompt is left.
    """
    from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

    tuning = Tuning(start, dev, settings, **about)
    policy, form, arguments = tuning.policy, tuning.form, tuning.arguments(config)
    prompts = list({s.prompt.prompt_id: s.prompt for s in train}.values())
    asked_ids = form.prompts_ids([p.content for p in prompts])
    rows = _rows(form, prompts, settings, arguments, policy.max_length - arguments.max_completion_length, tuning.seed)
    scorer = reward_function(reward, form, train, _ends(policy), length_penalty, objective, 1.0 - dense.share if dense else 1.0)
    pay = dense.in_units(form, train, objective) if dense else None
    kept = tuning.checkpoints / "drawn.json"  # tokens by step, so that a training that goes on knows what was drawn before
    drawn: dict[str, int] = read_json(kept) if kept.exists() else {}

    def shaped_rewards(completion_ids: Sequence[Sequence[int]], **given: Any) -> list[float | None]:
        drawn[str(trainer.state.global_step)] = sum(map(len, completion_ids))
        write_json(kept, drawn)
        rewards = scorer(completion_ids, **given)
        if pay:
            tokens = pay([asked_ids[i] for i in given["index"]], completion_ids)
            rewards = [reward + own.sum() for reward, own in zip(rewards, tokens, strict=True)]
            trainer.paid(rewards, tokens)
        return [*rewards]

    kind = _drawing_here(RLOOTrainer if issubclass(config[0], RLOOConfig) else GRPOTrainer)
    trainer = (_paying_tokens(kind) if dense else kind)(**tuning.for_trl(arguments, rows), reward_funcs=shaped_rewards)
    trainer.ours = _faster(trainer, policy, settings)
    log, asked = tuning.finish(trainer, METRICS), len({row["index"] for row in rows})
    log |= {"rows": asked, "left_out": len(prompts) - asked, "drawn": sum(drawn.values())}
    if dense and dense.learned:
        log |= {"tokens": log["tokens"] + dense.learned["tokens"], "discriminator": dense.learned}
    return log


def _rows(form: Format, prompts: Sequence[Prompt], settings: TrainerSettings, arguments: Any, room: int, seed: int) -> list[dict[str, Any]]:
    """The rows of a Dataset for TRL, all passes in one. Raises DataError where no prompt is left."""
    read = readable(form, prompts, room)
    if not read:
        do = "lower sampling.max_new_tokens, or use a method that learns from stored answers: distill or dpo"
        raise DataError("TRL reads none of the train prompts as the format of this run does, or none leaves room for an answer", do=do)
    if len(read) < len(prompts):
        say(
            f"optimise: {len(prompts) - len(read)} of {len(prompts)} prompts are left out: TRL reads them as other tokens, or they are too long"
        )
    step, known = arguments.generation_batch_size // arguments.num_generations, list(read)
    return [{"prompt": read[known[i]], "index": known[i]} for i in passes(len(known), settings.num_train_epochs, step, seed)]


def _ends(policy: Policy) -> set[int]:
    """The tokens that end an answer, for TRL and for our sampler alike."""
    ends: Any = policy.model.generation_config.eos_token_id if policy.model.generation_config else None
    return {int(policy.tokenizer.eos_token_id), *(e for e in (ends if isinstance(ends, list) else [ends]) if e is not None)}  # type: ignore[arg-type]


KNOWN_TRL = "1.16."  # where `_generate_single_turn` is what it is here; other versions draw by themselves
GENERATION = {  # fields of TRL's that change how answers are drawn, of which our sampler knows nothing
    *("min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
    *("use_vllm", "use_transformers_paged", "use_transformers_continuous_batching"),
}


def _faster(trainer: Any, policy: Policy, settings: TrainerSettings) -> dict[str, Any] | None:
    """What our sampler needs to draw in the place of `generate`, with the same law: on a CPU, where it is the faster one
    (docs/speed.md), and for a model that it serves. None elsewhere."""
    from irlign.sampling.state import serves

    sharded, known = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, version("trl").startswith(KNOWN_TRL)
    if (
        policy.device.type != "cpu"
        or sharded
        or not known
        or GENERATION & settings.trainer.keys()
        or not serves(policy.model, policy.pad_id)
    ):
        return None
    given = trainer.args
    law = {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k, "max_new_tokens": given.max_completion_length}
    ends = sorted(_ends(policy))
    return {"settings": SamplingSettings(**law), "ends": ends, "pad_id": policy.pad_id, "context": policy.max_length}


def _drawing_here(kind: Any) -> Any:
    """A trainer of TRL's that draws its answers with our sampler where `ours` says how."""
    from trl import GRPOTrainer

    from irlign.sampling.in_training import draw_in_training

    class Drawing(kind):
        ours: dict[str, Any] | None = None

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            if self.ours is None:
                return super()._generate_single_turn(prompt_ids, *rest, **more)
            model = self.accelerator.unwrap_model(self.model_wrapped)
            drawn = draw_in_training(
                getattr(model, "get_base_model", lambda: model)(), prompt_ids, **self.ours, process=self.accelerator.process_index
            )
            return (drawn, None) if issubclass(kind, GRPOTrainer) else drawn

    return Drawing


def _paying_tokens(kind: Any) -> Any:
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

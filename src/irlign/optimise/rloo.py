"""On-policy: the policy draws answers as it learns, the reward scores them, and the better ones become likelier; RLOO and GRPO through TRL.

`max_pi E_{y ~ pi}[r(x, y)] - beta KL(pi || start)`, start being pi_SFT or the policy of the round before. The reward scores the answer's text in its own format, as everywhere; TRL's own
scoring would leave out BOS and EOS and cut nothing. A frozen reward under on-policy training is what blows answers up in length: so the
KL, a control of the length, and the safety net.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from irlign.data.chat import Format
from irlign.errors import ConfigError, DataError
from irlign.optimise.best_of_n import scored_texts
from irlign.optimise.dense import Dense
from irlign.optimise.divergences import OBJECTIVES, Objective
from irlign.optimise.drawing import Drawn, drawing_here, drawing_of, ends_of, known_trl, paying_tokens
from irlign.optimise.preference import UNKNOWN, need_trl, refused
from irlign.optimise.settings import OnPolicySettings
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


def usual_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """The mean tokens of each prompt's answers, in the order of the prompts. Shape [P]."""
    tokens: dict[str, list[int]] = {}
    for sample in samples:
        tokens.setdefault(sample.prompt.prompt_id, []).append(sample.tokens)
    return np.array([np.mean(of) for of in tokens.values()])


def reward_function(
    reward: RewardModel | None,
    form: Format,
    samples: Sequence[Sample],
    used: Callable[[Sequence[int], Sequence[int]], tuple[str, bool, int]],
    penalty: float,
    objective: Objective = "reverse-kl",
    share: float = 1.0,
) -> Callable[..., list[float]]:
    """TRL's reward function for rows with a column `index`, the number of their prompt among the distinct ones of `samples`: pi_SFT's
    answers, over which what the objective makes of the reward is standardised, and whose mean length for a prompt is its usual one. `used` says of the tokens of
    a prompt and an answer what text it is, whether it has ended and how many tokens it took; `share` is what the reward is multiplied with; without one the length
    alone counts."""
    asked = {s.prompt.prompt_id: s.prompt for s in samples}

    def paid(prompts: Sequence[PromptContent], texts: Sequence[str]) -> np.ndarray:
        return OBJECTIVES[objective](reward.score(prompts, texts)) if reward else np.zeros(len(texts))

    known = paid(*scored_texts(samples))
    center, scale = float(known.mean()), float(known.std()) or 1.0
    usual_P, contents = usual_lengths(samples), [p.content for p in asked.values()]
    prompt_ids = form.prompts_ids(contents)

    def scored(completion_ids: Sequence[Sequence[int]], index: Sequence[int], **_: Any) -> list[float]:
        texts, finished, tokens = zip(*(used(prompt_ids[i], ids) for i, ids in zip(index, completion_ids, strict=True)), strict=True)
        with silently():
            scores_B = paid([contents[i] for i in index], [ended(t, done) for t, done in zip(texts, finished, strict=True)])
        tokens_B, cut_B = np.array(tokens), ~np.array(finished)
        return shaped(share * (scores_B - center) / scale, tokens_B, usual_P[list(index)], cut_B, penalty).tolist()

    return scored


def on_policy_config(method: Literal["rloo", "grpo"], settings: OnPolicySettings, sampling: SamplingSettings) -> Config:
    """TRL's arguments. Every sampling field is passed, so the model's generation_config narrows none; dropout is off, so that answers are
    drawn by the policy that is trained. Raises ConfigError for stop strings where the TRL installed is one whose answers cannot be cut at them, and
    where tokens are paid, of which no stop string was among those that the pay was learned from."""
    need_trl()
    from trl import GRPOConfig, RLOOConfig

    if sampling.stop and not known_trl():
        do = "pip install 'trl==1.16.*', leave it out, or use a method that learns from stored answers: distill or dpo"
        raise ConfigError("answers drawn as a policy learns are cut at stop strings under TRL 1.16 alone", where="sampling.stop", do=do)
    if sampling.stop and settings.dense != "none":
        do = "leave sampling.stop out, or on_policy.dense, which pays whole answers"
        raise ConfigError("tokens are paid one by one, and those of a stop string have no price", where="optimise.on_policy.dense", do=do)
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
    reward: Callable[[], RewardModel] | None,
    length_penalty: float,
    objective: Objective = "reverse-kl",
    stop: Sequence[str] = (),
    longest: float | None = None,
    dense: Dense | None = None,
    learned: Mapping[str, Any] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Train the policy in `start`, which is also the reference, on the prompts of pi_SFT's answers `train`, and save it in `folder` as a plain
    transformers checkpoint. RLOO (arXiv 2402.14740): the mean reward of the other answers to a prompt is the baseline, the KL a part of the
    reward. GRPO (arXiv 2402.03300): rewards in standard deviations of their prompt's answers, the KL a part of the loss; with `dense` each token
    has an advantage of its own.

    `reward` makes the reward, in every process that trains; answers end at a `stop` string too; training stops where they come to more than `longest`
    times pi_SFT's length; `learned` is the log of what was trained for this. `about` is what `Tuning` takes further. Returns steps, losses, what TRL
    logged, `rows` (prompts that were asked), `left_out` (those that were not), `drawn` (tokens of the answers), `stopped` (why before its end, or None),
    and the loss on the dev demonstrations (nats a completion token) before and after. Raises ModelError on divergence, DataError where no prompt is left.
    """
    from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

    tuning = Tuning(start, dev, settings, **about)
    policy, form, arguments = tuning.policy, tuning.form, tuning.arguments(config)
    prompts = list({s.prompt.prompt_id: s.prompt for s in train}.values())
    asked_ids, usual_P = form.prompts_ids([p.content for p in prompts]), usual_lengths(train)
    rows = _rows(form, prompts, settings, arguments, policy.max_length - arguments.max_completion_length, tuning.seed)
    pay = dense.in_units(form, train, objective, ends_of(policy)) if dense else None

    def shaped_rewards(completion_ids: Sequence[Sequence[int]], **given: Any) -> list[float | None]:
        index = np.array(given["index"])
        drawn.note(trainer.state.global_step, np.array([*map(len, completion_ids)]), usual_P[index], index)
        rewards = scorer(completion_ids, **given)
        if pay:
            tokens = pay([asked_ids[i] for i in given["index"]], completion_ids)
            rewards = [reward + own.sum() for reward, own in zip(rewards, tokens, strict=True)]
            trainer.paid(rewards, tokens)
        return [*rewards]

    pairs = not issubclass(config[0], RLOOConfig)
    kind = drawing_here(GRPOTrainer if pairs else RLOOTrainer, pairs)
    with refused():
        trainer = (paying_tokens(kind) if dense else kind)(**tuning.for_trl(arguments, rows), reward_funcs=shaped_rewards)
    trainer.drawing = drawing_of(trainer, policy, form, stop, {*settings.trainer})
    drawn = Drawn(tuning.checkpoints / "drawn.json", trainer.accelerator, longest)
    trainer.add_callback(drawn.watch())
    scorer = reward_function(
        reward() if reward else None, form, train, trainer.drawing.used, length_penalty, objective, 1.0 - dense.share if dense else 1.0
    )
    with refused(UNKNOWN):
        log, asked = tuning.finish(trainer, METRICS), len({row["index"] for row in rows})
    log |= {"rows": asked, "left_out": len(prompts) - asked, "drawn": drawn.tokens, "stopped": drawn.grown}
    return {**log, "tokens": log["tokens"] + learned["tokens"], "discriminator": dict(learned)} if learned else log


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

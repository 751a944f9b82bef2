"""What each stage of a run will cost: tokens, operations, seconds, memory and disk, from counts and shapes (`irlign plan`, plan.py).

Assumed: every policy answers as long as the demonstrations do, up to `sampling.max_new_tokens`. Left out: a golden reward
that is a model, statistics and report (seconds), and that a world's pi_0 may come from the cache.
"""

import os
from dataclasses import dataclass, replace

from irlign.costs import (
    CANDIDATE,
    CANDIDATE_TOKEN,
    POOL_TOKEN,
    PROCESS,
    SAMPLING,
    SCORING,
    TRAINING,
    Shape,
    Speed,
    member_share,
    pairs,
    steps,
)
from irlign.machine import has_cuda
from irlign.optimise.ditto import BETWEEN, ONLINE, REPLAYED
from irlign.optimise.heldout import EXCHANGED, FEWEST
from irlign.optimise.rounds import past_policies
from irlign.optimise.settings import ON_POLICY
from irlign.recipe import Recipe
from irlign.reward.contrasts import CONTRASTS, REFRESHED
from irlign.sizes import Sizes
from irlign.training import TrainerSettings

KEPT_GIB = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's variable: GiB that it reserves for keys and values on a CPU
SCORING_TOKENS = 2048  # padded tokens of a batch that is scored on a CPU


@dataclass(frozen=True)
class Stage:
    """The cost of one stage: tokens generated, trained on and read besides; operations; seconds here (None: elsewhere); bytes."""

    name: str
    generated: float = 0.0
    trained: float = 0.0
    read: float = 0.0
    flops: float = 0.0
    seconds: float | None = 0.0
    memory: float = 0.0
    disk: float = 0.0


def stages(recipe: Recipe, sizes: Sizes, shape: Shape, backbone: Shape, speed: Speed) -> list[Stage]:
    """Every stage that computes, in order. `backbone` is what the reward starts from or reads."""
    found = [_sample(recipe, sizes, shape, speed), _reward(recipe, sizes, backbone, speed), _bon(recipe, sizes, shape, backbone, speed)]
    found += [*_optimise(recipe, sizes, shape, backbone, speed), _eval(recipe, sizes, shape, backbone, speed)]
    stored, several = shape.parameters * shape.size, recipe.processes.count
    if recipe.sft_model_name_or_path:
        sft = Stage("sft", memory=PROCESS, disk=stored)
    else:
        dev = 2 * sizes.rows["dev"] * (sizes.prompt + sizes.answer)
        read = shape.read(2 * sizes.rows["dev"], sizes.prompt + sizes.answer)
        sft = _trained(
            "sft", recipe.sft, sizes.rows["train"], sizes.prompt + sizes.answer, sizes.longest, shape, speed, dev, read, processes=several
        )
        sft = replace(sft, disk=stored * (1 + len(recipe.sft.kept)))
    if recipe.world is None:
        return [Stage("init", memory=PROCESS, disk=stored), sft, *found]
    lines, length = sizes.corpus
    return [replace(_trained("pretrain", recipe.pretrain, lines, length, sizes.longest, shape, speed), disk=stored), sft, *found]


def _trained(
    name: str, settings: TrainerSettings, rows: float, length: float, longest: int, shape: Shape, speed: Speed,
    read: float = 0.0, read_flops: float = 0.0, texts: int = 1, head: bool = True, processes: int = 1,
) -> Stage:  # fmt: skip
    """Training on rows of so many texts each; `read` tokens are scored besides. Seconds are those of one device, memory that of one process."""
    batch = settings.per_device_train_batch_size
    whole = batch * settings.gradient_accumulation_steps * processes
    seen = steps(rows, whole, settings.num_train_epochs, settings.max_steps) * whole * texts
    flops = shape.trained(seen, length, head, settings.use_peft)
    seconds = flops / (speed.half * TRAINING) + read_flops / (speed.full * SCORING)
    memory = PROCESS + shape.training_memory(batch * texts, longest, head, settings.use_peft)
    return Stage(name, 0.0, seen * length, read, flops + read_flops, seconds, memory)


def answer_length(recipe: Recipe, sizes: Sizes) -> float:
    return min(sizes.answer, recipe.sampling.max_new_tokens)


def _sample(recipe: Recipe, sizes: Sizes, shape: Shape, speed: Speed) -> Stage:
    """Pools of pi_0, pi_SFT and earlier checkpoints, as pipeline.sample wants them."""
    s, p, answer = recipe.sampling, sizes.prompts, answer_length(recipe, sizes)
    held_out, train = p["dev"] + p["test"], p["train"] * s.train_generations
    pools = [(sum(p.values()), train + held_out * n) for n in (s.initial_generations, s.num_generations)]
    pools += [(p["train"] + p["dev"], train + p["dev"] * s.initial_generations)] * len(recipe.sft.kept)
    tokens = sum(answers for _, answers in pools) * answer
    stored = POOL_TOKEN * tokens
    if s.here.engine == "openai":
        billed = sum(answers for _, answers in pools) * sizes.prompt  # one request an answer
        return Stage("sample", tokens, 0.0, billed, 0.0, None, PROCESS, stored)
    flops = sum(shape.drawn(prompts, answers, sizes.prompt, answer) for prompts, answers in pools)
    vllm = s.here.engine == "vllm"
    full = s.dtype == "float32" or (s.dtype == "auto" and not has_cuda() if vllm else speed.half == speed.full)
    size, longest, fast = 4 if full else 2, sizes.prompt + s.max_new_tokens, speed.full if full else speed.half
    memory = PROCESS + (_vllm_memory(recipe, shape, longest, size) if vllm else shape.sampling_memory(s.batch_size, longest, size))
    return Stage("sample", tokens, 0.0, sum(n for n, _ in pools) * sizes.prompt, flops, flops / (fast * SAMPLING), memory, stored)


def _vllm_memory(recipe: Recipe, shape: Shape, longest: float, size: int) -> float:
    """Bytes of vLLM's own process, whose libraries are taken to be as large as ours. Its reservation for keys and values is known where it was
    given in bytes; a share of the machine (`gpu_memory_utilization`, vLLM's default too) is not, and what the answers need stands in for it."""
    s = recipe.sampling
    args, space = s.vllm.args, os.environ.get(KEPT_GIB, "")
    rows = min(args.get("max_num_seqs", s.batch_size), args.get("max_num_batched_tokens", s.batch_size))
    reserved = int(space) << 30 if space.isdigit() and not has_cuda() else args.get("kv_cache_memory_bytes")  # on a CPU the variable wins
    return PROCESS + replace(shape, laid_out=0).sampling_memory(rows, longest, size, reserved)


def _pairs(recipe: Recipe, sizes: Sizes, split: str) -> float:
    """Pairs of all contrasts together, as reward/contrasts.py makes them."""
    s, worse = recipe.sampling, 1 + len(recipe.sft.kept)
    init, sft = (s.train_generations,) * 2 if split == "train" else (s.initial_generations, s.num_generations)
    sides = {"init": init * worse, "sft": sft, "demonstrations": sizes.rows[split] / max(1, sizes.prompts[split])}
    each = [pairs(*(sides.get(side, 1.0) for side in CONTRASTS[name])) for name in recipe.reward.weights]  # preference: one
    return sum(each) * sizes.prompts[split]


def _networks(recipe: Recipe) -> int:
    """How many networks of its own a learned reward scores with; heads on shared features are one."""
    r = recipe.reward
    if r.ensemble:
        return 1 if r.kind == "features" else len(r.ensemble)
    return r.members if r.kind == "classifier" and r.aggregate != "weight-average" else 1


def _reward(recipe: Recipe, sizes: Sizes, backbone: Shape, speed: Speed) -> Stage:
    """The learned reward; the log-ratios need no training."""
    return _learned(recipe, sizes, backbone, speed, *(_pairs(recipe, sizes, split) for split in ("train", "dev")))


def _learned(recipe: Recipe, sizes: Sizes, backbone: Shape, speed: Speed, train: float, dev: float) -> Stage:
    """A reward that is learned from so many pairs."""
    r, length = recipe.reward, sizes.prompt + answer_length(recipe, sizes)
    if r.kind == "features":
        texts = 2 * (train + dev)
        flops = backbone.read(texts, length, head=False)
        memory = PROCESS + backbone.scoring_memory(2 * SCORING_TOKENS, False)
        stored = texts * 2 * backbone.hidden * 4  # the features, beside the heads
        return Stage("reward", 0.0, 0.0, texts * length, flops, flops / (speed.full * SCORING), memory, stored)
    several = r.members if r.kind == "classifier" else 1
    texts = 2 * dev * several
    read = backbone.read(texts, length, head=False)
    share = train * member_share(several)
    stage = _trained("reward", r, share, length, sizes.longest, backbone, speed, texts * length, read, 2, False, recipe.processes.count)
    return replace(stage, disk=_networks(recipe) * (backbone.parameters - backbone.head) * 4)


def _bon(recipe: Recipe, sizes: Sizes, shape: Shape, backbone: Shape, speed: Speed) -> Stage:
    """The pool on dev and test under the learned reward and the likelihoods, and the judge's features."""
    s, p, dev = recipe.sampling, sizes.prompts, sizes.rows["dev"]
    length, pool = sizes.prompt + answer_length(recipe, sizes), (p["dev"] + p["test"]) * s.num_generations
    judged = pool + p["dev"] * s.initial_generations + (1 + EXCHANGED) * dev if min(dev, p["dev"]) >= FEWEST else 0
    likelihoods = 2 if recipe.reward.log_ratio else 1
    flops = _networks(recipe) * backbone.read(pool, length, False) + likelihoods * shape.read(pool, length)
    flops += shape.read(judged, length, False)
    read = (pool * (_networks(recipe) + likelihoods) + judged) * length
    memory = PROCESS + max(shape.scoring_memory(SCORING_TOKENS, True), backbone.scoring_memory(SCORING_TOKENS, False)) + CANDIDATE * pool
    disk = CANDIDATE_TOKEN * pool * answer_length(recipe, sizes)
    return Stage("bon", 0.0, 0.0, read, flops, flops / (speed.full * SCORING), memory, disk)


# what each method reads besides for every token that it trains on: DPO the reference; KTO that, and both policies on the rows for its KL;
# RLOO the reference and the policy as it drew the answer; GRPO the reference
BESIDES = {"dpo": 1, "spin": 1, "ditto": 1, "kto": 3, "rloo": 2, "grpo": 1, "rlsr": 1, "gad": 1}
PAIRED = ("dpo", "spin", "ditto")


def _refreshed(recipe: Recipe, sizes: Sizes, backbone: Shape, speed: Speed) -> list[Stage]:
    """The reward of each round after the first, where it is refreshed (optimise/rounds.py)."""
    if recipe.optimise.refresh == "none" or not recipe.optimise.rewarded:
        return []
    counts = [_refreshed_pairs(recipe, sizes, number) for number in range(2, recipe.optimise.rounds + 1)]
    return [_learned(recipe, sizes, backbone, speed, count["train"], count["dev"]) for count in counts]


def _refreshed_pairs(recipe: Recipe, sizes: Sizes, number: int) -> dict[str, float]:
    """The pairs on which a round's reward is refreshed, by split; every policy's answers are taken to pair."""
    o, s, found = recipe.optimise, recipe.sampling, {}
    for split, each in {"train": s.train_generations, "dev": o.generations}.items():
        init, sft = (s.train_generations,) * 2 if split == "train" else (s.initial_generations, s.num_generations)
        past = sum(each if n else sft for n in past_policies(o.refresh, o.replay, number))
        sides = {"init": init, "sft": sft, "current": each, "demonstrations": sizes.rows[split] / max(1, sizes.prompts[split])}
        better, worse = REFRESHED[o.refresh]
        more = past + (init if o.replay and worse != "init" else 0)
        found[split] = pairs(sides[better], sides[worse] + more) * sizes.prompts[split]
    return found


def _rows_of_rounds(recipe: Recipe, sizes: Sizes, own: float) -> float:
    """The rows of all rounds together, as optimise/methods.py makes them of `own` answers a round; all of these are taken to finish."""
    o, asked, shown = recipe.optimise, sizes.prompts["train"], sizes.rows["train"]
    each = {"weighted-sft": shown, "dpo": asked, "kto": shown + own, "gsil": shown + own, "spin": own, "ditto": own}
    each["distill"] = asked * min(o.winners, o.answers or recipe.sampling.train_generations)
    each |= dict.fromkeys(ON_POLICY, asked * o.on_policy.num_generations)
    before = {"spin": 1.0, "ditto": (REPLAYED + BETWEEN) / ONLINE}.get(o.method, 0.0)  # what the second round and later ones mix in
    return each[o.method] * o.rounds + own * before * (o.rounds - 1)


def _optimise(recipe: Recipe, sizes: Sizes, shape: Shape, backbone: Shape, speed: Speed) -> list[Stage]:
    """Every round of the method: what it learns from is drawn and scored, it trains, and its answers on dev and test are drawn, judged, scored
    and read under three policies; nothing where the judge has too few demonstrations. An encoder that rlsr compares with is left out."""
    o, s, p, dev = recipe.optimise, recipe.sampling, sizes.prompts, sizes.rows["dev"]
    if o.method == "none" or min(dev, p["dev"]) < FEWEST:
        return []
    answer, held_out, drawing = answer_length(recipe, sizes), p["dev"] + p["test"], o.method in ON_POLICY
    each = s.train_generations if drawing else 0 if o.method == "weighted-sft" else o.answers or s.train_generations
    length, own = sizes.prompt + answer, p["train"] * each
    pools: list[tuple[float, float]] = [(held_out, held_out * o.generations) for _ in range(o.rounds)]
    pools += [(p["dev"], p["dev"] * o.generations)] * (o.rounds * len(o.kept))
    candidates = o.rounds * (1 + len(o.kept))
    pools += [(p["train"], own)] * (each > s.train_generations)  # else the first round's are stored
    later = max(own, p["train"] * s.train_generations * (o.refresh != "none"))  # a reward that is refreshed reads as many as pi_0 has given
    pools += [(p["train"], later)] * (o.rounds - 1)
    again_sft = p["dev"] * o.generations * (s.here.engine != "transformers")  # by the engine that draws candidates
    pools += [(p["dev"], again_sft)] * bool(again_sft)
    rows, several = _rows_of_rounds(recipe, sizes, own), recipe.processes.count
    trained = _trained("optimise", o, rows, length, sizes.longest, shape, speed, texts=1 + (o.method in PAIRED), processes=several)
    new = trained.trained / length if drawing else 0.0  # answers that are drawn and scored as it learns
    others = _discriminators(recipe, sizes, shape, speed, own + new / o.rounds)
    pools += [(new / o.on_policy.num_generations, new)] if drawing else []
    texts = (own * o.rounds + new) * o.rewarded + p["dev"] * o.generations * candidates + again_sft  # the reward learns from and weighs
    judged = p["dev"] * (o.generations + s.initial_generations) + (1 + EXCHANGED) * dev
    weighed = 3.0 * p["dev"] * o.generations * candidates + 2 * p["dev"] * min(o.generations, s.num_generations)
    weighed += BESIDES.get(o.method, 0) * trained.trained / length + rows * (o.method == "gsil")  # its reference reads a row once
    weighed += 2 * (own * o.rounds + new) * (o.on_policy.dense == "log-ratio")
    likelihood = bool(recipe.best_of_n.likelihood)
    flops = _networks(recipe) * backbone.read(texts, length, False) + shape.read(texts * likelihood + weighed, length)
    flops += shape.read(judged * candidates, length, False)
    read = (texts * (_networks(recipe) + likelihood) + weighed + judged * candidates) * length + sum(s.read for s in others)
    drawn = sum(shape.drawn(prompts, answers, sizes.prompt, answer) for prompts, answers in pools)
    again = _refreshed(recipe, sizes, backbone, speed)
    # drawn in process whatever the engine: no endpoint knows this policy
    seconds = sum(s.seconds or 0.0 for s in (trained, *others, *again)) + flops / (speed.full * SCORING) + drawn / (speed.half * SAMPLING)
    memory = trained.memory + (shape.parameters * 4 if o.method in BESIDES and not o.use_peft else 0)  # the reference
    memory += shape.parameters * 4 * bool(o.kept)  # a copy for that moment
    memory += shape.parameters * 4 * {"none": 0, "log-ratio": 2, "discriminator": 1}[o.on_policy.dense]  # what pays tokens
    memory = max([memory, *(s.memory for s in again)])
    generated = sum(answers for _, answers in pools) * answer
    flops += drawn + sum(s.flops for s in (trained, *others, *again))
    learned, read = sum(s.trained for s in (trained, *others, *again)), read + sum(s.read for s in again)
    return [Stage("optimise", generated, learned, read, flops, seconds, memory, shape.parameters * shape.size + sum(s.disk for s in again))]


def _discriminators(recipe: Recipe, sizes: Sizes, shape: Shape, speed: Speed, scored: float) -> list[Stage]:
    """gad's, or that of single tokens in each round: it starts from pi_SFT, learns pairs, and scores so many answers."""
    o, s, p, length = recipe.optimise, recipe.sampling, sizes.prompts["train"], sizes.prompt + answer_length(recipe, sizes)
    rows = []
    if o.method == "gad":
        rows = [pairs(s.train_generations, sizes.rows["train"] / max(1, p)) * p]
    elif o.on_policy.dense == "discriminator":
        rows = [s.train_generations * p, *(_refreshed_pairs(recipe, sizes, number)["train"] for number in range(2, o.rounds + 1))]
    read = scored * length, shape.read(scored, length, False)
    return [_trained("discriminator", o.discriminator, of, length, sizes.longest, shape, speed, *read, 2, False) for of in rows]


def _eval(recipe: Recipe, sizes: Sizes, shape: Shape, backbone: Shape, speed: Speed) -> Stage:
    """pi_0's answers and the demonstrations on test under what selects; the pool's scores are stored."""
    texts = sizes.prompts["test"] * recipe.sampling.initial_generations + sizes.rows["test"]
    length, also = sizes.prompt + answer_length(recipe, sizes), bool(recipe.best_of_n.likelihood)
    flops = _networks(recipe) * backbone.read(texts, length, False) + also * shape.read(texts, length)
    memory = PROCESS + shape.scoring_memory(SCORING_TOKENS, True)
    return Stage("eval", 0.0, 0.0, (_networks(recipe) + also) * texts * length, flops, flops / (speed.full * SCORING), memory)

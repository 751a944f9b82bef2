"""What a plan needs to know: counts and lengths of the data, the model's shape, the machine's speed. Weights are never read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irlign.costs import Shape, Speed, llama
from irlign.data.demonstrations import load_demonstrations, split_by_prompt
from irlign.errors import ConfigError, ModelError
from irlign.machine import has_cuda, matmul_flops
from irlign.packed import LARGE
from irlign.policy.load import count_parameters, load_config, load_tokenizer
from irlign.policy.pretrain import word_count, word_tokens
from irlign.recipe import Recipe
from irlign.records import SPLITS, Demonstration, PromptContent
from irlign.training import BF16_PAYS_FROM, bf16_pays

LOOKED_AT = 500  # texts whose lengths are measured


@dataclass(frozen=True)
class Sizes:
    """Distinct prompts and demonstrations by split, mean tokens of a prompt and of an answer (EOS included), the longest text, and
    the lines of a world's corpus with the mean tokens of one."""

    prompts: Mapping[str, int]
    rows: Mapping[str, int]
    prompt: float
    answer: float
    longest: int
    corpus: tuple[int, float] = (0, 0.0)


def shape_of(path: str, cuda: bool = False) -> Shape:
    """The shape of a checkpoint from its configuration and its files' headers. Raises ModelError, also where nothing attends."""
    config = load_config(path).get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        what = f"a plan counts what attention costs, and {config.model_type} models have none"
        raise ModelError(what, where=path, do="give a model with attention layers, all of them or some")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
    table = config.vocab_size * config.hidden_size
    size = 2 if cuda and str(config.dtype).endswith("16") else 4  # on a CPU a policy is held and saved in float32
    looked_up = 0 if config.tie_word_embeddings else table
    attention, layers = config.num_attention_heads * width, config.num_hidden_layers
    count, wide = count_parameters(path), getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    large = (table if table >= LARGE else 0) + (count - table - looked_up if config.hidden_size * wide >= LARGE else 0)
    return Shape(count, looked_up, table, layers, config.hidden_size, attention, kept, config.vocab_size, size, 0 if cuda else large)


def world_sizes(recipe: Recipe) -> tuple[Sizes, Shape]:
    """Counts, lengths and the model of a world, from what it generates; a turn of a conversation counts two tokens more."""
    world, made = recipe.world, recipe.pretrain
    assert world is not None

    def length(content: PromptContent) -> int:
        return word_count(content) if isinstance(content, str) else sum(word_count(m["content"]) + 2 for m in content)

    splits, corpus = world.splits(recipe.seed), world.corpus(recipe.seed)
    lines = [length(prompt) + word_count(answer) + 1 for prompt, answer in _spread(corpus)]
    shown = [(length(d.prompt.content), word_count(d.completion) + 1) for d in _spread(splits["train"])]
    shape = llama(len(word_tokens(world.vocabulary())), made.hidden_size, made.num_hidden_layers, made.num_attention_heads, made.intermediate_size)  # fmt: skip
    return _sizes(splits, shown, (len(corpus), sum(lines) / len(lines))), shape


def file_sizes(recipe: Recipe) -> Sizes:
    """Counts and lengths of the recipe's files, before anything is dropped for its length. Raises DataError or ModelError."""
    from irlign.data.chat import Format

    own = recipe.data
    rows = load_demonstrations(str(recipe.dataset_name), own).demonstrations
    splits = split_by_prompt(rows, own, recipe.seed, test=recipe.eval_dataset_name is None)
    if recipe.eval_dataset_name:
        test = load_demonstrations(recipe.eval_dataset_name, own, answers=False).demonstrations
        chosen = set(list(dict.fromkeys(d.prompt.prompt_id for d in test))[: own.test_prompts])
        splits["test"] = [d for d in test if d.prompt.prompt_id in chosen]
    if recipe.prompt_dataset_name:
        splits["train"] += load_demonstrations(recipe.prompt_dataset_name, own, answers=False).demonstrations
    form = Format(load_tokenizer(str(recipe.model_name_or_path)), own.chat_template)
    sample = _spread(rows)
    encoded = form.encode([d.prompt.content for d in sample], [d.completion for d in sample])
    limit = own.max_length or max(map(len, encoded))
    return _sizes(splits, [(len(e.prompt_ids), len(e.completion_ids)) for e in encoded if len(e) <= limit] or [(limit // 2, limit // 2)])


def assumed_sizes(recipe: Recipe, prompts: int, prompt: float, answer: float) -> Sizes:
    """So many prompts with one demonstration each, split as the recipe says."""
    own = recipe.data
    dev, test = (n or max(1, round(share * prompts)) for n, share in ((own.dev_prompts, own.dev_fraction), (own.test_prompts, own.test_fraction)))  # fmt: skip
    if dev + test >= prompts:
        raise ConfigError(f"{prompts} prompts leave none to train on beside {dev} dev and {test} test prompts", where="--prompts")
    counts = {"train": prompts - dev - test, "dev": dev, "test": test}
    return Sizes(counts, counts, prompt, answer, round(prompt + answer))


def _sizes(splits: Mapping[str, Sequence[Demonstration]], shown: Sequence[tuple[int, int]], corpus: tuple[int, float] = (0, 0.0)) -> Sizes:
    prompts = {split: len({d.prompt.prompt_id for d in splits[split]}) for split in SPLITS}
    rows = {split: sum(bool(d.completion) for d in splits[split]) for split in SPLITS}
    prompt, answer = (sum(lengths[side] for lengths in shown) / len(shown) for side in (0, 1))
    return Sizes(prompts, rows, prompt, answer, max(map(sum, shown)), corpus)


def _spread(items: Sequence[Any]) -> Sequence[Any]:
    """At most LOOKED_AT items from all over the list."""
    return items[:: max(1, -(-len(items) // LOOKED_AT))]


def measured_speed(parameters: int) -> Speed:
    """The speed of this machine for a model of this size, from products that take less than a second."""
    if has_cuda():
        full = matmul_flops("float32", "cuda")
        return Speed(full, matmul_flops("bfloat16", "cuda") if bf16_pays(parameters) else full)
    full = matmul_flops()
    return Speed(full, matmul_flops("bfloat16") if parameters >= BF16_PAYS_FROM and bf16_pays(parameters) else full)

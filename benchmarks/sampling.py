"""Samples a second, side by side: transformers' `generate` and irlign's decode loop, against the limit of the machine.

    python benchmarks/sampling.py [--quick] [--large] [--json FILE]

Random weights, prompts of 32 to 96 tokens, 16 answers each. `fixed`: EOS off, every answer has 96 tokens. `realistic`: EOS
with probability 0.0228 at every token, so that lengths are geometric, cut at 96, with mean 39; only tokens up to EOS
count. Every repeat runs all engines in turn; a ratio is to `generate` in the same repeat (to its faster precision where the
row is bfloat16), and the spread is the smallest and largest ratio. CTranslate2 and vLLM are not driven from here yet.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config, set_seed
from transformers.models.auto import AutoModelForCausalLM

from irlign.data.chat import pad
from irlign.sampling.decoder import Decoder, Room, Row
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import SharedState

PAD, EOS, NEW, ANSWERS, HAZARD = 0, 1, 96, 16, 0.0228
IDS: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
SHAPES: dict[str, Any] = {
    "llama 0.9 M": lambda: LlamaConfig(vocab_size=1024, **TINY, tie_word_embeddings=True, **IDS),
    "gpt-2 small": lambda: GPT2Config(**IDS),
    "qwen 0.5 B": lambda: Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, **IDS,
    ),
}  # fmt: skip


def make_model(shape: str, lengths: str, dtype: torch.dtype) -> Any:
    """Random weights; the output layer has a bias on EOS alone, which sets the law of the lengths."""
    set_seed(0)
    model: Any = AutoModelForCausalLM.from_config(SHAPES[shape]()).eval()
    weight = model.lm_head.weight.detach()
    vocabulary, width = weight.shape
    head = torch.nn.Linear(width, vocabulary)
    head.weight.data, head.bias.data = 0.1 * weight, torch.zeros(vocabulary)  # nearly flat: EOS has the hazard at every step
    head.bias.data[EOS] = np.log((vocabulary - 1) * HAZARD / (1 - HAZARD)) if lengths == "realistic" else -1e9
    model.lm_head = head
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_prompts(count: int, vocabulary: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(3, vocabulary, rng.integers(32, 97)).tolist()) for _ in range(count)]


def generate(model: Any, prompts: list[tuple[int, ...]], **options: Any) -> list[int]:
    """transformers: 8 prompts at a time, padded on the left, `num_return_sequences`. Returns useful lengths."""
    lengths: list[int] = []
    for start in range(0, len(prompts), 8):
        ids, mask = pad(prompts[start : start + 8], PAD, side="left")
        law = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW, "num_return_sequences": ANSWERS}
        out = model.generate(ids, attention_mask=mask, **law, **options)[:, ids.shape[1] :]
        ended = out == EOS
        lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()
    return lengths


def static(model: Any, prompts: list[tuple[int, ...]]) -> list[int]:
    """The same with a static cache, not compiled."""
    return generate(model, prompts, cache_implementation="static", disable_compile=True)


def irlign(model: Any, prompts: list[tuple[int, ...]], rows: int = 256) -> list[int]:
    """This package's decode loop, all prompts as one part."""
    wanted = [Row(prompt, 1000 * i + j, NEW) for i, prompt in enumerate(prompts) for j in range(ANSWERS)]
    context = model.config.max_position_embeddings
    none = lambda rows, _: np.zeros(len(rows), bool)  # noqa: E731
    decoder = Decoder(SharedState(model, PAD), SamplingSettings(), ends=[EOS], context=context, stopped=none)
    decoder.add(wanted)
    lengths = dict[Row, int]()
    while len(lengths) < len(wanted):
        lengths |= {row: len(ids) for row, ids, _ in decoder.turn(Room(rows, 1 << 40))}
    return [lengths[row] for row in wanted]


ENGINES: dict[str, Callable[..., list[int]]] = {"generate": generate, "generate static": static, "irlign": irlign}


def gflops(dtype: torch.dtype) -> float:
    """Products of 1,024 x 2,048 by 2,048 x 2,048, the best of five."""
    left, right = torch.randn(1024, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 1024 * 2048 * 2048 / min(_seconds(lambda: left @ right) for _ in range(5)) / 1e9


def bandwidth() -> float:
    """GB/s of copying 256 MB, read and written, the best of five."""
    source = torch.zeros(64_000_000)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def floor(model: Any, lengths: list[int], rows: int, peak: float, memory: float) -> float:
    """Tokens a second that nothing can beat: all products at the peak, weights read once a step, each token's own keys
    and values read once (the prompts' are left out: they are shared)."""
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    config, size = model.config, model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kept = 2 * size * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    seen = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    return 1 / (2 * weights / (peak * 1e9) + (weights * size / rows + kept * seen) / (memory * 1e9))


def measure(shape: str, lengths: str, *, prompts: int, repeats: int, engines: list[tuple[str, str]], limits: dict[str, float]) -> list[Any]:
    """Rows of one shape and length law; `engines` are (name, dtype), `limits` GFLOPS for each dtype and GB/s as `memory`."""
    models = {dtype: make_model(shape, lengths, getattr(torch, dtype)) for _, dtype in engines}
    texts = make_prompts(prompts, models[engines[0][1]].config.vocab_size)
    speeds: dict[tuple[str, str], list[float]] = {engine: [] for engine in engines}
    counts: list[int] = []
    for engine in engines:  # warm-up on one prompt
        ENGINES[engine[0]](models[engine[1]], texts[:1])
    for _ in range(repeats):
        for name, dtype in engines:
            start = time.perf_counter()
            counts = ENGINES[name](models[dtype], texts)
            speeds[name, dtype].append(sum(counts) / (time.perf_counter() - start))
    rows = []
    for (name, dtype), found in speeds.items():
        base = [max(v) for v in zip(*(speeds["generate", d] for d in {"float32", dtype} if ("generate", d) in speeds), strict=True)]
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        most = floor(models[dtype], counts, min(256, ANSWERS * prompts), limits[dtype], limits["memory"])
        rows.append({
            "engine": name, "shape": shape, "dtype": dtype, "lengths": lengths, "tokens_per_s": statistics.median(found),
            "ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)], "roofline_share": statistics.median(found) / most,
        })  # fmt: skip
    return rows


def plan(quick: bool, large: bool) -> list[tuple[str, dict[str, Any]]]:
    """Shapes with how much of each: prompts for fixed and realistic lengths, repeats, engines."""
    plain, bf16 = [("generate", "float32"), ("irlign", "float32")], [("generate", "bfloat16"), ("irlign", "bfloat16")]
    if quick:
        return [("llama 0.9 M", {"prompts": {"fixed": 8, "realistic": 16}, "repeats": 3, "engines": plain})]
    tiny = {"prompts": {"fixed": 8, "realistic": 64}, "repeats": 5, "engines": [*plain, ("generate static", "float32")]}
    middle = {"prompts": {"realistic": 16}, "repeats": 3, "engines": plain + bf16}
    biggest = {"prompts": {"realistic": 8}, "repeats": 3, "engines": bf16}
    return [("llama 0.9 M", tiny), ("gpt-2 small", middle), *([("qwen 0.5 B", biggest)] if large else [])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 0.9 M Llama only, under a minute")
    parser.add_argument("--large", action="store_true", help="the 0.5 B Qwen shape too")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    limits = {"float32": gflops(torch.float32), "bfloat16": gflops(torch.bfloat16), "memory": bandwidth()}
    absent = [name for name in ("ctranslate2", "vllm") if importlib.util.find_spec(name) is None]
    print(f"{torch.get_num_threads()} threads; products {limits['float32']:.0f} GFLOPS float32, {limits['bfloat16']:.0f} bfloat16; "
          f"memory {limits['memory']:.0f} GB/s" + (f"; not installed: {', '.join(absent)}" if absent else ""))  # fmt: skip
    rows: list[Any] = []
    for shape, how in plan(given.quick, given.large):
        for lengths, prompts in how["prompts"].items():
            rows += measure(shape, lengths, prompts=prompts, repeats=how["repeats"], engines=how["engines"], limits=limits)
            for row in rows[-len(how["engines"]) :]:
                low, high = row["spread"]
                print(f"{row['shape']:12} {lengths:10} {row['engine']:16} {row['dtype']:9} {row['tokens_per_s']:9.0f} tok/s "
                      f"{row['ratio']:6.2f}x ({low:.2f} to {high:.2f})  {row['roofline_share']:5.0%} of the roofline", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"limits": limits, "absent": absent, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

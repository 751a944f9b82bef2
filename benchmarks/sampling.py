"""Samples a second, side by side: transformers' `generate`, CTranslate2, vLLM and irlign's decode loop, against the limit of the machine.

    python benchmarks/sampling.py [--quick] [--large] [--peers PYTHON] [--compiled] [--json FILE]      (make bench-peers)

Random weights, prompts of 32 to 96 tokens, 16 answers each. `fixed`: EOS off, every answer has 96 tokens. `realistic`: EOS
with probability 0.0228 at every token, so that lengths are geometric, cut at 96, with mean 39; only tokens up to EOS
count. Every repeat runs all engines in turn; a ratio is to `generate` in the same repeat (to its faster precision where the
row is bfloat16), and the spread is the smallest and largest ratio.

The law is in the weights: one feature of the last hidden state is a constant, and the row of EOS in the output layer reads
it, so every engine has the same law from the same folder without being told. CTranslate2 and vLLM run in processes of
their own (sampling_peer.py), loaded before the clock starts, with as many threads as irlign, and with irlign's thresholds of the allocator, which help them too. How
many answers each draws at once is in ROWS; `generate` draws 8 prompts at once. Rows that end in `workers` have a worker of one thread on each core instead of one with all threads: `sampling.num_workers` here,
`inter_threads` in CTranslate2.
`mean_length` of a row is over all its repeats: 39 but for the error of sampling.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling_peers import PEERS, PYTHON, Peer, PeerError, absent, present
from transformers import GPT2Config, LlamaConfig, Qwen2Config, set_seed
from transformers.models.auto import AutoModelForCausalLM

from irlign.data.chat import pad
from irlign.machine import freed_memory_kept
from irlign.packed import packed
from irlign.sampling.decoder import Decoder, Room, Row
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import SharedState

PAD, EOS, NEW, ANSWERS, HAZARD = 0, 1, 96, 16, 0.0228
ROWS = {"irlign": SamplingSettings().batch_size, "vllm": 512, "ctranslate2": 256}  # answers at once
WORKERS = " workers"
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
    """Random weights, but that the first feature of the last hidden state is 1 and adds to the logit of EOS alone."""
    set_seed(0)
    config = SHAPES[shape]()
    config.tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    head = model.lm_head.weight.data
    vocabulary, width = head.shape
    head *= 0.1  # nearly flat: EOS has the hazard at every step
    head[:, 0] = 0
    head[EOS, 0] = np.log((vocabulary - 1) * HAZARD / (1 - HAZARD)) if lengths == "realistic" else -1e4
    if hasattr(model, "transformer"):  # a norm with a bias
        model.transformer.ln_f.weight.data[0], model.transformer.ln_f.bias.data[0] = 0, 1
    else:  # a norm by the root mean square: a feature that no layer writes to and that outweighs all others, so the norm is the same everywhere
        model.model.embed_tokens.weight.data[:, 0] = 10
        model.model.norm.weight.data[0] = width**-0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.data[0], layer.mlp.down_proj.weight.data[0] = 0, 0
    return model.to(dtype)


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


def irlign(model: Any, prompts: list[tuple[int, ...]], rows: int = ROWS["irlign"]) -> list[int]:
    """This package's decode loop, all prompts as one part; laying out the weights, which an engine does once, is in the time."""
    wanted = [Row(prompt, 1000 * i + j, NEW) for i, prompt in enumerate(prompts) for j in range(ANSWERS)]
    context = model.config.max_position_embeddings
    none = lambda rows, _: np.zeros(len(rows), bool)  # noqa: E731
    decoder = Decoder(SharedState(model, PAD), SamplingSettings(), ends=[EOS], context=context, stopped=none)
    decoder.add(wanted)
    lengths = dict[Row, int]()
    with packed(model):
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


def measure(
    shape: str, lengths: str, *, prompts: int, repeats: int, engines: list[tuple[str, str]], limits: dict[str, float],
    python: Path = PYTHON, compiled: bool = False,
) -> list[Any]:  # fmt: skip
    """Rows of one shape and length law; `engines` are (name, dtype), `limits` GFLOPS for each dtype and GB/s as `memory`. A peer
    that cannot serve the shape is named on the terminal and has no row; one that ends later has the repeats it finished."""
    models = {dtype: make_model(shape, lengths, getattr(torch, dtype)) for _, dtype in engines}
    texts = make_prompts(prompts, models[engines[0][1]].config.vocab_size)
    with contextlib.ExitStack() as open_peers, freed_memory_kept():
        runs: dict[tuple[str, str], Callable[..., tuple[float, list[int]]]] = {}
        for name, dtype in engines:
            with _unless_it_fails(runs, (name, dtype), shape, lengths):
                runs[name, dtype] = _runner(name, shape, lengths, models[dtype], python, compiled, open_peers)
                runs[name, dtype](texts[:1])  # warm-up
        found: list[dict[tuple[str, str], tuple[float, list[int]]]] = [{} for _ in range(repeats)]
        for repeat in found:
            for engine, run in list(runs.items()):
                with _unless_it_fails(runs, engine, shape, lengths):
                    repeat[engine] = run(texts)
                    seconds, drawn = repeat[engine]
                    print(f"  {' '.join(engine)}: {sum(drawn)} tokens in {seconds:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, dtype in dict.fromkeys(engine for repeat in found for engine in repeat):
        bases = [("generate", d) for d in dict.fromkeys(("float32", dtype)) if ("generate", d) in runs]
        whole = [repeat for repeat in found if (name, dtype) in repeat]
        counts = [n for repeat in whole for n in repeat[name, dtype][1]]
        speeds = [{engine: sum(drawn) / seconds for engine, (seconds, drawn) in repeat.items()} for repeat in whole]
        ratios = [speed[name, dtype] / max(speed[base] for base in bases) for speed in speeds]
        median = statistics.median(speed[name, dtype] for speed in speeds)
        most = floor(models[dtype], counts, min(ROWS["irlign"], ANSWERS * prompts), limits[dtype], limits["memory"])
        rows.append({
            "engine": name, "shape": shape, "dtype": dtype, "lengths": lengths, "tokens_per_s": median, "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)], "roofline_share": median / most, "mean_length": statistics.mean(counts),
            "repeats": len(whole),
        })  # fmt: skip
    return rows


@contextlib.contextmanager
def _unless_it_fails(runs: dict[tuple[str, str], Any], engine: tuple[str, str], shape: str, lengths: str) -> Iterator[None]:
    """A peer that cannot serve, or dies, is not asked again, and the others go on."""
    try:
        yield
    except PeerError as error:
        runs.pop(engine, None)
        print(f"{shape:12} {lengths:10} {engine[1]}: not measured from here on: {error}", flush=True)


def _runner(
    name: str, shape: str, lengths: str, model: Any, python: Path, compiled: bool, open_peers: contextlib.ExitStack
) -> Callable[..., tuple[float, list[int]]]:
    """What draws an answer to prompts: seconds and useful lengths. Raises PeerError."""
    threads, several = torch.get_num_threads(), name.endswith(WORKERS)
    if name.removesuffix(WORKERS) in PEERS:
        rows, workers = ROWS[name.removesuffix(WORKERS)], threads if several else 1
        wanted = {"answers": ANSWERS, "new": NEW, "eos": EOS, "rows": rows, "compiled": compiled, "workers": workers}
        peer = Peer(name.removesuffix(WORKERS), python, model, threads, **wanted)
        open_peers.callback(peer.close)
        return peer.draw
    if several:
        from sampling_workers import runner

        return runner(shape, lengths, str(model.dtype).removeprefix("torch."), threads, open_peers)

    def run(prompts: list[tuple[int, ...]]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        lengths = ENGINES[name](model, prompts)
        return time.perf_counter() - start, lengths

    return run


def plan(quick: bool, large: bool, peers: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Shapes with how much of each: prompts for fixed and realistic lengths, repeats, engines."""
    several = [name + WORKERS for name in (*peers, "irlign") if name in ("ctranslate2", "irlign")]
    plain, bf16 = ([(name, dtype) for name in ("generate", *peers, "irlign", *several)] for dtype in ("float32", "bfloat16"))
    if quick:
        return [("llama 0.9 M", {"prompts": {"fixed": 8, "realistic": 16}, "repeats": 3, "engines": plain})]
    tiny = {"prompts": {"fixed": 32, "realistic": 64}, "repeats": 5, "engines": [*plain, ("generate static", "float32")]}
    middle = {"prompts": {"realistic": 16}, "repeats": 3, "engines": plain + bf16}
    biggest = {"prompts": {"realistic": 8}, "repeats": 3, "engines": bf16}
    return [("llama 0.9 M", tiny), ("gpt-2 small", middle), *([("qwen 0.5 B", biggest)] if large else [])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 0.9 M Llama only: under a minute without --peers")
    parser.add_argument("--large", action="store_true", help="the 0.5 B Qwen shape too")
    parser.add_argument("--peers", type=Path, help="the Python that has CTranslate2 and vLLM; else .venv-vllm's, unless --quick")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiled (wants a C++ compiler) instead of eager")
    parser.add_argument("--only", choices=list(SHAPES), help="one shape only")
    parser.add_argument("--repeats", type=int, help="how often each engine runs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    python = given.peers or (None if given.quick else PYTHON)
    limits = {"float32": gflops(torch.float32), "bfloat16": gflops(torch.bfloat16), "memory": bandwidth()}
    peers = present(python)
    print(f"{torch.get_num_threads()} threads; products {limits['float32']:.0f} GFLOPS float32, {limits['bfloat16']:.0f} bfloat16; "
          f"memory {limits['memory']:.0f} GB/s" + f"\n{absent(peers)}".rstrip(), flush=True)  # fmt: skip
    rows: list[Any] = []
    for shape, how in plan(given.quick, given.large, peers):
        for lengths, prompts in how["prompts"].items() if given.only in (None, shape) else ():
            done = measure(
                shape, lengths, prompts=prompts, repeats=given.repeats or how["repeats"], engines=how["engines"], limits=limits,
                python=python, compiled=given.compiled,
            )  # fmt: skip
            rows += done
            for row in done:
                low, high = row["spread"]
                print(f"{row['shape']:12} {lengths:10} {row['engine']:19} {row['dtype']:9} {row['tokens_per_s']:9.0f} tok/s "
                      f"{row['ratio']:6.2f}x ({low:.2f} to {high:.2f})  {row['roofline_share']:5.0%} of the roofline, "
                      f"mean length {row['mean_length']:.1f}", flush=True)  # fmt: skip
    if given.json:
        absent_peers = [name for name in PEERS if name not in peers]
        given.json.write_text(json.dumps({"limits": limits, "absent": absent_peers, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

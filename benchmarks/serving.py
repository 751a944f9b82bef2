"""Answers under load: irlign's server with 1, 8 and 64 clients, beside the bare engine that decodes as many answers at once.

    python benchmarks/serving.py [--quick] [--json FILE]

A Llama of 0.9 M parameters with random weights, prompts of the dialogue world, answers of up to 32 tokens, or of 8, 8, 32 and 128 in turn
(`mixed`); a classifier of the same shape scores every answer. Each client asks again as soon as it is answered (one connection each, no client library, so that the server
is what is measured; clients and server share the machine's cores). `bare` draws the same prompts in batches of clients x best_of
answers, one after the other, without a server and without a reward: what the engine could do. Tokens are drawn tokens, those of
candidates that were not picked among them. `short` is the median of the requests with the fewest tokens. A ratio is to `bare` in the same repeat; the spread is the smallest and largest.
"""

# ruff: noqa: E402
import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irlign.progress import hush, silenced

hush()  # before transformers is imported

import numpy as np
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from irlign.policy.load import Policy, save_policy
from irlign.policy.pretrain import word_tokenizer
from irlign.records import Prompt
from irlign.reward.model import Classifier
from irlign.sampling.engine import Request, SamplingSettings, load_engine
from irlign.serve import Server, bind
from irlign.serving.answers import Answerer, Served
from irlign.serving.load import one_core
from irlign.worlds.dialogue import DialogueWorld

NEW = 32
LIMITS = {"equal": (NEW,), "mixed": (8, 8, NEW, 128)}  # the most tokens of one request after the other
CASES = [("equal", best_of, clients) for best_of in (1, 4) for clients in (1, 8, 64)] + [("mixed", 1, clients) for clients in (8, 64)]
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}


def make_policy(folder: Path) -> None:
    """Random weights and the dialogue world's own words."""
    set_seed(0)
    tokenizer = word_tokenizer(sorted(set(DialogueWorld().vocabulary())), 256)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    save_policy(Policy(LlamaForCausalLM(LlamaConfig(vocab_size=1024, **SHAPE, **ids)), tokenizer, "policy"), folder)


def make_answerer(folder: Path) -> Answerer:
    """The policy and a reward of its shape, in memory."""
    sampling = SamplingSettings(max_new_tokens=NEW)
    about: dict[str, Any] = {"choice": {"n": 1, "label_free": None}, "alarms": [], "lone_text": True, "force": True}
    served = Served("policy", "sft", 1, "random", sampling=sampling, **about)
    reward = Classifier.start(folder, "none", "random")
    reward.model.eval()
    return Answerer(served, load_engine(folder, sampling, "none"), reward)


def _texts() -> Iterator[str]:
    demonstrations = DialogueWorld().splits(0)["train"]
    return itertools.cycle([str(d.prompt.content) for d in demonstrations[:64]])


def serve(folder: Path) -> None:
    """The server's process: says its port, then serves until it is ended."""
    place = bind("127.0.0.1", 0)
    with silenced():
        with one_core():
            server = Server(make_answerer(folder))
        print(place.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(server, log_level="warning", access_log=False)).run(sockets=[place])


async def ask(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: dict[str, Any]) -> dict[str, Any]:
    """One request over an open connection."""
    reader, writer = streams
    raw = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw))
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    said = await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
    if " 200 " not in head.splitlines()[0]:
        raise RuntimeError(said.decode())
    return json.loads(said)


async def load(port: int, lengths: str, best_of: int, clients: int, seconds: float) -> tuple[list[tuple[int, float]], int, float]:
    """The limit and the seconds of every request, the tokens drawn for all, and how long it all took."""
    texts, limits, end, taken, tokens = (
        _texts(),
        itertools.cycle(LIMITS[lengths]),
        time.perf_counter() + seconds,
        list[tuple[int, float]](),
        0,
    )

    async def client() -> None:
        nonlocal tokens
        streams = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            start, limit = time.perf_counter(), next(limits)
            answer = await ask(streams, {"model": "policy", "prompt": next(texts), "best_of": best_of, "max_tokens": limit})
            taken.append((limit, time.perf_counter() - start))
            tokens += answer["irlign"]["drawn_tokens"]
        streams[1].close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return taken, tokens, time.perf_counter() - start


def bare(answerer: Answerer, lengths: str, best_of: int, clients: int, seconds: float) -> float:
    """Tokens a second of the engine alone, in batches of clients x best_of answers."""
    texts, limits, seeds, tokens, start = _texts(), itertools.cycle(LIMITS[lengths]), itertools.count(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        asked = [(Prompt.of(next(texts), "served"), tuple(itertools.islice(seeds, best_of)), next(limits)) for _ in range(clients)]
        batch = [Request(*one) for one in asked]
        tokens += sum(sample.tokens for sample in answerer.engine.draw(batch))
    return tokens / (time.perf_counter() - start)


def measure(answerer: Answerer, port: int, *case: Any, seconds: float, repeats: int) -> dict[str, Any]:
    """One row of `case`, which is lengths, best_of and clients: rates, seconds of a request, and the ratio to the bare engine."""
    rates, ratios, limited, answers = [], [], list[tuple[int, float]](), []
    for _ in range(repeats):
        alone = bare(answerer, *case, seconds / 2)
        found, tokens, whole = asyncio.run(load(port, *case, seconds))
        rates.append(tokens / whole)
        ratios.append(rates[-1] / alone)
        answers.append(len(found) / whole)
        limited += found
    taken, least = [s for _, s in limited], min(LIMITS[case[0]])
    return {
        **dict(zip(("lengths", "best_of", "clients"), case, strict=True)), "answers_per_s": statistics.median(answers), "tokens_per_s": statistics.median(rates),
        "p50_s": float(np.percentile(taken, 50)), "p99_s": float(np.percentile(taken, 99)), "requests": len(taken),
        "short_p50_s": statistics.median(s for limit, s in limited if limit == least), "ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seconds a row, once: under a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        return serve(given.serve)
    how: dict[str, Any] = {"seconds": 2.0, "repeats": 1} if given.quick else {"seconds": 20.0, "repeats": 3}
    rows = []
    with tempfile.TemporaryDirectory() as folder, silenced():
        make_policy(Path(folder))
        answerer = make_answerer(Path(folder))
        with subprocess.Popen([sys.executable, __file__, "--serve", folder], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline())
                asyncio.run(load(port, "equal", 1, 1, 0.5))  # warm-up
                for lengths, best_of, clients in CASES:
                    rows.append(measure(answerer, port, lengths, best_of, clients, **how))
                    row = rows[-1]
                    print(f"{lengths}  {clients:3} clients  best of {best_of}  {row['answers_per_s']:7.1f} answers/s {row['tokens_per_s']:8.0f} tok/s  "
                          f"p50 {row['p50_s']:.3f} s  short {row['short_p50_s']:.3f} s  p99 {row['p99_s']:.3f} s  {row['ratio']:.2f}x bare "
                          f"({row['spread'][0]:.2f} to {row['spread'][1]:.2f})", flush=True)  # fmt: skip
            finally:
                process.terminate()
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()

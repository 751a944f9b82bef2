"""A soak of `irlign serve` on loopback: clients of five kinds against a small queue, for as long as asked, with one line of figures each minute.

    python tests/soak.py [--seconds 600] [--clients 64] [--seed 100]

Of eight clients four ask (one of them for streams), one scores, one is slow (its body comes in drops, its stream is read in drops), one
leaves before its answer is there, and one sends what is no request. The queue holds fewer than there are clients, so that some are told to
come back (429 with Retry-After) and do. Whatever was accepted has to be answered whole; the server's memory and open files have to stay where
they were. At the end SIGTERM meets requests in flight: they are answered, and the process ends with 0.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small import small_recipe

ROLES = ("ask", "ask", "ask", "stream", "score", "slow", "leaves", "nonsense")
QUESTIONS = ("How do I fix my bike?", "What should I cook tonight?", "Why is the sky blue?", "Where can I learn to paint?")
NONSENSE = (
    b"{",
    b"[]",
    b'{"model": 3}',
    b'{"model": "nobody", "prompt": "x"}',
    b'{"model": "best-of-n", "prompt": "x", "echo": true}',
    b"\xff" * 50,
)
PATIENCE = 120.0  # seconds for one answer


class Lost(Exception):
    """An accepted request that was not answered whole."""


@dataclass
class Figures:
    """What happened: requests by outcome, what was lost, seconds of each answer, memory and open files of the server once a second."""

    count: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    code: int | None = None

    def growth(self) -> float:
        """MiB by which the mean of the last quarter lies above that of the second; the first warms up."""
        quarter = max(1, len(self.memory) // 4)
        second, last = self.memory[quarter : 2 * quarter] or self.memory, self.memory[-quarter:]
        return sum(last) / len(last) - sum(second) / len(second)


@dataclass
class Answer:
    """Status, headers and the whole body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One client with one connection at a time; HTTP by hand, so that it can be slow and rude."""

    def __init__(self, port: int, role: str, rng: random.Random):
        self.port, self.role, self.rng = port, role, rng
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def body(self) -> tuple[str, bytes]:
        """The path and the body of the next request."""
        question = self.rng.choice(QUESTIONS)
        if self.role == "score":
            return "/v1/score", json.dumps({"prompt": question, "completion": ["With care.", "No."]}).encode()
        if self.role == "nonsense":
            return self.rng.choice(["/v1/completions", "/v1/chat/completions"]), self.rng.choice(NONSENSE)
        asked: dict[str, Any] = {"model": "best-of-n", "seed": self.rng.randrange(1000), "n": self.rng.choice([1, 1, 1, 2])}
        asked |= {"stream": True} if self.role in ("stream", "slow") else {}
        if self.rng.random() < 0.5:
            return "/v1/completions", json.dumps({**asked, "prompt": question}).encode()
        return "/v1/chat/completions", json.dumps({**asked, "messages": [{"role": "user", "content": question}]}).encode()

    async def send(self, path: str, raw: bytes) -> asyncio.StreamReader:
        """The request over the open connection, or a new one; in drops where the client is slow."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(raw))
        )
        drops = [raw[i : i + 16] for i in range(0, len(raw), 16)] if self.role == "slow" else [raw]
        for drop in drops:
            writer.write(drop)
            await writer.drain()
            if len(drops) > 1:
                await asyncio.sleep(0.05)
        return reader

    async def read(self, reader: asyncio.StreamReader) -> Answer:
        """The whole response, of a known length or in chunks."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        parts = []
        if "content-length" in headers:
            parts.append(await reader.readexactly(int(headers["content-length"])))
        else:
            while size := int(await reader.readline(), 16):
                parts.append((await reader.readexactly(size + 2))[:-2])
                if self.role == "slow":
                    await asyncio.sleep(0.05)
            await reader.readline()
        return Answer(int(head[0].split()[1]), headers, b"".join(parts))

    async def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            with contextlib.suppress(OSError):
                await self.streams[1].wait_closed()
            self.streams = None


def check(answer: Answer, streamed: bool) -> None:
    """Raises Lost where an accepted request has no whole answer."""
    if not streamed:
        said = json.loads(answer.body)
        if not (said.get("choices") or said.get("data")):
            raise Lost(f"an answer without a choice: {answer.body[:200]!r}")
        return
    events = [line[6:] for line in answer.body.decode().split("\n\n") if line]
    if events[-1:] != ["[DONE]"] or not any(choice["finish_reason"] for e in events[:-1] for choice in json.loads(e)["choices"]):
        raise Lost(f"a stream that does not end: {events[-1:]}")


async def one(client: Client, figures: Figures) -> None:
    """One request of a client, again after 429 until it is accepted."""
    path, raw = client.body()
    while True:
        started = time.monotonic()
        reader = await client.send(path, raw)
        if client.role == "leaves":
            await asyncio.sleep(client.rng.random() * 0.2)
            await client.close()
            figures.count["left"] += 1
            return
        answer = await asyncio.wait_for(client.read(reader), PATIENCE)
        if answer.status != 429:
            break
        figures.count["429"] += 1
        if not re.fullmatch(r"[1-9]\d*", answer.headers.get("retry-after", "")):
            raise Lost("429 without Retry-After")
        await asyncio.sleep(int(answer.headers["retry-after"]) * client.rng.uniform(0.5, 1.0))
    if client.role == "nonsense":
        if answer.status not in (400, 404):
            raise Lost(f"nonsense was answered with {answer.status}")
        figures.count["refused"] += 1
        return
    if answer.status != 200:
        raise Lost(f"{answer.status}: {answer.body[:200]!r}")
    check(answer, client.role in ("stream", "slow"))
    figures.count["answered"] += 1
    figures.seconds.append(time.monotonic() - started)


async def live(client: Client, figures: Figures, end: float) -> None:
    """A client until the end; what it loses is noted, and it goes on."""
    while time.monotonic() < end:
        try:
            await one(client, figures)
        except (Lost, OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            figures.lost.append(f"{client.role}: {type(error).__name__}: {error}")
            await client.close()
        if client.role == "nonsense":
            await asyncio.sleep(0.1)
    await client.close()


def looks(pid: int) -> tuple[float, int]:
    """Resident MiB and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))  # type: ignore[index]


async def load(process: subprocess.Popen, port: int, clients: int, seconds: float, seed: int) -> Figures:
    """All clients for so long, then SIGTERM while the last requests are on their way."""
    figures, start = Figures(), time.monotonic()
    work = [Client(port, ROLES[i % len(ROLES)], random.Random(f"{seed}-{i}")) for i in range(clients)]
    living = asyncio.gather(*(live(client, figures, start + seconds) for client in work))
    while not living.done():
        await asyncio.wait({living}, timeout=1.0)
        memory, files = looks(process.pid)
        figures.memory.append(memory)
        figures.files.append(files)
        if len(figures.memory) % 60 == 0:
            print(
                f"{time.monotonic() - start:5.0f} s  {memory:6.1f} MiB  {files} files  {dict(figures.count)}  lost {len(figures.lost)}",
                flush=True,
            )
    await living
    last = [Client(port, "ask", random.Random(i)) for i in range(4)]
    readers = [await client.send(*client.body()) for client in last]
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    for client, reader in zip(last, readers, strict=True):
        try:
            answer = await asyncio.wait_for(client.read(reader), PATIENCE)
            check(answer, False)
            figures.count["answered after SIGTERM"] += 1
        except (Lost, OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            figures.lost.append(f"after SIGTERM: {type(error).__name__}: {error}")
        await client.close()
    figures.code = await asyncio.to_thread(process.wait, 60)
    return figures


def soak(run: Path, *, seconds: float, clients: int, seed: int) -> Figures:
    """`irlign serve` of a run in a process of its own, under load."""
    options = {"--port": 0, "--policy": "best-of-n", "--n": 2, "--max-waiting": max(2, clients // 4)}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "irlign", "serve", str(run), "--force", *words]
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "IRLIGN_QUIET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "MALLOC_ARENA_MAX": "2"}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, text=True, env=environment) as process:
        try:
            port = 0
            while not port:
                log.seek(0)
                if (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read())) is not None:
                    port = int(found[1])
                elif process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read()}")
                time.sleep(0.1)
            figures = asyncio.run(load(process, port, clients, seconds, seed))
            log.seek(0)
            if "Traceback" in (said := log.read()):
                figures.lost.append(f"a traceback: {said[-500:]}")
            return figures
        finally:
            process.kill()


def summary(figures: Figures) -> str:
    """The figures in words."""
    ordered = sorted(figures.seconds) or [0.0]
    quantiles = {q: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99)}
    return (
        f"{figures.count['answered']} answered, {figures.count['429']} told to come back (429), {figures.count['left']} left, "
        f"{figures.count['refused']} refused, {figures.count['answered after SIGTERM']} answered after SIGTERM, {len(figures.lost)} lost\n"
        f"seconds of an answer: median {quantiles[0.5]:.2f}, 99th percentile {quantiles[0.99]:.2f}\n"
        f"memory: {min(figures.memory):.0f} to {max(figures.memory):.0f} MiB, last quarter {figures.growth():+.1f} MiB on the second; "
        f"open files: {min(figures.files)} to {max(figures.files)}, {figures.files[-1]} at the end; exit code {figures.code}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=100)
    given = parser.parse_args()
    os.environ["IRLIGN_QUIET"] = "1"
    from irlign.progress import hush

    hush()  # before transformers is imported
    from irlign.pipeline import run_stage

    with tempfile.TemporaryDirectory(prefix="irlign-soak-") as place:
        print(f"seed {given.seed}, {given.clients} clients, {given.seconds:g} s", flush=True)
        made = run_stage("bon", small_recipe(Path(place) / "run", best_of_n={"n": 2, "force": True}))
        result = soak(made, seconds=given.seconds, clients=given.clients, seed=given.seed)
    print(summary(result), *result.lost[:20], sep="\n")
    sys.exit(bool(result.lost) or result.code != 0 or result.growth() > 20)

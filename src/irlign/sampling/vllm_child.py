"""The process that holds vLLM, run by its own Python: standard library and vLLM alone, since irlign need not be installed there.

JSON Lines. In: what to load, then for each draw `{"rows": [{"ids", "seed", "max_tokens"}], "law": {...}}`. Out: `{"vllm", "dtype"}` once
loaded, then a line `{"ids", "logprobs"}` for each row in order (the tokens drawn, EOS included, and their log-probabilities in nats under
the model itself), or a last line `{"error"}`. It ends with its input, or with the process that started it.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no answer
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: a parent that is killed leaves nothing behind
    try:
        model, about = load(json.loads(sys.stdin.readline()))
        say(out, [about])
        for line in sys.stdin:
            say(out, draw(model, json.loads(line)))
    except BaseException as error:
        say(out, [{"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}])
        raise


def load(wanted: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The engine, and what it settled on. Precision "auto": bfloat16, and float32 on a CPU."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this is the process that ends
    from vllm import LLM, __version__
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    dtype = wanted.pop("dtype")
    dtype = {"auto": "float32" if on_cpu else "bfloat16"}.get(dtype, dtype)
    fixed = {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs", "generation_config": "vllm", "dtype": dtype}
    model = LLM(**{"enforce_eager": on_cpu, "disable_log_stats": True, **fixed, **wanted})
    return model, {"vllm": __version__, "dtype": dtype}


def draw(model: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """One answer for each row, each with its own seed; rows with one prompt share what the cache holds of it."""
    from vllm import SamplingParams

    laws = [SamplingParams(**asked["law"], seed=row["seed"], max_tokens=row["max_tokens"], logprobs=0) for row in asked["rows"]]
    prompts = [{"prompt_token_ids": row["ids"]} for row in asked["rows"]]
    answers = [of.outputs[0] for of in model.generate(prompts, laws, use_tqdm=False)]
    return [{"ids": list(a.token_ids), "logprobs": [at[i].logprob for i, at in zip(a.token_ids, a.logprobs, strict=True)]} for a in answers]


def say(out: Any, lines: list[dict[str, Any]]) -> None:
    out.writelines(json.dumps(line) + "\n" for line in lines)
    out.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are no libraries
    main()

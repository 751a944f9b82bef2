"""The process that holds a peer of the sampling benchmark, run by the peers' own Python: `sampling_peer.py ctranslate2|vllm`.

JSON Lines. In: what to load, `{"model", "dtype", "threads", "workers", "answers", "new", "eos", "rows"}` (`rows` answers at once at most for each worker), then lists
of prompts as token ids. Out: `{"about"}` once loaded, then `{"seconds", "lengths"}` for each list: `answers` lengths a prompt, in order, EOS counted.
Tokens are drawn from the model's own law: temperature 1, neither top-k nor top-p. It ends with its input.
"""

import json
import os
import sys
import tempfile
import time


def load_ctranslate2(wanted):
    """In the precision asked for, or not at all; each of the `workers` decodes `rows` answers together, with its share of the threads."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from ctranslate2.converters.transformers import _MODEL_LOADERS as loaders

    if wanted["dtype"] not in ctranslate2.get_supported_compute_types("cpu"):
        raise ValueError(f"CTranslate2 has no {wanted['dtype']} on this CPU")
    for loader in {type(loader) for loader in loaders.values()}:  # a token is named by its number: no tokenizer is asked
        loader.get_vocabulary = lambda self, model, tokenizer: [str(i) for i in range(model.config.vocab_size)]
        loader.set_config = lambda self, config, model, tokenizer: None
    converter = TransformersConverter(wanted["model"])
    converter.load_tokenizer = lambda *args, **options: None
    folder = tempfile.mkdtemp(dir=wanted["model"])
    converter.convert(folder, force=True)
    threads = {"inter_threads": wanted["workers"], "intra_threads": wanted["threads"] // wanted["workers"]}
    generator = ctranslate2.Generator(folder, device="cpu", compute_type=wanted["dtype"], **threads)
    law = {"beam_size": 1, "sampling_topk": 0, "sampling_temperature": 1.0, "num_hypotheses": wanted["answers"]}
    ends = {"max_length": wanted["new"], "end_token": [wanted["eos"]], "include_prompt_in_result": False, "return_end_token": True}
    batch = {"max_batch_size": max(1, wanted["rows"] // wanted["answers"])}

    def draw(prompts):
        found = generator.generate_batch([[str(i) for i in ids] for ids in prompts], **law, **ends, **batch)
        return [len(ids) for one in found for ids in one.sequences_ids]

    return draw, f"ctranslate2 {ctranslate2.__version__}"


def load_vllm(wanted):
    """Continuous batching of up to `rows` answers; a prompt's n answers share what the prefix cache holds of it."""
    from vllm import LLM, SamplingParams, __version__

    engine = {"max_num_seqs": wanted["rows"], "max_model_len": 256, "enable_prefix_caching": True, "enforce_eager": not wanted["compiled"]}
    plain = {"skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": True, "seed": 0}
    model = LLM(wanted["model"], dtype=wanted["dtype"], **engine, **plain)
    law = SamplingParams(n=wanted["answers"], temperature=1.0, max_tokens=wanted["new"], stop_token_ids=[wanted["eos"]], detokenize=False)

    def draw(prompts):
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], law, use_tqdm=False)
        return [len(answer.token_ids) for one in found for answer in one.outputs]

    return draw, f"vllm {__version__}, {'compiled' if wanted['compiled'] else 'eager'}"


LOADERS = {"ctranslate2": load_ctranslate2, "vllm": load_vllm}


def main():
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    try:
        draw, about = LOADERS[sys.argv[1]](json.loads(sys.stdin.readline()))
        say({"about": about})
        for line in sys.stdin:
            prompts = json.loads(line)
            start = time.perf_counter()
            lengths = draw(prompts)
            say({"seconds": time.perf_counter() - start, "lengths": lengths})
    except BaseException as error:
        say({"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"})
        raise


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are no libraries
    main()

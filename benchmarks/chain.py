"""The whole job side by side: irlign's stages against the same job put together from TRL's trainers and `generate`.

    python benchmarks/chain.py [--quick] [--seeds 100,101] [--json FILE]

The dialogue world of recipes/quickstart.yaml: the same pi_0, the same 400 demonstrations, the same numbers of answers, epochs, learning rates and
batch sizes on both sides. The assembly: SFTTrainer; `generate` (8 prompts at a time, `num_return_sequences`) from pi_0 and the tuned model;
RewardTrainer on one over the other; scores in batches of 8 in order; the best of N by that score. irlign runs `sft`, `sample`, `reward` and `bon`,
which also draws dev answers and chooses reward and n by its judge: more work than the assembly does, for more reward. So a third side, `fewer`, is
irlign with a quarter of the answers to train prompts and half of those to test prompts: does it reach the assembly's reward? `--quick`, whose
numbers are as small already, leaves it out. Each side is a process of its own, one after the other; seconds from its start to its end (imports
included), CPU seconds, and the most memory it held. Golden reward of the selected test answers; a difference is irlign's minus the assembly's over
the same prompts with its 95 % interval, and it is not worse where the lower bound is above -5 % of the gap between SFT and the demonstrations.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlign.config import parse_seeds
from irlign.data.chat import Format, pad
from irlign.data.splits import stored_demonstrations
from irlign.files import read_json, write_json
from irlign.pipeline import run_stage
from irlign.policy.load import load_policy
from irlign.recipe import Recipe, as_recipe
from irlign.runs import Run

RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"
SMALL = ["world.demonstrations=60", "world.dev_prompts=20", "world.test_prompts=20", "world.corpus_lines=3000", "pretrain.num_train_epochs=1", "sampling.num_generations=8",
         "sampling.train_generations=2", "sft.num_train_epochs=2", "reward.num_train_epochs=1"]  # fmt: skip
FEWER = ["sampling.train_generations=2", "sampling.num_generations=8"]


def irlign(folder: Path) -> list[tuple[str, str]]:
    """Prompt ids and answers that irlign selects on the test prompts."""
    run_stage("bon", None, [f"output_dir={folder}"])
    lines = (folder / "best_of_n/selected.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["prompt_id"], row["completion"]) for row in rows if row["split"] == "test"]


def assembly(folder: Path) -> list[tuple[str, str]]:
    """The same from TRL's trainers and `generate`, as a script that a user would write."""
    from datasets import Dataset
    from transformers import set_seed
    from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    run = Run.read(folder)
    recipe, own = as_recipe(run.recipe), folder / "assembly"
    start = load_policy(str(folder / "policies/init"))
    tokenizer, form = start.tokenizer, Format(start.tokenizer, recipe.data.chat_template)
    train, test = ([*stored_demonstrations(run, split)] for split in ("train", "test"))
    set_seed(recipe.seed)

    def arguments(kind: Any, settings: Any) -> Any:
        names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps")
        fields = {name: getattr(settings, name) for name in names}
        return kind(output_dir=str(own), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=recipe.seed, **fields)

    shown = Dataset.from_list([{"prompt": form.prompt_text(d.prompt.content), "completion": d.completion} for d in train])
    tuned = AutoModelForCausalLM.from_pretrained(folder / "policies/init", dtype=torch.float32)
    trainer = SFTTrainer(model=tuned, args=arguments(SFTConfig, recipe.sft), train_dataset=shown, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(own))
    tuned = trainer.model.eval()

    def generate(model: Any, demonstrations: Sequence[Any], count: int) -> list[list[str]]:
        texts = [form.prompt_text(d.prompt.content) for d in demonstrations]
        found: list[str] = []
        law = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": recipe.sampling.max_new_tokens, "num_return_sequences": count}
        for first in range(0, len(texts), 8):
            batch = tokenizer(texts[first : first + 8], return_tensors="pt", padding=True, padding_side="left")
            with torch.inference_mode():
                out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **law)
            found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [found[i : i + count] for i in range(0, len(found), count)]

    sizes = recipe.sampling
    worse, better = (generate(model, train, sizes.train_generations) for model in (start.model, tuned))
    pool = generate(tuned, test, sizes.num_generations)
    texts = [form.prompt_text(d.prompt.content) for d in train]
    pairs = [
        {"prompt": p, "chosen": b, "rejected": w}
        for p, bs, ws in zip(texts, better, worse, strict=True)
        for b, w in zip(bs, ws, strict=True)
    ]
    reward = AutoModelForSequenceClassification.from_pretrained(own, num_labels=1, dtype=torch.float32)
    reward.config.pad_token_id = tokenizer.pad_token_id
    judge = RewardTrainer(
        model=reward, args=arguments(RewardConfig, recipe.reward), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    judge.train()
    rows = [ids.ids for d, answers in zip(test, pool, strict=True) for ids in form.encode([d.prompt.content] * len(answers), answers)]
    scores: list[float] = []
    for first in range(0, len(rows), 8):
        ids, mask = pad(rows[first : first + 8], int(tokenizer.pad_token_id))
        with torch.inference_mode():
            scores += judge.model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    best = np.array(scores).reshape(len(test), -1).argmax(1)
    return [(d.prompt.prompt_id, answers[i]) for d, answers, i in zip(test, pool, best, strict=True)]


SIDES: dict[str, tuple[Any, list[str]]] = {
    "irlign": (irlign, []),
    "fewer": (irlign, FEWER),
    "assembly": (assembly, []),
}  # with its own settings


def child(side: str, folder: Path) -> None:
    """What a process of its own does: one side, its answers and its peak memory in a file."""
    answers = SIDES[side][0](folder)
    write_json(folder / f"{side}.json", {"answers": answers, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def timed(side: str, folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds and peak memory of one side, and its answers by prompt."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, __file__, "--side", side, "--folder", str(folder)], check=True, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = read_json(folder / f"{side}.json")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": found["peak_mb"], "answers": dict(found["answers"])}


def golden_P(recipe: Recipe, run: Run, answers: dict[str, str]) -> np.ndarray:
    """The world's reward of one answer to each test prompt, in the order of the prompts."""
    assert recipe.world is not None
    by_id = {d.prompt.prompt_id: d.prompt.content for d in stored_demonstrations(run, "test")}
    return np.array(recipe.world.golden(list(by_id.values()), [answers[i] for i in by_id]))


def against(found: dict[str, dict[str, Any]], golden: dict[str, np.ndarray], gap: float) -> dict[str, Any]:
    """Every other side beside the assembly: how many times its seconds and memory the assembly takes, and the difference of golden rewards, of
    shape [P] each, with its interval."""
    from irlign.statistics import estimate

    rows = {}
    for side in [side for side in found if side != "assembly"]:
        difference = estimate(golden[side] - golden["assembly"])
        rows[side] = {
            "ratio": {key: found["assembly"][key] / found[side][key] for key in ("seconds", "cpu_seconds", "peak_mb")},
            "difference": difference.mean,
            "ci95": list(difference.ci95),
            "not_worse": difference.ci95[0] > -0.05 * gap,
        }
    return rows


def measure(seed: int, overrides: Sequence[str], order: Sequence[str]) -> dict[str, Any]:
    """All sides on one seed, in this order: the row of the table."""
    from irlign.sampling.pools import stored_samples

    with tempfile.TemporaryDirectory() as place:
        given = [f"seed={seed}", "optimise.method=none", *overrides]
        folders = {side: run_stage("data", RECIPE, [f"output_dir={Path(place, side)}", *given, *SIDES[side][1]]) for side in order}
        found = {side: timed(side, folder) for side, folder in folders.items()}
        run = Run.read(folders["irlign"])
        recipe = as_recipe(run.recipe)
        golden = {side: golden_P(recipe, run, of.pop("answers")) for side, of in found.items()}
        shown = golden_P(recipe, run, {d.prompt.prompt_id: d.completion for d in stored_demonstrations(run, "test")})
        first = {s.prompt.prompt_id: s.completion for s in reversed(stored_samples(run, "sft", "test"))}
        gap = float(shown.mean() - golden_P(recipe, run, first).mean())
    for side, of in found.items():
        of["golden"] = float(golden[side].mean())
    return {"seed": seed, **found, "against": against(found, golden, gap), "gap": gap}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 demonstrations, few answers")
    parser.add_argument("--seeds", default="100", help="100..102, or 100,101")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        return child(given.side, given.folder)
    rows, sides = [], [side for side in SIDES if not (given.quick and side == "fewer")]
    for number, seed in enumerate(parse_seeds(given.seeds)):
        row = measure(seed, SMALL if given.quick else [], sides[:: 1 if number % 2 else -1])
        rows.append(row)
        for side in sides:
            print(f"seed {seed} {side:9} {row[side]['seconds']:7.1f} s  {row[side]['cpu_seconds']:7.1f} CPU s  {row[side]['peak_mb']:6.0f} MB  "
                  f"golden {row[side]['golden']:.3f}")  # fmt: skip
        for side, of in row["against"].items():
            (low, high), ratio = of["ci95"], of["ratio"]
            print(f"seed {seed} assembly / {side}: {ratio['seconds']:.2f}x seconds, {ratio['cpu_seconds']:.2f}x CPU seconds, "
                  f"{ratio['peak_mb']:.2f}x memory; golden {of['difference']:+.3f} [{low:+.3f}, {high:+.3f}] of a gap of {row['gap']:.2f}: "
                  f"{'not worse' if of['not_worse'] else 'not shown to be as good'}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()

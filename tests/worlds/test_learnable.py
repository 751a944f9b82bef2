"""The world is learnable: with enough demonstrations the small model is nearly as good as the demonstrator."""

import numpy as np
import pytest

from irlign.files import read_table
from irlign.pipeline import run_stage


@pytest.mark.slow
def test_sft_on_20000_demonstrations_reaches_95_percent_of_the_demonstrator(tmp_path):
    """Golden means over 120 test prompts: four samples of pi_SFT each, against the demonstrator's own answers."""
    words = ["world.demonstrations=20000", "sft.learning_rate=2e-3", "sft.num_train_epochs=3", "sft.per_device_train_batch_size=64"]
    words += ["num_generations=4", "train_generations=1", "initial_generations=1", "data.max_rows=1", f"output_dir={tmp_path}", "seed=100"]
    run_stage("sft", "recipes/quickstart.yaml", words)
    from irlign.records import Prompt
    from irlign.sampling.engine import Request, SamplingSettings, load_engine
    from irlign.worlds.dialogue import DialogueWorld

    rows = read_table(tmp_path / "data/test.parquet")
    engine = load_engine(tmp_path / "policies/sft", SamplingSettings(max_new_tokens=96), "auto")
    samples = engine.draw([Request(Prompt.from_row(row), (4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3)) for i, row in enumerate(rows)])
    reached = np.mean(DialogueWorld.golden([s.prompt.content for s in samples], [s.completion for s in samples]))
    wanted = np.mean(DialogueWorld.golden([row["prompt"] for row in rows], [row["completion"] for row in rows]))
    print(f"SFT on 20,000 demonstrations: golden {reached:.2f}, demonstrator {wanted:.2f}, {reached / wanted:.0%}")
    assert reached >= 0.95 * wanted

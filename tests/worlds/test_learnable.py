"""Every world is learnable: with enough demonstrations the small model is nearly as good as the demonstrator."""

import numpy as np
import pytest

from irlign.files import read_table
from irlign.pipeline import run_stage
from irlign.recipe import WORLDS
from irlign.records import Prompt
from irlign.sampling.engine import Request, SamplingSettings, load_engine


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("heterogeneity", [0, 1])
@pytest.mark.parametrize("name", WORLDS)
def test_sft_on_20000_demonstrations_reaches_95_percent_of_the_demonstrator(tmp_path, name, heterogeneity, seed):
    """Golden means over 1,000 test prompts, one answer of each to every prompt; about four minutes a case."""
    words = [f"world={name}", f"world.heterogeneity={heterogeneity}", "world.demonstrations=20000", "world.test_prompts=1000"]
    words += [f"output_dir={tmp_path}", f"seed={seed}"]
    words += ["sft.learning_rate=2e-3", "sft.num_train_epochs=5", "sft.per_device_train_batch_size=64"]
    run_stage("sft", "recipes/quickstart.yaml", words)
    rows = read_table(tmp_path / "data/test.parquet")
    engine = load_engine(tmp_path / "policies/sft", SamplingSettings(max_new_tokens=96), "auto")
    samples = engine.draw([Request(Prompt.from_row(row), (i,)) for i, row in enumerate(rows)])
    golden, prompts = WORLDS[name].golden, [Prompt.from_row(row).content for row in rows]
    reached = np.mean(golden(prompts, [s.completion for s in samples]))
    wanted = np.mean(golden(prompts, [row["completion"] for row in rows]))
    print(
        f"{name} at heterogeneity {heterogeneity}, seed {seed}, SFT on 20,000 demonstrations: golden {reached:.3f}, demonstrator {wanted:.3f}, {reached / wanted:.1%}"
    )
    assert reached >= 0.95 * wanted

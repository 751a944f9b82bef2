"""What many tests share: quiet progress, a cache of their own, a tiny policy, and the real files where they exist."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(
    IRLIGN_QUIET="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # products are small here, and a second thread spins where others want the core


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pretrained policies of this test session stay in this test session."""
    os.environ["IRLIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real checkpoints and text beside the repository; tests that need them are skipped where they are missing."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("the real checkpoints and texts are not beside this checkout (../shared)")
    return folder

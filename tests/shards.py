"""What is shared out among workers in their tests: words that make prompts, and answers to be scored by two small rewards."""

from pathlib import Path

from tiny import make_tiny_policy

from irlign.reward.publish import publish_log_ratios

WORDS = ("the", "a", "cat", "dog", "bird", "sat", "ran", "sang", "red", "blue")


def to_score(place: Path) -> tuple[dict[str, Path], list[str], list[str]]:
    """Two rewards published in a folder, by name, and 100 prompts with an answer each."""
    (place / "policies").mkdir()
    for seed, side in enumerate(("sft", "init")):
        make_tiny_policy(place / "policies" / side, seed=seed)
    hashes = {f"policies/{side}": {"sha256": "0"} for side in ("sft", "init")}
    names = ["log-ratio", "likelihood"]
    publish_log_ratios(place / "rewards", names, hashes, chat_template="none", seed=0)
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS]
    answers = [" ".join([" cat sat"] * (1 + i % 5)) for i in range(len(prompts))]
    return {name: place / "rewards" / name for name in names}, prompts, answers

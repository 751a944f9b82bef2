"""What stands beside a reward's weights: reward.json, the card, and the reward that needs no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irlign.files import write_json

LOG_RATIOS = {"log-ratio": False, "log-ratio-per-token": True}  # name: whether it is divided by the answer's tokens

CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, inverse-reinforcement-learning]
---
# {name}: a reward learned from demonstrations

One logit, read at the last token; higher is better. Made by irlign {version} from the contrast `{contrast}` (better over worse)
with the `{loss}` loss on {pairs} pairs; accuracy on unseen pairs {accuracy}. The length of an answer alone reaches
{length:.0%} on the training pairs, the ending alone {ending:.0%} (both 50% at best).

```python
import irlign
irlign.load_reward("this folder").score(["a prompt"], ["an answer"])
```
{loads}; the text is the prompt in the chat template `{template}`, the answer, then EOS.

Limits: it has learned what tells two sets of answers apart, and that includes style. Best-of-N under it can pass the
point where more is worse: read the curve in the run's report.
"""


def publish_reward(folder: Path, about: Mapping[str, Any], version: str) -> None:
    """reward.json and README.md beside a saved classifier or ensemble, as `about["kind"]` says."""
    write_json(folder / "reward.json", about)
    dev, members = about["dev"], about.get("members")
    loads = "`AutoModelForSequenceClassification` loads it too"
    if members:
        loads = f"{len(members)} members by their {about['aggregate']}; `AutoModelForSequenceClassification` loads each of them too"
    text = CARD.format(
        name=about["name"],
        loads=loads,
        version=version,
        contrast=about["contrast"],
        loss=about["loss"],
        pairs=about["pairs"]["train"],
        accuracy=f"{dev['accuracy']:.0%}" if dev else "not measured",
        length=about["controls"]["length_accuracy"],
        ending=about["controls"]["ending_accuracy"],
        template=about["chat_template"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def publish_log_ratios(folder: Path, hashes: Mapping[str, Mapping[str, str]], *, chat_template: str, seed: int) -> None:
    """reward.json of log pi_SFT - log pi_0, whole and a token (LOG_RATIOS), in folders below `folder`, over the run's own policies by
    their place and their hash."""
    policies = {side: {"path": f"../../policies/{side}", "sha256": hashes[f"policies/{side}"]["sha256"]} for side in ("sft", "init")}
    about = {"kind": "log-ratio", "contrast": "init-sft", "loss": None, "chat_template": chat_template, "seed": seed}
    for name, normalise in LOG_RATIOS.items():
        write_json(folder / name / "reward.json", {"name": name, **about, "normalise": normalise, "inputs": policies})

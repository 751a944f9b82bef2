"""What stands beside a reward's weights: reward.json, the card, and the reward that needs no weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlign.data.pairs import PAIR
from irlign.files import read_json, write_json
from irlign.reward.ensemble import combine, standardised
from irlign.statistics import spread_within

ABOUT = ("contrast", "loss", "chat_template", "seed", "ending")  # what a held reward says of the learned one
LIKELIHOOD = "likelihood"  # log pi_SFT a token
LOG_RATIOS: dict[str, dict[str, bool]] = {  # name: divided by the answer's tokens; without pi_0
    "log-ratio": {"normalise": False, "alone": False},
    "log-ratio-per-token": {"normalise": True, "alone": False},
    LIKELIHOOD: {"normalise": True, "alone": True},
}

CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, inverse-reinforcement-learning]
---
# {name}: a reward learned from demonstrations

{what}; higher is better. Made by irlign {version} from the contrast `{contrast}` (better over worse)
with the `{loss}` loss on {pairs} pairs; accuracy on unseen pairs {accuracy}. The length of an answer alone reaches
{length:.0%} on the training pairs, the ending alone {ending:.0%} (both 50% at best).

```python
import irlign
irlign.load_reward("this folder").score(["a prompt"], ["an answer"])
```
{loads}; the text is {form}.

Limits: it has learned what tells two sets of answers apart, and that includes style. Best-of-N under it can pass the
point where more is worse: read the curve in the run's report.
"""

HELD = """# {name}: what Best-of-N selects by

The learned reward `{reward}` held to what the SFT policy finds likely: both over their standard deviation within a prompt's answers, the
likelihood (mean log-probability a token) with weight {weight:g}, averaged. It needs the two folders that its reward.json names:
`irlign.load_reward("this folder").score(prompts, completions)`. `best_of_n.likelihood=0` selects by `{reward}` alone.
"""


def publish_reward(folder: Path, about: Mapping[str, Any], version: str) -> None:
    """reward.json and README.md beside a saved reward, as `about["kind"]` says."""
    write_json(folder / "reward.json", about)
    dev = about["dev"]
    what, loads = _words(about)
    text = CARD.format(
        name=about["name"],
        what=what,
        loads=loads,
        version=version,
        contrast=about["contrast"],
        loss=about["loss"],
        pairs=about["pairs"]["train"],
        accuracy=f"{dev['accuracy']:.0%}" if dev else "not measured",
        length=about["controls"]["length_accuracy"],
        ending=about["controls"]["ending_accuracy"],
        form=_form(about["chat_template"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _form(template: str) -> str:
    """How a text is written for the reward."""
    if template == PAIR:
        return "prompt and answer as the tokenizer's text pair, without segment ids"
    name = template if "{" not in template else "its tokenizer's own"
    return f"the prompt in the chat template `{name}`, the answer, then EOS"


def _words(about: Mapping[str, Any]) -> tuple[str, str]:
    """What the reward is, and what else can load it."""
    plain, several = "`AutoModelForSequenceClassification` loads it too", f"combined by their {about.get('aggregate')}"
    if about["kind"] == "ensemble":
        scales = ", each standardised on dev answers" if about.get("scales") else ""
        return f"{len(about['members'])} rewards {several}{scales}", "irlign loads it"
    if about["kind"] == "features":
        heads = f"{about['heads']} {about['head']} heads {several}" if about["heads"] > 1 else f"A {about['head']} head"
        return f"{heads} on frozen features of `{about['encoder']}`, which it needs beside it", "irlign loads it"
    if about["kind"] == "heads":
        return f"{about['heads']} logits over one backbone {several}, read at the last token", f"{plain}, with the mean of the heads"
    return ("One logit of a fine-tuned encoder" if about["chat_template"] == PAIR else "One logit, read at the last token"), plain


def publish_log_ratios(
    folder: Path, names: Sequence[str], hashes: Mapping[str, Mapping[str, str]], *, chat_template: str, seed: int
) -> None:
    """reward.json of the named LOG_RATIOS, in folders below `folder`, over the run's own policies by their place and their hash."""
    policies = {side: {"path": f"../../policies/{side}", "sha256": hashes[f"policies/{side}"]["sha256"]} for side in ("sft", "init")}
    about = {"kind": "log-ratio", "loss": None, "chat_template": chat_template, "seed": seed}
    for name in names:
        contrast = None if LOG_RATIOS[name]["alone"] else "init-sft"
        write_json(folder / name / "reward.json", {"name": name, **about, "contrast": contrast, **LOG_RATIOS[name], "inputs": policies})


def held_to_likelihood(
    reward_B: np.ndarray, likelihood_B: np.ndarray, prompts: Sequence[str | None], weight: float
) -> tuple[np.ndarray, list[list[float]]]:
    """A reward held to what pi_SFT finds likely, `((r - m_r) / s_r + weight (l - m_l) / s_l) / 2` with `l = log pi_SFT(y|x)` a token,
    and the scales that give it: `m` is the mean and `s` the standard deviation within a prompt's answers, over the rows whose
    prompt is not None. Shape [B].

    Selection by a reward alone drifts to answers that pi_SFT hardly ever gives, where the reward has seen nothing (method.md
    section 4); where pi_SFT is right more often than not, what it finds likely is right too.
    """
    known = [i for i, prompt in enumerate(prompts) if prompt is not None]
    groups, sides = [str(prompts[i]) for i in known], ((reward_B[known], 1.0), (likelihood_B[known], weight))
    scales = [[float(np.mean(of)) if known else 0.0, spread_within(groups, of) / share] for of, share in sides]
    return combine(standardised(np.stack([reward_B, likelihood_B]), np.array(scales)), "mean", 0.0), scales


def publish_held(
    folder: Path, name: str, reward: Path, scales: Sequence[Sequence[float]], weight: float, likelihood: str = f"../{LIKELIHOOD}"
) -> None:
    """reward.json of the reward in the folder `reward`, beside `folder / name`, held to the likelihood: an ensemble of the two."""
    about = {k: v for k, v in read_json(reward / "reward.json").items() if k in ABOUT}
    shape = {"kind": "ensemble", "members": [f"../{reward.name}", likelihood], "aggregate": "mean", "variance_penalty": 0.0}
    write_json(folder / name / "reward.json", {**about, **shape, "name": name, "scales": scales, "likelihood": weight})
    (folder / name / "README.md").write_text(HELD.format(name=name, reward=reward.name, weight=weight), encoding="utf-8")

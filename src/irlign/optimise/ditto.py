"""DITTO's comparisons: a demonstration over every answer of the policy's own, and a later policy's answer over an earlier one's.

Training is DPO's (optimise/preference.py). The ranking `demonstration > later policy > earlier policy` gives three kinds of pairs
(arXiv 2406.00888, section 3): online, replayed and between policies, in the shares 7 : 2 : 1 of its authors' code.
"""

from collections.abc import Sequence

import numpy as np

from irlign.optimise.preference import demonstration_over_own, unlike
from irlign.records import Contrast, Demonstration, Sample

ONLINE, REPLAYED, BETWEEN = 7, 2, 1  # shares of the three kinds


def ranked_by_policy(rounds: Sequence[Sequence[Sample]], demonstrations: Sequence[Demonstration], seed: int) -> list[Contrast]:
    """Pairs from the answers of the policies so far, the newest first: a demonstration over each answer of the newest; over so many of the
    earlier ones' as the shares ask for, drawn from all; and answers of the newest over earlier ones to the same prompt, as many.

    Where there are too few of a kind, all of them. Answers that are cut, empty or the demonstration itself have no part.
    """
    newest, *earlier = [unlike(samples, demonstrations) for samples in rounds]
    old = [sample for samples in earlier for sample in samples]
    old_to: dict[str, list[Sample]] = {}
    for sample in old:
        old_to.setdefault(sample.prompt.prompt_id, []).append(sample)
    sides = ((a, b) for a in newest for b in old_to.get(a.prompt.prompt_id, ()))
    between = [Contrast(a.prompt, a.completion, b.completion) for a, b in sides if a.completion.strip() != b.completion.strip()]
    draw = np.random.default_rng(seed)

    def some(items: Sequence, share: int) -> list:
        count = min(len(items), round(len(newest) * share / ONLINE))
        return [items[i] for i in sorted(draw.choice(len(items), count, replace=False))]

    online = demonstration_over_own(newest, demonstrations)
    return [*online, *demonstration_over_own(some(old, REPLAYED), demonstrations), *some(between, BETWEEN)]

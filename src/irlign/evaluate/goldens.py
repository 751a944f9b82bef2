"""The same answers judged by further golden rewards beside the first: whether a gain is one reward's opinion."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from irlign.evaluate.golden import Golden, score_golden
from irlign.evaluate.group import Group
from irlign.evaluate.metrics import Evaluation
from irlign.records import PromptContent, verdict


def judge_by_others(measured: Evaluation, goldens: Mapping[str, Golden], contents: Mapping[str, PromptContent]) -> list[dict[str, Any]]:
    """For each further golden reward its `name`, the means of every source and of Best-of-n (`best_of_n`, at each n), and the `tests` of the
    published answers: what was selected and what was trained against what they came from. `contents` gives each prompt by its id. Raises
    what `score_golden` does."""
    return [_judged(measured, name, golden, contents) for name, golden in goldens.items()]


def _judged(measured: Evaluation, name: str, golden: Golden, contents: Mapping[str, PromptContent]) -> dict[str, Any]:
    other, done = copy.copy(measured), dict[int, Group]()
    for group in {id(group): group for group in measured.groups.values()}.values():  # pi_SFT's may be the aligned policy's too
        prompts = [contents[p] for p in group.prompt_ids]
        done[id(group)] = replace(group, golden=score_golden(golden, prompts, group.texts, name)) if prompts else group
    other.groups = {source: done[id(group)] for source, group in measured.groups.items()}
    other.pool = other.groups[other.base]
    told = other.golden(name)
    wanted = {("sft", "initial"), ("aligned", "sft"), (f"best_of_{measured.chosen}", measured.base)}
    tests = [test for test in other.tests("golden") if (test["a"], test["b"]) in wanted]
    return {key: told.get(key) for key in ("name", *measured.groups, "best_of_n")} | {"tests": tests}


def opposed(tests: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """An alarm for each comparison that the first golden reward (`tests`) and another decide the other way round."""
    first = {(test["a"], test["b"]): verdict(test["ci95"]) for test in tests}
    for other in others:
        for test in other["tests"]:
            if {first.get((test["a"], test["b"])), verdict(test["ci95"])} == {"better", "worse"}:
                seen = f"{test['a']} is {verdict(test['ci95'])} than {test['b']} by {other['name']}: {test['mean_difference']:+.2f}, against the first"
                yield {
                    "name": "golden rewards disagree",
                    "seen": seen,
                    "do": "read the answers: one of the two is exploited, or measures something else",
                }

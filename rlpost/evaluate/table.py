"""The table at the end of a run: held-out accuracy by stage, and answers to some prompts before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlpost import console
from rlpost.evaluate.evaluator import ALL, estimate_from, percent
from rlpost.evaluate.statistics import Estimate

BEST = {"best_of": "rewards", "judged": "judge"}
"""Field of a summary -> what chooses the best of a prompt's samples, as named in the table."""


def stage_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a stage a row, greedy and sampled accuracy overall and by slice, and of the best of n.

    Args:
        results: stage -> saved result (`Result.to_json`).
    """
    first = next(iter(results.values()))
    keys = [(mode, part) for mode, summary in first.items() for part in summary["accuracy"]]
    columns = ["stage", *(mode if part == ALL else f"{mode}, {part}" for mode, part in keys)]
    rows = [
        [stage, *(percent(estimate_from(result[mode]["accuracy"][part])) for mode, part in keys)]
        for stage, result in results.items()
    ]
    for key, by in BEST.items():
        # A judge is missing until its own stage has run.
        found = [next((s[key] for s in result.values() if s.get(key)), None) for result in results.values()]
        if any(found):
            columns.append(f"best of {max(summary['samples'] for summary in first.values())} by {by}")
            for row, estimate in zip(rows, found, strict=True):
                row.append(percent(estimate_from(estimate)) if estimate else "")
    return columns, rows


def measured(results: Iterable[Mapping[str, Mapping[str, Any]]]) -> str:
    """What the numbers of a table of saved results (`Result.to_json`) are."""
    return unit(estimate_from(e) for result in results for s in result.values() for e in s["accuracy"].values())


def unit(estimates: Iterable[Estimate]) -> str:
    """What a table of estimates shows: shares in percent, or means of scores, whose intervals may leave 0 to 100."""
    if any(v < 0 or v > 1 for e in estimates for v in (e.value, e.low, e.high)):
        return "held-out mean score × 100 (scores outside 0 to 1: no accuracy)"
    return "held-out accuracy in %"


def print_stages(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of stages."""
    first = next(iter(results.values()))
    prompts = next(iter(first.values()))["prompts"]
    columns, rows = stage_table(results)
    console.table(f"{measured(results.values())} [95 % interval], {prompts} prompts", columns, rows)


def print_answers(prompts: Sequence[str], answers: Mapping[str, Sequence[str]], wanted: Sequence[str]) -> None:
    """Print some prompts with the greedy answers of each stage.

    Args:
        prompts: as text.
        answers: stage -> an answer a prompt.
        wanted: the right answers, or empty strings.
    """
    columns = ["prompt", *answers, *(["right"] if any(wanted) else [])]
    rows = [
        [_ends(cell) for cell in (prompt, *(column[i] for column in answers.values()))]
        + ([wanted[i]] if any(wanted) else [])
        for i, prompt in enumerate(prompts)
    ]
    console.table("greedy answers", columns, rows)


def _ends(text: str, width: int = 60) -> str:
    """A long text shortened to its beginning and, mostly, its end."""
    return text if len(text) <= width else f"{text[: width // 3]} … {text[-(2 * width) // 3 :]}"


def telling_prompts(before: Sequence[float], after: Sequence[float], n: int) -> list[int]:
    """Indices of the `n` prompts whose scores rose the most."""
    order = sorted(range(len(before)), key=lambda p: (before[p] - after[p], p))
    return order[:n]

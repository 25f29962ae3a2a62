"""How far the judge of a recipe agrees with known preferences: agreement, Cohen's kappa, position consistency.

    python scripts/judge_agreement.py RECIPE PAIRS.jsonl [KEY=VALUE ...]

Rows of PAIRS.jsonl have `prompt`, `chosen` and `rejected`, texts or messages, and the columns that the judge asks for.
The judge is the recipe's first reward `judge`, of its evaluation or a stage; its answers are kept in its `cache`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rlpost.errors import DataError, RecipeError, RlpostError
from rlpost.evaluate.evaluator import percent
from rlpost.evaluate.judge_agreement import Agreement, KnownPair, judge_agreement
from rlpost.evaluate.statistics import Estimate
from rlpost.recipe.functions import functions_of
from rlpost.recipe.resolve import resolve
from rlpost.rewards.judge import Judge
from rlpost.rewards.params import REWARD
from rlpost.usercode.binding import bind


def judge_in(recipe: str, overrides: list[str]) -> Judge:
    resolved = resolve(recipe, overrides)
    for function, lookup, where in functions_of(resolved.config):
        if lookup is REWARD and function.fn == "judge":
            found = bind(function, lookup, where, resolved.folder).call
            assert isinstance(found, Judge)
            return found
    raise RecipeError(f"{resolved.file}: it has no reward `judge`")


def text_of(value: Any, where: str) -> str:
    """A text, or the content of the last message."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r:.40}, neither text nor messages")
    return value


def pairs_in(file: Path) -> list[KnownPair]:
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        row = json.loads(line)
        texts = [text_of(row.get(column), f"{file}:{number}: {column}") for column in ("chosen", "rejected")]
        found.append(KnownPair(row, *texts))
    return found


def lines(found: Agreement) -> list[str]:
    def plain(estimate: Estimate) -> str:
        return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

    shown = [
        f"pairs        {found.pairs}, {found.ties} of them ties; {found.failed} without a verdict",
        f"agreement    {percent(found.agreement)} %",
        f"kappa        {plain(found.kappa)}",
    ]
    if found.consistent is not None and found.first is not None:
        shown.append(f"consistent   {percent(found.consistent)} % of pairs have one verdict in both orders")
        shown.append(f"first wins   {percent(found.first)} %")
    return shown


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(words)
    try:
        print("\n".join(lines(judge_agreement(judge_in(given.recipe, given.overrides), pairs_in(given.pairs)))))
    except RlpostError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rewards for the form of a completion: its ending, length, format and repetition."""

from __future__ import annotations

import re

from rlpost.errors import RecipeError
from rlpost.types import Completion


def ends(completion: Completion) -> float | None:
    """1.0 for a completion that ended by itself, 0.0 for a truncated one, None for one that was not sampled."""
    return float(completion.finish == "stop") if completion.finish else None


def pattern(completion: Completion, *, regex: str, whole: bool = False) -> float:
    """1.0 when `regex` is found in the completion's text, or matches all of it (`whole`); 0.0 otherwise.

    A dot matches line breaks too. Python's `re` has no timeout: a pattern with nested repetition, such as `(a+)+b`, can
    take forever on some texts.

    Raises:
        RecipeError: `regex` is not a regular expression.
    """
    try:
        compiled = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise RecipeError(
            f"pattern: regex {regex!r} is not a regular expression ({error}); "
            "put a backslash before signs that stand for themselves"
        ) from error
    found = compiled.fullmatch(completion.text) if whole else compiled.search(completion.text)
    return float(found is not None)


def length(
    completion: Completion, *, target: int, width: int | None = None, over: float = 1.0, under: float = 0.0
) -> float:
    """Minus the cost of missing a length of `target` tokens, counted in tokens the policy chose.

    The cost grows linearly over `width` tokens (`target` by default) and then stays: up to `over` for a
    completion that is too long, up to `under` for one that is too short. With target 100 and width 50, 125
    tokens score -0.5 and 300 score -1. `target` = limit - cache and `width` = cache give the soft overlong
    punishment of DAPO (Yu et al. 2025, arXiv:2503.14476).

    Raises:
        RecipeError: `target` or `width` is not positive.
    """
    span = target if width is None else width
    if target <= 0 or span <= 0:
        raise RecipeError(f"length: target {target} and width {span} must be positive; give numbers of tokens")
    miss = completion.actions - target
    cost = over if miss > 0 else under
    return 0.0 - cost * min(1.0, abs(miss) / span)  # 0.0 -: never -0.0


def repetition(completion: Completion, *, n: int = 4) -> float:
    """Minus the share of n-grams that occurred before in the completion, over the tokens the policy chose.

    With n = 2, the tokens 7 8 7 8 have the 2-grams 78, 87, 78: one of three is a repeat, so -1/3. Fewer than
    n tokens score 0.

    Raises:
        RecipeError: `n` is less than 1.
    """
    if n < 1:
        raise RecipeError(f"repetition: n is {n}; give the length of the n-grams, at least 1")
    ids = completion.ids[completion.action].tolist()
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0

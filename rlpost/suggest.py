""" "Did you mean": the valid name nearest to the one that was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def edits(a: str, b: str) -> int:
    """Fewest insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`.

    Example: ``edits("gruop_size", "group_size") == 1``.
    """
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` is probably a typo of, or None."""
    short = word[:100]  # a longer word is no typo, and edits() is quadratic
    names = list(options)
    most = 1 + min(len(short) // 4, 2)
    # Skip words whose lengths differ by more: a recipe may have thousands of keys.
    ranked = ((edits(short.lower(), name.lower()), name) for name in names if abs(len(name) - len(short)) <= most)
    best = min(ranked, default=None)
    if best is not None and best[0] <= most:
        return best[1]
    return next(iter(difflib.get_close_matches(short, names, 1, 0.6)), None)


def hint(word: str, options: Iterable[str]) -> str:
    """` - did you mean 'x'?`, or nothing when no option is near."""
    near = closest(word, options)
    return f" - did you mean {near!r}?" if near else ""


def hint_or_list(word: str, options: Iterable[str], what: str) -> str:
    """` - did you mean 'x'?`, or the list of options."""
    names = list(options)
    return hint(word, names) or f" ({what}: {', '.join(names) or 'none'})"

""" "Did you mean": the valid names nearest to the one that was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST = 5
"""Words that are suggested at once."""


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


def nearest(word: str, options: Iterable[str]) -> list[str]:
    """The options that `word` may be a typo of, all equally near; at most `MOST` of them, and perhaps none.

    Example: ``nearest("gpo", ["cpo", "dpo", "ppo", "kto"]) == ["cpo", "dpo", "ppo"]``.
    """
    short = word[:100]  # a longer word is no typo, and edits() is quadratic
    names = list(dict.fromkeys(options))
    most = 1 + min(len(short) // 4, 2)
    # Skip words whose lengths differ by more: a recipe may have thousands of keys.
    close = [(edits(short.lower(), name.lower()), name) for name in names if abs(len(name) - len(short)) <= most]
    least = min((distance for distance, _ in close), default=most + 1)
    if least > most:
        return difflib.get_close_matches(short, names, 1, 0.6)
    return sorted(name for distance, name in close if distance == least)[:MOST]


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` is probably a typo of, or None."""
    return next(iter(nearest(word, options)), None)


def asked(names: Sequence[str]) -> str:
    """` - did you mean 'x' or 'y'?`, or nothing without names."""
    *others, last = map(repr, names or [""])
    return f" - did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if names else ""


def shortened(text: str, most: int = 80) -> str:
    """The text, or as much of its beginning as a message has room for."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def hint(word: str, options: Iterable[str]) -> str:
    """` - did you mean 'x'?`, or nothing when no option is near."""
    return asked(nearest(word, options))


def hint_or_list(word: str, options: Iterable[str], what: str) -> str:
    """` - did you mean 'x'?`, or the list of options."""
    names = list(options)
    return hint(word, names) or f" ({what}: {', '.join(names) or 'none'})"

"""Search over texts of one's own: BM25 on passages, which are paragraphs.

Robertson & Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond", eq. 3.15, with the idf of Lucene,
which is never negative. The same texts and the same query give the same passages; ties go to the earlier one.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlpost.errors import RecipeError
from rlpost.section import LocalPath
from rlpost.usercode.params import TASKS

K1, B = 1.2, 0.75
ENDINGS = (".txt", ".md")
"""Of the files that are read."""
_WORD = re.compile(r"\w+")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_NOTHING = "Nothing found."


def search(
    query: str, *, folder: LocalPath | None = None, documents: str | None = None, top: int = 3, separator: str = "\n\n"
) -> str:
    """Search a collection of texts for passages about something.

    Args:
        query: Words to look for.
        folder: Whose .txt and .md files are searched, with those of folders in it.
        documents: The function of a task that gives the texts instead, as rows with `text`: `task.function`.
        top: Passages returned, at most.
        separator: What stands between them.

    Raises:
        RecipeError: there is no text, or more than one source of it.
    """
    return _found(_index(folder, documents, "search", Path()), top, separator, query)


def ready(args: Mapping[str, Any], where: str, base: Path) -> Callable[[str], str]:
    """The search with its index, which is built once for the same texts; `where` the arguments stand, for errors.

    Raises:
        RecipeError: there is no text, or more than one source of it; or `top` is below 1.
    """
    top, separator = args.get("top", 3), args.get("separator", "\n\n")
    if top < 1:
        raise RecipeError(f"{where}.top: {top} - give at least 1")
    return partial(_found, _index(args.get("folder"), args.get("documents"), where, base), top, separator)


# Called when a recipe is bound (rlpost/usercode/binding.py).
vars(search)["ready"] = ready


class Index:
    """Passages, found by their words."""

    def __init__(self, passages: Iterable[str]) -> None:
        self.passages = tuple(passages)
        counts = [Counter(words(p)) for p in self.passages]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self._weights: dict[str, list[tuple[int, float]]] = defaultdict(list)
        """Of a word: the passages it stands in, and what it adds to their scores."""
        for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, times in count.items():
                weight = times * (K1 + 1) / (times + K1 * (1 - B + B * length / mean))
                self._weights[word].append((number, weight))

    def best(self, query: str, top: int) -> list[str]:
        """The `top` passages that fit a query best; those that share no word with it are none."""
        scores: dict[int, float] = defaultdict(float)
        total = len(self.passages)
        for word in dict.fromkeys(words(query)):
            found = self._weights.get(word, [])
            idf = math.log(1 + (total - len(found) + 0.5) / (len(found) + 0.5))
            for number, weight in found:
                scores[number] += idf * weight
        order = sorted(scores, key=lambda number: (-scores[number], number))
        return [self.passages[number] for number in order[:top]]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def _found(index: Index, top: int, separator: str, query: str) -> str:
    return separator.join(index.best(query, top)) or _NOTHING


def _index(folder: str | None, documents: str | None, where: str, base: Path) -> Index:
    if (folder is None) == (documents is None):
        raise RecipeError(f"{where}: give one of folder (of .txt and .md files) and documents (task.function)")
    texts = _in_folder(base / folder, where) if folder is not None else _of_task(str(documents), where)
    passages = [p for text in texts for part in _PARAGRAPHS.split(text) if (p := part.strip())]
    if not passages:
        raise RecipeError(f"{where}: there is no text in {folder or documents} - name another source of texts")
    key = hashlib.sha256("\0".join(passages).encode("utf-8", "surrogatepass")).hexdigest()
    if key not in _INDEXES:
        _INDEXES[key] = Index(passages)
    return _INDEXES[key]


_INDEXES: dict[str, Index] = {}
"""By what their passages say."""


def _in_folder(folder: Path, where: str) -> list[str]:
    if not folder.is_dir():
        raise RecipeError(f"{where}.folder: {folder} is no folder - give one of .txt and .md files")
    files = sorted(p for p in folder.rglob("*") if p.suffix in ENDINGS and p.is_file())
    try:
        return [file.read_text("utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where}.folder: a file cannot be read: {reason} - mend it, or take it out") from error


@cache
def _of_task(name: str, where: str) -> list[str]:
    task, _, function = name.partition(".")
    try:
        given = getattr(importlib.import_module(f"{TASKS}.{task}"), function)
        return [str(row["text"]) for row in given()]
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise RecipeError(
            f"{where}.documents: {name!r} gives no texts ({' '.join(str(error).split())[:120]}) - name the function of "
            "a task that returns rows with `text`"
        ) from error

"""Shell completion of recipes, checkpoints, keys and values; a broken recipe completes to nothing.

A shell adds a space after a single candidate. So an unfinished word (`stages.`, `methods/`, `seed=`) is never offered
alone, but together with what can follow it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlpost.errors import RlpostError
from rlpost.run.names import CHECKPOINTS, CONFIG, DONE, role

if TYPE_CHECKING:
    from rlpost.cli.keys import Keys

Candidates = list[tuple[str, str]]
"""(word, description) pairs."""
_BREAK = re.compile(r"[=:]+")
_PLAIN = re.compile(r"[\w./~+@%,-]+")
"""Names that need no quotes in a shell."""


def prepare(environment: MutableMapping[str, str]) -> None:
    """When a shell asks for candidates: rejoin the words that bash split at `=` and `:`."""
    asked = environment.get("_RLPOST_COMPLETE")
    if asked in ("complete_zsh", "complete_fish"):
        # Typer would format descriptions with rich, whose import takes as long as all the rest.
        sys.modules["rich"] = None  # type: ignore[assignment]
    if asked != "complete_bash":
        return
    words, at = environment.get("COMP_WORDS", "").split("\n"), environment.get("COMP_CWORD", "")
    if at.isdecimal() and int(at) < len(words):
        whole = rejoined(words[: int(at) + 1])
        environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(whole), str(len(whole) - 1)


def rejoined(words: list[str]) -> list[str]:
    """The words of a line up to the cursor, rejoined; the part that bash completes stays a word of its own.

    Example: ``["a", "=", "b", "c", ":", "d"]`` is ``["a=b", "c:", "d"]``.
    """
    whole: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if whole and (_BREAK.fullmatch(word) or _BREAK.fullmatch(before)):
            whole[-1] += word
        else:
            whole.append(word)
    current = "" if _BREAK.fullmatch(words[-1]) else words[-1]
    head = whole[-1].removesuffix(current)
    if not head:
        return whole
    option = head.startswith("-") and head.endswith("=")
    return [*whole[:-1], head.removesuffix("=") if option else head, current]


def _quiet(find: Callable[..., Candidates]) -> Callable[..., Candidates]:
    """Return no candidates for a broken recipe or an unreadable folder."""

    @wraps(find)
    def found(*args: Any, **kwargs: Any) -> Candidates:
        try:
            return find(*args, **kwargs)
        except (RlpostError, OSError):
            return []

    return found


@_quiet
def recipes(incomplete: str) -> Candidates:
    """Packaged recipes and .yaml files."""
    from rlpost.recipe.files import runnable

    names = {recipe.name: recipe.description for recipe in runnable() if recipe.name.startswith(incomplete)}
    tops = dict.fromkeys(name.partition("/")[0] + "/" * ("/" in name) for name in names)
    if "/" not in incomplete and len(tops) > 1:
        names = {top: names.get(top, "a folder of recipes") for top in tops}
    return [*names.items(), *_files(incomplete, (".yaml", ".yml"), folders=bool(incomplete))]


@_quiet
def settings(ctx: typer.Context, incomplete: str) -> Candidates:
    """`KEY=VALUE` completions for the recipe on the line, without what bash split off before them."""
    given = [*(ctx.params.get("overrides") or [])]
    first = ctx.params.get("checkpoint")
    if first and "=" in first:  # `rlpost eval KEY=VALUE`
        given.insert(0, first)
    head = given.pop() if given and given[-1][-1:] in ("=", ":") else ""
    keys, word = _keys(ctx.params, given), head + incomplete
    found = keys.candidates(word)
    key, equals, start = word.partition("=")
    if equals and keys.takes_path(key):
        found += [(f"{key}={name}", text) for name, text in _files(start, None, folders=True)]
    return [(word.removeprefix(head), text) for word, text in found]


@_quiet
def checkpoint_or_setting(ctx: typer.Context, incomplete: str) -> Candidates:
    """Completions of the first argument of `rlpost eval`."""
    return checkpoints(incomplete) or settings(ctx, incomplete)


def _keys(params: Mapping[str, Any], given: Sequence[str]) -> Keys:
    """The keys of the recipe named on the line, or of the checkpoint's run, with the groups chosen in `given`."""
    from rlpost.cli.keys import Keys, merged
    from rlpost.recipe.files import GROUPS, chain, choices, find

    file = find(params.get("recipe") or str(_run_of(params.get("checkpoint")) / CONFIG))
    groups = {group: choices(group, file.parent) for group in GROUPS}
    chosen = {key: name for key, _, name in (o.partition("=") for o in given) if name in groups.get(key, ())}
    parts = [(part.keys, part.group) for part in chain(file, chosen)]
    return Keys(_schema(), merged(parts), groups)


def _schema() -> dict[str, Any]:
    from rlpost.cli.copy import schema_file

    try:
        return dict(json.loads(schema_file().read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _run_of(checkpoint: str | None) -> Path:
    """The run folder of a checkpoint; by default the newest run with a finished stage."""
    if checkpoint and "=" not in checkpoint:
        folder = Path(checkpoint)
        return next((f for f in (folder, *folder.parents) if (f / CONFIG).is_file()), folder)
    done = {file.stat().st_mtime: file.parents[1] for file in Path("runs").glob(f"*/*/{DONE}")}
    return done[max(done)] if done else Path("runs")


@_quiet
def checkpoints(incomplete: str) -> Candidates:
    """Runs, their stages, and other folders."""
    if not incomplete and Path("runs").is_dir():
        incomplete = "runs/"
    return _files(incomplete, (), folders=True)


def _files(incomplete: str, endings: tuple[str, ...] | None, folders: bool) -> Candidates:
    """Files with these suffixes (None: any) and folders; of a single matching folder also its contents."""
    found: Candidates = []
    within = Path(incomplete.rpartition("/")[0] or ".").expanduser()
    of_run = role(within) in ("run", "stage")
    for name, path in _entries(incomplete):
        if path.is_dir() and folders:
            what = role(path)
            if of_run and not what and path.name != CHECKPOINTS:
                continue  # logs and the like
            found.append((name, what) if what else (f"{name}/", "folder"))
        elif (endings is None or path.suffix in endings) and path.is_file():
            found.append((name, "file"))
    if len(found) == 1 and Path(found[0][0]).expanduser().is_dir():
        name = found[0][0].rstrip("/")
        inside = _files(f"{name}/", endings, folders)
        return [*found, *inside] if found[0][0] == name else inside or found
    return found


def _entries(incomplete: str) -> Iterator[tuple[str, Path]]:
    folder, slash, start = incomplete.rpartition("/")
    base = Path(folder + slash or ".").expanduser()
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        hidden = path.name.startswith(".") and not start.startswith(".")
        if path.name.startswith(start) and not hidden and _PLAIN.fullmatch(path.name):
            yield f"{folder}{slash}{path.name}", path

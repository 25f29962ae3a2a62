"""Reads rows from a folder in hub format, or from the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rlpost.data.compressed import COMPRESSED, kind_of
from rlpost.data.files import AT_ONCE, Chunk
from rlpost.data.messages import without_nulls
from rlpost.errors import DataError
from rlpost.suggest import hint

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Of the files that are read here; all but parquet may be compressed."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_hub(name: str, config: str | None, split: str, where: str) -> Callable[[], Iterator[Chunk]]:
    """Reads the rows of one split of the folder or hub dataset `name`, which stay on disk; its code is never run.

    Raises:
        DataError: no such dataset, configuration or split, or no network.
    """
    folder = Path(name).is_dir()
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = (
            "check `config` and `split`, and that the folder holds files that the datasets library reads"
            if folder
            else "check the spelling and the network, or download it and give the folder"
        )
        raise DataError(f"{where}.path: cannot load {name} (split {split}): {reason}: {remedy}") from error

    def chunks() -> Iterator[Chunk]:
        for first in range(0, len(rows), AT_ONCE):
            some = rows.select(range(first, min(first + AT_ONCE, len(rows)))).to_list()
            found = [{k: without_nulls(v) for k, v in row.items()} for row in some]
            yield Chunk(found, list(range(first + 1, first + 1 + len(found))))

    return chunks


def refuse_missing_file(name: str, where: str, base: Path) -> None:
    """Refuse a path that does not exist: asking the hub for it would take half a minute to fail.

    Raises:
        DataError: the name looks like a path.
    """
    path = Path(name)
    local = kind_of(path) in SUFFIXES or path.suffix in COMPRESSED or not _HUB_NAME.fullmatch(name)
    in_folder = str(path.parent) != "." and (path.parent.exists() or (base / path.parent).exists())
    if not (local or in_folder):
        return
    if any((p / path.expanduser()).is_symlink() for p in (Path(), base)):
        raise DataError(f"{where}.path: {name} is a link to what does not exist")
    folder = path.expanduser().parent
    folder = folder if folder.exists() else base / path.parent
    siblings = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = hint(path.name, siblings) or f": looked in {Path.cwd()} and {base.resolve()}"
    raise DataError(f"{where}.path: {name} does not exist{near}")

"""What models and rows are, byte for byte, by the names they are used under: a stage goes on beside the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from rlpost.policy.adapter_files import base_of, is_adapter
from rlpost.run.contents import Contents, contents, difference


class Inputs:
    """Whatever a stage reads beside its own data: where it starts, references, judges, rows of earlier stages."""

    def __init__(self, revision: str | None = None, memo: dict[str, Contents] | None = None) -> None:
        """Nothing is read yet.

        Args:
            revision: of models named on the hub.
            memo: path -> what was found there before, shared by the stages of a run; it is added to.
        """
        self._revision = revision
        self._memo = {} if memo is None else memo
        self._paths: dict[str, Path] = {}
        self._found: dict[str, Contents] = {}

    def note(self, name: str, path: Path) -> Path:
        """Take note that the stage reads `path` as `name`; returns the path."""
        self._paths[name] = path
        return path

    def path(self, name: str) -> Path:
        """Where it was read."""
        return self._paths[name]

    def identities(self, known: Mapping[str, Contents] | None = None) -> dict[str, Contents]:
        """What each held when this was first asked, by name, which is to be when it has been loaded.

        Files in `known` that were not touched since are not read again.
        """
        for name, path in self._paths.items():
            if name not in self._found:
                before = (known or {}).get(name) or self._memo.get(str(path))
                self._found[name] = self._memo[str(path)] = identity(path, before, self._revision)
        return dict(self._found)


def identity(path: Path, known: Contents | None = None, revision: str | None = None) -> Contents:
    """The contents of a model's folder, and of the base that an adapter in it stands on.

    Of a model on the hub that has not been fetched yet nothing is known.

    Raises:
        DiskError: a file cannot be read.
    """
    folder = path if path.is_dir() else _fetched(str(path), revision)
    if folder is None:
        return {"path": str(path), "files": {}}
    found = contents(folder, known)
    if is_adapter(folder):
        found["base"] = identity(Path(base_of(folder)), (known or {}).get("base"), revision)
    return found


def first_difference(before: Mapping[str, Contents], now: Mapping[str, Contents]) -> tuple[str, str] | None:
    """(name, how it differs) of the first input that is another now; those that only one of them has are left out."""
    for name in before.keys() & now.keys():
        how = difference(before[name], now[name])
        if how is not None:
            return name, how
    return None


def _fetched(name: str, revision: str | None) -> Path | None:
    """The folder of a model of the hub in the local cache."""
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a name of the hub
        return None
    return Path(file).parent if isinstance(file, str) else None

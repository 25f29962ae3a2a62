"""The contents of the models and datasets that a stage reads, by name: on resume they must be the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from rlpost.policy.adapter_files import base_of, base_revision, is_adapter
from rlpost.run.contents import Contents, contents, difference


class Inputs:
    """What a stage reads besides its own data: its start, references, judges, rows of earlier stages."""

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
        """Record that the stage reads `path` as `name`; returns the path."""
        self._paths[name] = path
        return path

    def path(self, name: str) -> Path:
        """The path that was recorded as `name`."""
        return self._paths[name]

    def identities(self, known: Mapping[str, Contents] | None = None) -> dict[str, Contents]:
        """The contents of each by name, as of the first call, which should follow loading.

        Files in `known` that were not touched since are not read again.
        """
        for name, path in self._paths.items():
            if name not in self._found:
                before = (known or {}).get(name) or self._memo.get(str(path))
                self._found[name] = self._memo[str(path)] = identity(path, before, self._revision)
        return dict(self._found)


def identity(path: Path, known: Contents | None = None, revision: str | None = None) -> Contents:
    """The contents of a model's folder, and of the base that an adapter in it stands on.

    A model on the hub that has not been downloaded yet has no files here.

    Raises:
        DiskError: a file cannot be read.
    """
    folder = path if path.is_dir() else _fetched(str(path), revision)
    if folder is None:
        return {"path": str(path), "files": {}}
    found = contents(folder, known)
    if is_adapter(folder):
        own = revision or base_revision(folder)
        found["base"] = identity(Path(base_of(folder)), (known or {}).get("base"), own)
    return found


def first_difference(before: Mapping[str, Contents], now: Mapping[str, Contents]) -> tuple[str, str] | None:
    """(name, difference) of the first input that has changed; inputs that only one side has are ignored."""
    for name in before.keys() & now.keys():
        found = difference(before[name], now[name])
        if found is not None:
            return name, found
    return None


def _fetched(name: str, revision: str | None) -> Path | None:
    """The folder of a model of the hub in the local cache."""
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a name of the hub
        return None
    return Path(file).parent if isinstance(file, str) else None

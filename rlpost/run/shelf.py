"""The cache of encoded rows in a run directory: RUN/data.cache/KEY/.

Its folders can be made again at any time, so they may be deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlpost import console
from rlpost.ranks import first_alone
from rlpost.run import names
from rlpost.run.files import clear_leftovers, disk_errors, remove_folder, write_folder_atomically
from rlpost.run.manifest import read_manifest, verify
from rlpost.run.record import run_id


class Shelf:
    """The cache of one run; a folder's key is a digest of all that its content depends on."""

    def __init__(self, run: Path) -> None:
        """Raises DiskError where the run cannot be read."""
        self._folder = run / names.CACHE
        self._run = run_id(run)
        self._whole: set[Path] = set()
        clear_leftovers(self._folder)

    @first_alone
    def folder(self, key: str, whose: str, fill: Callable[[Path], None]) -> Path:
        """The folder of `key`, verified; where it is missing, damaged or of another run, `fill` writes it.

        `whose` is the key path of the source; its folders under earlier keys are removed.

        Raises:
            DiskError: it cannot be read or written.
        """
        path = self._folder / key
        if path in self._whole and path.is_dir():
            return path
        about = {"run": self._run, "whose": whose}
        wrong = verify(path, about) if path.exists() else "missing"
        if wrong is not None:
            if path.exists():
                console.warn(f"{path}: {wrong}; its rows are encoded again")
                remove_folder(path)
            write_folder_atomically(path, fill, about)
            self._tidy(path, whose)
        self._whole.add(path)
        return path

    def _tidy(self, new: Path, whose: str) -> None:
        with disk_errors(self._folder):
            others = [p for p in self._folder.iterdir() if p.is_dir() and p not in self._whole | {new}]
        for other in others:
            try:
                manifest = read_manifest(other)
            except OSError:
                continue
            if manifest is not None and manifest["about"].get("whose") == whose:
                remove_folder(other)

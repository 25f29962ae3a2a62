"""run.json: the record of a run, with a checksum of itself. The files next to it are copies for people.

`run` is a random id that every folder of the run repeats, so that a folder of another run is recognised.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rlpost import console
from rlpost.errors import DiskError
from rlpost.run import names
from rlpost.run.files import disk_errors, write_atomic
from rlpost.run.sealed import seal, unseal

Json = Any
FORMAT = 3
"""Raised when the content of checkpoints or records changes; runs of another format cannot be resumed."""


@dataclass(frozen=True)
class Record:
    """What run.json holds."""

    recipe: str
    """The text of config.resolved.yaml: the current recipe."""
    environment: dict[str, Json]
    given: dict[str, str] = field(default_factory=dict)
    """sha256 of recipe.yaml and overrides.txt."""
    decisions: dict[str, Json] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    """Stage -> its kind of result, for stages whose result is not a policy: rows, a reward model."""
    base: dict[str, Json] | None = None
    """The contents of the model that the first stage starts from; None until they are known."""
    changes: list[dict[str, Json]] = field(default_factory=list)
    """Changes that were allowed, in order: at which stage and step, and each key's old and new value."""
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    format: int = FORMAT
    """Of the run's files."""

    @property
    def config(self) -> dict[str, Json]:
        """The resolved recipe."""
        return deepcopy(_parsed(self.recipe))


@lru_cache(maxsize=4)
def _parsed(recipe: str) -> dict[str, Json]:
    config: dict[str, Json] = yaml.safe_load(recipe)
    return config


def read_record(run: Path) -> Record | None:
    """The record of a run; None when it has none.

    Raises:
        DiskError: it is not as it was written, or of another format.
    """
    path = run / names.RECORD
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else None
    if data is None:
        return None
    value = unseal(data)
    if value is not None and value.get("format", 1) != FORMAT:
        raise DiskError(
            f"{path}: format {value.get('format', 1)}, this version of rlpost goes on with format {FORMAT}; "
            "use the version that wrote it, or choose another run=NAME"
        )
    if value is None or value.keys() | {"leaves"} != {f.name for f in fields(Record)}:
        raise DiskError(
            f"{path}: damaged, so nothing here can be proven to be this run's; restore it or choose another run=NAME"
        )
    return Record(**value)


def run_id(run: Path) -> str | None:
    """The id of a run; None for a folder that is not a run. Raises DiskError as `read_record` does."""
    record = read_record(run)
    return record.run if record else None


def write_record(run: Path, record: Record) -> None:
    """Write run.json, whole or not at all; raises DiskError."""
    write_atomic(run / names.RECORD, seal(asdict(record)))


def write_copies(run: Path, record: Record) -> None:
    """Write the copies for people; raises DiskError."""
    for name, data in _copies(record).items():
        write_atomic(run / name, data)


def repair_copies(run: Path, record: Record, besides: Path | None) -> None:
    """Rewrite copies that differ from run.json, with a warning; all but `besides`, which the user has just given.

    Raises:
        DiskError: it could not be written.
    """
    for name, data in _copies(record).items():
        path = run / name
        with disk_errors(path):
            found = path.read_bytes() if path.is_file() else b""
        if found != data and (besides is None or path.resolve() != besides.resolve()):
            console.warn(f"{path}: not as it was written; rewritten from {names.RECORD}")
            write_atomic(path, data)


def changed_given(run: Path, record: Record) -> list[str]:
    """Which of recipe.yaml and overrides.txt have changed since they were written."""
    with disk_errors(run):
        return [
            name
            for name, digest in record.given.items()
            if not (run / name).is_file() or hashlib.sha256((run / name).read_bytes()).hexdigest() != digest
        ]


def digests(given: Mapping[str, str]) -> dict[str, str]:
    """sha256 of texts by name."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in given.items()}


def _copies(record: Record) -> dict[str, bytes]:
    files = {names.ENVIRONMENT: _pretty(record.environment), names.CONFIG: record.recipe.encode()}
    return {**files, names.DECISIONS: _pretty(record.decisions)} if record.decisions else files


def _pretty(value: Json) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

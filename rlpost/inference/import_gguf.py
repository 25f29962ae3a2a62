"""Writes a GGUF file as one ordinary model folder: `rlpost import-gguf`."""

from __future__ import annotations

from pathlib import Path

from rlpost.inference.merge import must_be_new
from rlpost.policy.gguf_files import must_be_gguf, write_as_folder
from rlpost.run.files import discard, disk_errors
from rlpost.run.names import unfinished


def import_gguf(file: str, out: str) -> str:
    """Write a GGUF file's weights in float32, its tokenizer and chat template as a model folder; returns `out`.

    The end token is the one with which the chat template ends an assistant's turn: a GGUF file may name another.

    Args:
        file: the GGUF file.
        out: a folder that does not exist yet.

    Raises:
        DiskError: `out` exists, `file` cannot be read, or `out` cannot be written.
        ModelError: it is no GGUF file, transformers cannot read its architecture, its template shows no end token, or
            the package gguf is missing.
    """
    source, target = Path(file), must_be_new(out)
    must_be_gguf(source)
    temporary = unfinished(target)
    with disk_errors(target):
        try:
            discard(temporary)
            temporary.mkdir(parents=True)
            write_as_folder(source, temporary)
            temporary.rename(target)
        finally:
            discard(temporary)
    return out

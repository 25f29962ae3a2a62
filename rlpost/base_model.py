"""The model that a run begins with: by path, from scratch, or from a GGUF file; recorded, and proven on resuming."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.data.dataset import texts
from rlpost.data.params import TokenizerKind
from rlpost.data.tokenizers import make_tokenizer
from rlpost.errors import ModelError
from rlpost.policy.gguf_files import gguf_file, must_be_gguf, write_as_folder
from rlpost.policy.identity import identity
from rlpost.policy.scratch import make_model
from rlpost.ranks import first_alone
from rlpost.recipe.resolve import Resolved
from rlpost.run.contents import Contents, difference
from rlpost.run.files import write_folder_atomically
from rlpost.run.layout import RunDirectory
from rlpost.run.lookup import find_checkpoint
from rlpost.run.manifest import measure, verify
from rlpost.usercode.binding import bind


@first_alone
def base_checkpoint(resolved: Resolved, run: RunDirectory) -> Path:
    """The model that the first stage starts from: by path, or made once and kept in the run directory.

    Raises:
        ModelError: it cannot be made.
    """
    model = resolved.config.model
    gguf = gguf_file(model.path)
    if model.path is not None and gguf is None:
        return find_checkpoint(model.path) or Path(model.path)
    folder = run.base.resolve()
    made_from: dict[str, Any] = {"config": model.config}
    made_from["tokenizer"] = model.tokenizer.model_dump() if model.tokenizer else None
    seed: int | None = resolved.config.seed
    if gguf is not None:
        must_be_gguf(gguf)
        made_from, seed = {"gguf": measure(gguf)["sha256"]}, None
    digest = hashlib.sha256(json.dumps([made_from, seed], default=str).encode()).hexdigest()
    about = {"run": run.record.run, "stage": "base", "made_from": digest}
    wrong = verify(folder, about) if folder.exists() else None
    if folder.is_dir() and wrong is None:
        return folder
    if wrong is not None:
        console.warn(f"{folder}: {wrong}; it is made again")
    if gguf is not None:
        write_folder_atomically(folder, lambda into: write_as_folder(gguf, into), about)
        return folder
    tokenizer = scratch_tokenizer(resolved)
    write_folder_atomically(folder, lambda into: make_model(model.config, tokenizer, resolved.config.seed, into), about)
    return folder


def prove_base(run: RunDirectory, base: Path, revision: str | None) -> dict[str, Contents]:
    """Compare the base model with the one the run began with, or record it; returns {path: contents}.

    Raises:
        ModelError: it has changed, and something was trained from it.
    """
    before = run.record.base or {}
    now = identity(base, before, revision)
    changed = difference(before, now)
    if changed is not None and run.trained:
        raise ModelError(
            f"model.path: {base} is not the model that this run began with: {changed}; "
            "restore it or choose another run=NAME"
        )
    if now["files"] and now != before:
        run.record_base(now)
    return {str(base): now}


def scratch_tokenizer(resolved: Resolved) -> Any:
    """The tokenizer that the recipe makes.

    Raises:
        DataError: its text cannot be read.
    """
    spec = resolved.config.model.tokenizer
    assert spec is not None, "validated with the recipe"
    corpus: list[str] = []
    if spec.kind is TokenizerKind.bpe:
        console.say(f"training a tokenizer of {spec.vocab_size} tokens")
        corpus = texts(spec.data, where="model.tokenizer.data", stages=_no_stage, bind=bind, base=resolved.folder)
    return make_tokenizer(spec, corpus)


def _no_stage(name: str) -> Path:
    raise AssertionError(f"{name} was read before any stage ran")

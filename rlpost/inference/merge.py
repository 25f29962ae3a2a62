"""Writes a checkpoint as one ordinary model folder, adapters merged into the weights: `rlpost merge`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlpost import console
from rlpost.errors import DiskError, ModelError
from rlpost.inference.card import REFERENCE, About, Written, card
from rlpost.inference.checkpoint import frozen_policy, located
from rlpost.policy.adapter_files import is_adapter
from rlpost.policy.adapters import acting
from rlpost.policy.check import probe_groups
from rlpost.policy.load import MERGED_GAP, proven_merge
from rlpost.policy.model_files import stored_dtype
from rlpost.policy.params import Model, Precision
from rlpost.policy.policy import Policy
from rlpost.policy.saved import save_policy
from rlpost.policy.score import logprobs
from rlpost.run.files import discard, disk_errors
from rlpost.run.interrupt import signals_raise
from rlpost.run.names import unfinished

LOST = 0.25
"""Share of an adapter's change of log-probabilities that rounding to the base's precision may undo."""
CARD = "README.md"
_OUTTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Proof:
    """Log-probabilities of the written model against those of the checkpoint, on random tokens, in nats."""

    gap: float
    """Their largest difference."""
    mean_gap: float
    mean_change: float
    """Mean difference between the checkpoint and its base; 0 for a checkpoint without adapter."""

    @property
    def lost(self) -> bool:
        """Whether the written model is another than the checkpoint."""
        return not self.mean_gap <= MERGED_GAP + LOST * self.mean_change


def merge_checkpoint(checkpoint: str, out: str, dtype: str | None = None, *, gguf: bool = False) -> str:
    """Write a checkpoint as a model folder with tokenizer and model card; returns `out`.

    An adapter is merged into its base. The folder is read back, and its log-probabilities are compared with the
    checkpoint's, before it gets its name.

    Args:
        checkpoint: a run, a stage, a checkpoint, or a model's folder.
        out: a folder that does not exist yet.
        dtype: of the written weights, such as "bfloat16"; by default that of the base, or of a checkpoint without one.
        gguf: return llama.cpp's command that converts the folder instead.

    Raises:
        DiskError: `out` exists, or cannot be written.
        ModelError: the checkpoint is no policy or not here, or the written model is not the checkpoint.
        Interrupted: SIGTERM or SIGHUP.
    """
    target = must_be_new(out)
    folder = must_be_here(checkpoint)
    temporary = unfinished(target)
    with disk_errors(target), signals_raise():
        try:
            discard(temporary)
            temporary.mkdir(parents=True)
            written = write_merged(folder, temporary, getattr(torch, dtype) if dtype else None)
            temporary.rename(target)
        finally:
            discard(temporary)
    return gguf_command(out, written) if gguf else out


def must_be_new(out: str) -> Path:
    """The path of a folder to write.

    Raises:
        DiskError: it exists.
    """
    if not out.strip():
        raise DiskError("OUT: an empty name; name a new folder")
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise DiskError(f"{out}: it exists already; name a new folder, or remove it first")
    return target


def must_be_here(checkpoint: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        ModelError: it is a name on the hub.
    """
    folder = Path(located(checkpoint))
    if not folder.is_dir():
        raise ModelError(
            f"{checkpoint}: not a folder here; a model on the hub comes with "
            f"`hf download {shlex.quote(checkpoint)} --local-dir DIR`: name DIR then"
        )
    return folder


def write_merged(folder: Path, out: Path, dtype: torch.dtype | None = None, name: str = REFERENCE) -> torch.dtype:
    """Write the checkpoint in `folder` as a model into the empty folder `out`, and prove it; returns its precision.

    `name` is what its card calls it.

    Raises:
        ModelError: it is no policy, or the written model is not the checkpoint.
    """
    policy = frozen_policy(str(folder), Model(precision=Precision.float32))
    dtype = dtype or stored_dtype(policy.base, policy.revision)
    groups = probe_groups(policy.vocabulary, policy.max_positions)
    before = logprobs(policy, groups)
    change = torch.zeros_like(before)
    if policy.has_adapter:
        with acting(policy.model, None):
            change = logprobs(policy, groups) - before
        policy = policy.around(proven_merge(policy, policy.model, folder), bfloat16=False)
    policy.model.to(dtype)
    save_policy(policy, out)
    del policy
    written = frozen_policy(str(out), Model(precision=Precision.float32))
    proof = _compare(logprobs(written, groups), before, change)
    precision = str(dtype).removeprefix("torch.")
    if proof.lost:
        raise ModelError(
            f"{folder}: in {precision} its log-probabilities are off by {proof.mean_gap:.2g} nats in the mean, where "
            f"the adapter changes them by {proof.mean_change:.2g}; `rlpost merge --dtype float32` keeps it"
        )
    adapter = f", which the adapter changes by {proof.mean_change:.2g}" if is_adapter(folder) else ""
    console.say(
        f"log-probabilities, read back in {precision}: as the checkpoint's to {proof.mean_gap:.2g} nats in the mean "
        f"and {proof.gap:.2g} at most{adapter}"
    )
    (out / CARD).write_text(card(folder, about(written, Written.merged, precision), name), "utf-8")
    return dtype


def about(policy: Policy, written: Written, dtype: str) -> About:
    """What the model card says of exported weights."""
    ends = [str(policy.tokenizer.convert_ids_to_tokens(i)) for i in policy.end_ids]
    family = str(policy.causal_lm.config.model_type)
    return About(written, family, ends, dtype, bool(policy.tokenizer.chat_template))


def gguf_command(out: str, dtype: torch.dtype) -> str:
    """The command of llama.cpp that converts a merged folder, to be run beside its sources."""
    folder = shlex.quote(out)
    file = shlex.quote(f"{out.rstrip('/')}.gguf")
    return f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {file} --outtype {_OUTTYPES[dtype]}"


def _compare(after: Tensor, before: Tensor, change: Tensor) -> Proof:
    gap = (after - before).abs()
    return Proof(float(gap.max()), float(gap.mean()), float(change.abs().mean()))

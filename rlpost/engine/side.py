"""The local engine in a process of its own, which samples while the policy trains (docs/adr/0024)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlpost import errors
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.shared import SharedWeights, changing, described
from rlpost.errors import EngineError, RlpostError
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Request
from rlpost.usercode import wire
from rlpost.usercode.calls import TheirTraceback

_SCRIPT = Path(__file__).with_name("side_worker.py")


@dataclass(frozen=True)
class Origin:
    """What a policy was loaded from: what `load_policy` was given."""

    start: Path
    model: Model
    bfloat16: bool
    device: torch.device


class LocalSideEngine:
    """Samples from copies of the policy's weights in a process of its own.

    Its completions are those of the local engine, bit for bit where both have as many threads. The process loads the
    policy while the trainer goes on; what it fails with is raised by the first call.
    """

    def __init__(self, policy: Policy, origin: Origin, chosen: EngineChoice, threads: int) -> None:
        """Start the process, with so many CPU threads; `policy` is as it was loaded from `origin`, or trained since."""
        self._slots = chosen.staleness + 1
        weights = described(policy)
        self._shared = SharedWeights(weights, self._slots)
        self._policy = policy
        self._up = self._closed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lasts as long as this
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            pass_fds=(self._shared.descriptor,),
            process_group=0,  # a terminal's Ctrl-C goes to our process group
        )
        self._send(
            {
                "start": str(origin.start),
                "model": origin.model.model_dump(mode="json"),
                "bfloat16": origin.bfloat16,
                "device": str(origin.device),
                "threads": threads,
                "weights": [[t.name, t.shape, t.dtype] for t in weights],
                "descriptor": self._shared.descriptor,
                "slots": self._slots,
                "cache_gib": chosen.cache_gib,
                "fused": chosen.fused,
            }
        )

    def stage(self, policy: Policy, version: int) -> Callable[[], None]:
        """Copy the weights into shared memory; see `SideEngine.stage`.

        There is room for the versions that a recipe's `staleness` needs: version v + staleness + 1 takes the place of
        version v.
        """
        slot = version % self._slots
        self._shared.write(slot, changing(policy))
        return partial(self._switch, slot, version)

    def update_weights(self, policy: Policy, version: int) -> None:
        """See `Engine.update_weights`."""
        self.stage(policy, version)()

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """The completions of each request; see `Engine.generate`."""
        if not requests:
            return []
        reply = self._ask({"requests": [packed_request(r) for r in requests]})
        return unpacked_completions(reply["completions"])

    def close(self) -> None:
        """End the process, whatever it does; a call in another thread fails."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._shared.close()

    def _switch(self, slot: int, version: int) -> None:
        self._ask({"slot": slot, "version": version})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            RlpostError: what it raised there, or an EngineError if the process has ended.
        """
        if not self._up:
            self._read()
            self._up = True
        self._send(request)
        return self._read()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_read` will notice
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                f"the process that samples beside training {self._ended()}; run the same command to go on"
            )
        reply: dict[str, Any] = json.loads(line)
        if "failed" not in reply:
            return reply
        cause = TheirTraceback(reply["trace"])
        kind = getattr(errors, reply["failed"], None)
        if kind is not None and issubclass(kind, RlpostError):
            raise kind(reply["text"]) from cause
        raise RuntimeError(f"in the process that samples beside training: {reply['text']}") from cause

    def _ended(self) -> str:
        """How, and the last line that it left."""
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        memory = ", as out of memory does" if code == -9 else ""
        return f"ended (exit code {code}{memory})" + (f": {said[-1][:200]}" if said else "")


def packed_request(r: Request) -> dict[str, Any]:
    """A request as JSON."""
    return {**vars(r), "prompt": r.prompt.tolist(), "sampling": r.sampling.model_dump()}


def unpacked_request(packed: Mapping[str, Any]) -> Request:
    """The request that was packed."""
    # A temperature of 0, which means the likeliest token, is none that a recipe may give.
    return Request(**{**packed, "sampling": Sampling.model_construct(**packed["sampling"])})


def packed_completions(every: Sequence[Sequence[Completion]]) -> list[list[Any]]:
    """The completions of requests as JSON."""
    return [[wire.encode(c) for c in some] for some in every]


def unpacked_completions(packed: Sequence[Sequence[Any]]) -> list[tuple[Completion, ...]]:
    """The completions that were packed."""
    return [tuple(wire.decode(c) for c in some) for some in packed]

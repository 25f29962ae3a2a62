"""The process of the local engine that samples beside training: a script on a pipe, with a copy of the policy.

It speaks lines of JSON. The first one says what to load; it replies `up`. Then it is told to take the weights in a slot
of shared memory, or to generate, and answers each with a line. It ends when its input does, or with the trainer.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from rlpost.engine.door import engine_for
from rlpost.engine.params import EngineChoice
from rlpost.engine.shared import Described, SharedWeights, changing, described
from rlpost.engine.side import packed_completions, unpacked_request
from rlpost.errors import EngineError, OutOfMemoryError, RlpostError
from rlpost.policy.load import load_policy
from rlpost.policy.memory import keep_freed_memory
from rlpost.policy.params import Model

_PDEATHSIG = 1


def main() -> None:
    """Answer requests until there are no more."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not be read as a reply
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            sys.exit()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides
    sampler: Sampler | None = None
    found: dict[str, Any]
    while line := requests.readline():
        try:
            if sampler is None:
                sampler, found = Sampler(json.loads(line)), {"up": True}
            else:
                found = sampler(json.loads(line))
        except Exception as error:  # whatever it is, the trainer is told
            found = failed(error)
        _say(replies, found)
        if sampler is None:
            return


class Sampler:
    """A copy of the policy and the local engine that samples from it."""

    def __init__(self, hello: dict[str, Any]) -> None:
        torch.set_num_threads(hello["threads"])
        keep_freed_memory()
        settings = Model.model_validate_json(json.dumps(hello["model"]))
        self._policy = load_policy(hello["start"], settings, bfloat16=hello["bfloat16"], device=hello["device"])
        expected = [Described(name, tuple(shape), dtype) for name, shape, dtype in hello["weights"]]
        if described(self._policy) != expected:
            raise EngineError(f"{hello['start']}: loaded once more, the model has other weights than before")
        self._shared = SharedWeights(expected, hello["slots"], hello["descriptor"])
        self._engine = engine_for(self._policy, EngineChoice(cache_gib=hello["cache_gib"], fused=hello["fused"]))

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        if "slot" in request:
            self._shared.read(request["slot"], changing(self._policy))
            self._engine.update_weights(self._policy, request["version"])
            return {"version": request["version"]}
        every = self._engine.generate([unpacked_request(packed) for packed in request["requests"]])
        return {"completions": packed_completions(every)}


def failed(error: Exception) -> dict[str, str]:
    """An error as a reply."""
    if not isinstance(error, RlpostError):
        of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        name = OutOfMemoryError.__name__ if of_memory else ""
        return {"failed": name, "text": f"{type(error).__name__}: {error}", "trace": _trace(error)}
    return {"failed": type(error).__name__, "text": str(error), "trace": _trace(error)}


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _say(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()

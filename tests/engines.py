"""The local engine with weights, and requests as lists of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy as greedily
from rlpost.policy.policy import Policy
from rlpost.types import Request, Tokens


def local(policy: Policy, **more: Any) -> LocalEngine:
    engine = LocalEngine(policy, **more)
    engine.update_weights(policy, 0)
    return engine


def asked(
    prompts: Sequence[Tokens], n: int, sampling: Sampling, seeds: Sequence[int], greedy: bool = False
) -> list[Request]:
    how = greedily(sampling) if greedy else sampling
    return [Request(p, n, how, seed) for p, seed in zip(prompts, seeds, strict=True)]

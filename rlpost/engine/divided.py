"""An engine on every rank: each samples a share of the requests, and all get every completion."""

from __future__ import annotations

from collections.abc import Sequence

from rlpost import ranks
from rlpost.engine.api import Engine
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Request


class DividedEngine:
    """The engines of all ranks as one; a completion depends on its request alone, so it is the same on any of them."""

    def __init__(self, own: Engine) -> None:
        """`own` is this rank's."""
        self._own = own

    def update_weights(self, policy: Policy, version: int) -> None:
        """See `Engine.update_weights`."""
        self._own.update_weights(policy, version)

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`."""
        costs = [len(r.prompt) + r.n * r.limit for r in requests]
        return ranks.divided(requests, costs, self._own.generate)

    def close(self) -> None:
        """See `Engine.close`."""
        self._own.close()

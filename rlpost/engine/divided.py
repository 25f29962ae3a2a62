"""An engine on every rank: each samples a share of the requests, and all get every completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlpost import ranks
from rlpost.engine.api import Engine, FreeEngine, ScoringEngine, SideEngine, TopTokens
from rlpost.engine.top_tokens import by_group, joined
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Request


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


class DividedFreeEngine(DividedEngine):
    """Of engines that take requests one by one: whoever asks so has divided the work among ranks."""

    def __init__(self, own: FreeEngine) -> None:
        """`own` is this rank's."""
        super().__init__(own)
        self._free = own

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        """See `FreeEngine.complete`: by this rank's engine."""
        return await self._free.complete(request)


def divided_engine(own: Engine) -> DividedEngine:
    """The engines of all ranks as one; it takes requests one by one if `own`, this rank's, does."""
    return DividedFreeEngine(own) if isinstance(own, FreeEngine) else DividedEngine(own)


class DividedSideEngine(DividedEngine):
    """The same of engines that sample beside training."""

    def __init__(self, own: SideEngine) -> None:
        """`own` is this rank's."""
        super().__init__(own)
        self._side = own

    def stage(self, policy: Policy, version: int) -> Callable[[], None]:
        """See `SideEngine.stage`."""
        return self._side.stage(policy, version)


class DividedScoringEngine:
    """The scoring engines of all ranks as one."""

    def __init__(self, own: ScoringEngine) -> None:
        """`own` is this rank's."""
        self._own = own

    def score(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> TopTokens:
        """See `ScoringEngine.score`."""
        costs = [sum(len(g.prompt) + len(c.ids) for c in g.completions) for g in groups]
        return joined(ranks.divided(groups, costs, lambda some: self._share(some, k, temperature)), k)

    def close(self) -> None:
        """See `ScoringEngine.close`."""
        self._own.close()

    def _share(self, groups: Sequence[Group], k: int, temperature: float) -> list[TopTokens]:
        return by_group(self._own.score(groups, k, temperature), groups) if groups else []

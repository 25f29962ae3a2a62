"""The one place that makes engines: the recipe's choice becomes something that samples."""

from __future__ import annotations

from rlpost.engine.api import Engine, Guide
from rlpost.engine.foreign import ForeignEngine
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import DEADLINE, LOCAL, EngineChoice
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.usercode.bound import Bound


def engine_for(
    policy: Policy, chosen: EngineChoice | None = None, function: Bound | None = None, guide: Guide | None = None
) -> Engine:
    """What samples from `policy`; its weights have no version yet, so `update_weights` comes before the first request.

    Args:
        policy: what is sampled from.
        chosen: as the recipe says; by default the local engine.
        function: (policy) -> an engine: what `chosen` names, where that is a function of the user's.
        guide: leads completions somewhere; only the local engine can be led.

    Raises:
        EngineError: the user's function fails, returns no engine, or is to be led.
    """
    chosen = chosen or EngineChoice()
    if chosen.engine == LOCAL:
        return LocalEngine(policy, guide=guide, cache_gib=chosen.cache_gib)
    assert function is not None, "a user's engine comes with its function"
    if guide is not None:
        raise EngineError(
            f"{function.where}: a guide weighs every token, which {function.name} does not show; use the {LOCAL} engine"
        )
    return ForeignEngine(function, policy, chosen.deadline or DEADLINE)


def frozen_engine(policy: Policy, guide: Guide | None = None) -> Engine:
    """The local engine for a policy whose weights do not change: ready to sample with version 0 of them."""
    engine = engine_for(policy, guide=guide)
    engine.update_weights(policy, 0)
    return engine

"""Makes the engine that a recipe chooses; nothing else constructs engines."""

from __future__ import annotations

from rlpost import ranks
from rlpost.engine.api import Engine, Guide, ScoringEngine, SideEngine
from rlpost.engine.divided import DividedScoringEngine, DividedSideEngine, divided_engine
from rlpost.engine.foreign import ForeignEngine, ForeignScoringEngine
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import DEADLINE, LOCAL, SERVER, VLLM, EngineChoice, ScoringChoice
from rlpost.engine.side import LocalSideEngine, Origin
from rlpost.engine.vllm_here import VllmEngine
from rlpost.engine.vllm_server import VllmServer
from rlpost.engine.vllm_teacher import VllmTeacher
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.usercode.bound import Bound


def engine_for(
    policy: Policy,
    chosen: EngineChoice | None = None,
    function: Bound | None = None,
    guide: Guide | None = None,
    where: str = "rollouts",
) -> Engine:
    """An engine for `policy`; call `update_weights` before the first request.

    Args:
        policy: to sample from.
        chosen: the recipe's choice; by default the local engine.
        function: (policy) -> an engine: the user's function that `chosen` names, if it does.
        guide: steers completions; only the local engine can be guided.
        where: the key path of `chosen`.

    Raises:
        EngineError: the engine cannot be made, or is to be guided and cannot be.
        ModelError: vLLM is not installed, or cannot be given what the policy is.
    """
    own = _engine_for(policy, chosen or EngineChoice(), function, guide, where)
    return own if ranks.count() == 1 else divided_engine(own)


def side_engine_for(policy: Policy, chosen: EngineChoice, origin: Origin, threads: int, where: str) -> SideEngine:
    """The engine that samples beside training, as `staleness` asks for.

    Args:
        policy: to sample from.
        chosen: the recipe's choice.
        origin: what the policy was loaded from.
        threads: CPU threads of a process that samples on this machine.
        where: the key path of `chosen`.

    Raises:
        EngineError: it cannot be started.
    """
    if chosen.engine == LOCAL:
        own: Engine = LocalSideEngine(policy, origin, chosen, threads)
    else:
        own = _engine_for(policy, chosen, None, None, where)
    assert isinstance(own, SideEngine), "validated: staleness is for engines that have it"
    return own if ranks.count() == 1 else DividedSideEngine(own)


def scoring_engine(
    policy: Policy, chosen: ScoringChoice, k: int, function: Bound | None = None, where: str = "teacher"
) -> ScoringEngine:
    """An engine that scores what `policy` writes, with a model of its own; it is given no weights.

    Args:
        policy: whose tokens it must know, which is proved now.
        chosen: the recipe's choice.
        k: likeliest tokens that will be asked for.
        function: (policy) -> an engine: the user's function that `chosen` names, if it does.
        where: the key path of `chosen`.

    Raises:
        EngineError: it cannot be made or reached, has another vocabulary, or does not give so many tokens.
    """
    if chosen.engine == SERVER:
        own: ScoringEngine = VllmTeacher(chosen, policy, k, where)
    else:
        assert function is not None, "a user's engine comes with its function"
        own = ForeignScoringEngine(function, policy, chosen.deadline)
    return own if ranks.count() == 1 else DividedScoringEngine(own)


def _engine_for(
    policy: Policy, chosen: EngineChoice, function: Bound | None, guide: Guide | None, where: str
) -> Engine:
    """This rank's."""
    if chosen.engine == LOCAL:
        return LocalEngine(policy, guide=guide, cache_gib=chosen.cache_gib, fused=chosen.fused)
    if guide is not None:
        name, place = (chosen.engine, where) if function is None else (function.name, function.where)
        raise EngineError(
            f"{place}: a guide needs every token's logits, which {name} does not give; use the {LOCAL} engine"
        )
    if chosen.engine == VLLM:
        return VllmEngine(policy, chosen, where)
    if chosen.engine == SERVER:
        return VllmServer(policy, chosen, where)
    assert function is not None, "a user's engine comes with its function"
    return ForeignEngine(function, policy, chosen.deadline or DEADLINE)


def frozen_engine(policy: Policy, guide: Guide | None = None) -> Engine:
    """The local engine for a policy whose weights do not change, ready to sample."""
    engine = engine_for(policy, guide=guide)
    engine.update_weights(policy, 0)
    return engine


def frozen_scoring_engine(policy: Policy) -> ScoringEngine:
    """The local engine for a policy whose weights do not change, ready to score; its passes are shared by all ranks."""
    engine = _engine_for(policy, EngineChoice(), None, None, "rollouts")
    engine.update_weights(policy, 0)
    assert isinstance(engine, ScoringEngine), "the local engine is one"
    return engine

"""The engine of a stage that samples ahead of training, which works while the policy trains."""

from __future__ import annotations

import torch

from rlpost.engine.api import SideEngine
from rlpost.engine.door import side_engine_for
from rlpost.engine.params import LOCAL, EngineChoice
from rlpost.engine.side import Origin
from rlpost.policy.policy import Policy
from rlpost.stages.context import Context


def side_engine(context: Context, policy: Policy, chosen: EngineChoice) -> SideEngine:
    """The stage's engine; it is closed when the stage ends.

    Where policy and engine both compute on this machine's CPU, the engine gets half of the threads meanwhile (one at
    least), and training the others.

    Raises:
        EngineError: it cannot be started.
    """
    before = torch.get_num_threads()
    threads = max(1, before // 2)
    if chosen.engine == LOCAL and context.device.type == "cpu":
        context.opened.callback(torch.set_num_threads, before)
        torch.set_num_threads(max(1, before - threads))
    origin = Origin(context.start, context.model, context.bfloat16, context.device)
    where = "rollouts" if chosen is context.rollouts else f"stages.{context.name}.rollouts"
    made = side_engine_for(policy, chosen, origin, threads, where)
    context.opened.callback(made.close)
    return made

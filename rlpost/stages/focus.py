"""Which actions of an update are learned from, where the recipe names a function that chooses.

It looks at the whole update, however that is cut, under the policy as it stands before it.

Axes: N action tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.recipe.specs.grpo import Grpo
from rlpost.stages.context import Context
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner


def focusing(context: Context, cfg: Grpo, learner: Learner) -> Callable[[Experience], Experience]:
    """What multiplies an update's advantages by the recipe's `focus`; without one, it leaves the update as it is."""
    if cfg.focus is None:
        return lambda update: update
    function = context.function(cfg, "focus")
    asks = set(inspect.signature(function.call).parameters)
    stats = LogitStats(temperature=cfg.sampling.temperature, entropy="entropy_N" in asks)

    def read(output: PolicyOutput, _: Experience) -> Tensor:
        entropy_N = torch.zeros_like(output.logp_N) if output.entropy_N is None else output.entropy_N
        return torch.stack([output.logp_N, entropy_N], 1)

    def focused(update: Experience) -> Experience:
        # Of all completions: those without an advantage are part of the update too.
        both_N2 = learner.evaluate_no_grad(read, replace(update, needed_S=None), stats)
        if not len(both_N2):
            return update
        known = {
            "logp_N": both_N2[:, 0],
            "entropy_N": both_N2[:, 1],
            "old_logp_N": update["old_logp"],
            "advantage_N": update["advantage"],
        }
        factor_N = function(**{name: x_N for name, x_N in known.items() if name in asks})
        return update.with_actions(advantage=update["advantage"] * factor_N.to(update["advantage"].dtype))

    return focused

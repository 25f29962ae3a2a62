"""What functions of all actions of an update say of each: whether it is learned from, and whether a KL holds it back.

They look at the whole update, however that is cut, under the policy as it stands before it.

Axes: N action tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.recipe.specs.grpo import Grpo
from rlpost.stages.context import Context
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.usercode.binding import bind, functions_at
from rlpost.usercode.bound import Bound


def focusing(context: Context, cfg: Grpo, learner: Learner) -> Callable[[Experience], Experience]:
    """Makes an update ready: its advantages times the recipe's `focus`, and `old_kl`, the coefficients of that KL.

    Without either it leaves the update as it is.
    """
    functions = _functions(context, cfg)
    if not functions and cfg.old_kl is None:
        return lambda update: update
    asks = {name: set(inspect.signature(function.call).parameters) for name, function in functions.items()}
    stats = LogitStats(
        temperature=cfg.sampling.temperature, entropy=any("entropy_N" in names for names in asks.values())
    )

    def read(output: PolicyOutput, _: Experience) -> Tensor:
        entropy_N = torch.zeros_like(output.logp_N) if output.entropy_N is None else output.entropy_N
        return torch.stack([output.logp_N, entropy_N], 1)

    def known(update: Experience) -> Mapping[str, Tensor]:
        # Of all completions: those without an advantage are part of the update too.
        both_N2 = learner.evaluate_no_grad(read, replace(update, needed_S=None), stats)
        generator = torch.Generator().manual_seed(context.seed_for("focus", learner.updates))
        return {
            "logp_N": both_N2[:, 0],
            "entropy_N": both_N2[:, 1],
            "old_logp_N": update["old_logp"],
            "advantage_N": update["advantage"],
            "uniform_N": torch.rand(len(both_N2), dtype=torch.float64, generator=generator),
        }

    def ready(update: Experience) -> Experience:
        factors: dict[str, Tensor] = {}
        if functions and len(update["advantage"]):
            given = known(update)
            for name, function in functions.items():
                factor_N = function(**{n: x_N for n, x_N in given.items() if n in asks[name]})
                factors[name] = factor_N.to(update["advantage"].dtype)
        if "focus" in factors:
            update = update.with_actions(advantage=update["advantage"] * factors["focus"])
        if cfg.old_kl is not None:
            chosen_N = factors.get("old_kl", torch.ones_like(update["advantage"]))
            if "correction" in update.per_action:  # it makes them samples of the old policy
                chosen_N = chosen_N * update["correction"]
            update = update.with_actions(old_kl=cfg.old_kl.beta * chosen_N)
        return update

    return ready


def _functions(context: Context, cfg: Grpo) -> dict[str, Bound]:
    """Those that the recipe names, by what they are for."""
    found = {} if cfg.focus is None else {"focus": context.function(cfg, "focus")}
    if cfg.old_kl is not None:
        for named in functions_at(cfg.old_kl, "focus", f"stages.{context.name}.old_kl"):
            found["old_kl"] = bind(*named, context.folder)
    return found

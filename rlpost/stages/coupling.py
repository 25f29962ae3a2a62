"""Surrogates that compare the completions of a group: a pass before each update gives them the whole group.

A micro-batch may end within a group, and a rank has some groups only. So the loss is computed on the log-probabilities
of the whole update, group by group, and differentiated by them (objectives/coupled.py); each part then follows its
share of that slope.

Axes: N action tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rlpost.facts import fact
from rlpost.objectives.coupled import linearised
from rlpost.objectives.ragged import Ragged
from rlpost.policy.logprobs import LogitStats
from rlpost.recipe.specs.grpo import Grpo
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner

Surrogate = Callable[..., Tensor]


def coupling(surrogate: Surrogate, cfg: Grpo, learner: Learner) -> Callable[[Experience], Experience]:
    """What adds `value` and `slope` to a weighted update; it leaves the update of any other surrogate as it is."""
    if not fact(surrogate, "couples_group"):
        return lambda update: update
    stats = LogitStats(temperature=cfg.sampling.temperature)

    def coupled(update: Experience) -> Experience:
        logp_N = learner.evaluate_no_grad(lambda output, _: output.logp_N, replace(update, needed_S=None), stats)
        return update.with_actions(**_by_group(surrogate, update, logp_N))

    return coupled


def counts_from(surrogate: Surrogate) -> str:
    """Whose log-probabilities are its `old_logp_N`: by name, among an experience's."""
    return "reference" if fact(surrogate, "from_reference") else "old_logp"


def loss_of(surrogate: Surrogate, logp_N: Tensor, part: Experience, rows: Ragged) -> Tensor:
    """[N] the surrogate of a part, the correction applied, with the gradient that it has in the whole update.

    Of a coupled one it is the value that `coupling` found, and weighed it has the whole update's gradient.
    """
    if "slope" in part.per_action:
        return part["value"] + part["slope"] * (logp_N - logp_N.detach())
    loss_N = surrogate(logp_N, part[counts_from(surrogate)], part["advantage"], rows)
    return loss_N * part["correction"] if "correction" in part.per_action else loss_N


def _by_group(surrogate: Surrogate, update: Experience, logp_N: Tensor) -> dict[str, Tensor]:
    """[N] each action's loss, and the slope of the whole update's by its log-probability, per weight."""
    lengths = [[c.actions for c in group.completions] for group in update.groups]
    sizes = [sum(own) for own in lengths]
    names = [
        name for name in (counts_from(surrogate), "advantage", "weight", "correction") if name in update.per_action
    ]
    columns = [torch.split(x_N, sizes) for x_N in (logp_N.cpu(), *(update[name].cpu() for name in names))]
    values: list[Tensor] = []
    slopes: list[Tensor] = []
    for own, (new_N, *rest) in zip(lengths, zip(*columns, strict=True), strict=True):
        known = dict(zip(names, rest, strict=True))
        loss = partial(_of_group, surrogate, known, Ragged(own))
        _, slope_N = linearised(partial(_weighted, loss, known["weight"]), new_N)
        values.append(loss(new_N))
        slopes.append(slope_N / known["weight"])
    return {"value": torch.cat(values), "slope": torch.cat(slopes)}


def _of_group(surrogate: Surrogate, known: Mapping[str, Tensor], rows: Ragged, logp_N: Tensor) -> Tensor:
    loss_N = surrogate(logp_N, known[counts_from(surrogate)], known["advantage"], rows)
    return loss_N * known["correction"] if "correction" in known else loss_N


def _weighted(loss: Callable[[Tensor], Tensor], weight_N: Tensor, logp_N: Tensor) -> Tensor:
    return (loss(logp_N) * weight_N).sum()

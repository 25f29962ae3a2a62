"""Supervised fine-tuning: raise the likelihood of given completions.

Axes: N action tokens of an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlpost.data.formats import Need
from rlpost.experience import Experience
from rlpost.objectives.weights import weigh
from rlpost.policy.policy import Scores
from rlpost.recipe.schema import Sft
from rlpost.stages.context import Context, steps_of


def sft(context: Context, cfg: Sft) -> Path:
    """Train on completions; returns the final checkpoint."""
    policy = context.policy()
    data = context.data(policy, cfg.data, Need.completions, cfg.max_length, cfg.too_long)
    loss_of = context.function(cfg.loss, "sft.loss")
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    def loss(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss_N = loss_of(scores.logp_N)
        return (loss_N * part["weight"]).sum(), {"nll": -scores.logp_N}

    for step in loop.steps():
        experience = Experience(tuple(data.next(cfg.batch_size)))
        totals = learner.totals(experience)
        weight_N = weigh(cfg.weight, experience.rows, totals.actions, totals.completions, cfg.max_length)
        metrics = learner.update(loss, experience.with_actions(weight=weight_N))
        loop.log(step, {**metrics, "tokens": totals.actions}, live=("nll", "grad_norm"))
    return context.finish(policy, cfg.kind, steps)

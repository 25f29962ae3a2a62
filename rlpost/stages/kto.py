"""Learning from single completions, each desirable or not (KTO, Ethayarajh et al. 2024, arXiv:2402.01306).

The point of reference z is the policy's divergence from the reference, estimated on mismatched pairs: prompts with
completions of other prompts. It is the same for the whole update and carries no gradient, so it takes a first pass.

Axes: N action tokens, U completions of an update.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.formats import DataRole
from rlpost.devices import moved, true_at
from rlpost.objectives.unpaired import Unpaired
from rlpost.objectives.weights import pair_mean
from rlpost.policy.logprobs import PolicyOutput
from rlpost.recipe.specs.kto import Kto
from rlpost.stages.context import Context, steps_of
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.types import Group, labels


def kto(context: Context, cfg: Kto) -> Path:
    """Train on labelled completions; returns the final checkpoint."""
    policy = context.policy()
    data = context.data(policy, cfg.data, DataRole.labelled, cfg.max_length, cfg.too_long)
    function = context.function(cfg, "loss")
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    reference = context.reference(policy, cfg.reference)
    learner = context.learner(policy, cfg, updates=steps)

    def prepared(groups: Sequence[Group], seed: int) -> tuple[LossFunction, Experience]:
        update, others = (
            Experience(tuple(some)).with_actions(reference=reference.logprobs(some))
            for some in (groups, mismatched(groups, seed))
        )
        return unpaired_loss(function, log_ratios(learner, others)), weighted(update)

    seed = context.seed_for("held out mismatch")
    held_out = context.held_out(policy, cfg, lambda groups: learner.measure(*prepared(groups, seed)))
    loop = context.loop(cfg, {"data": data}, steps, held_out=held_out, policy=learner)

    for step in loop.steps():
        update = prepared(data.next(cfg.batch_size), context.seed_for("mismatch", step))
        loop.log(step, learner.update(*update), live=("loss", "z"))
    return context.finish(policy, cfg.kind, steps)


def mismatched(groups: Sequence[Group], seed: int) -> list[Group]:
    """Every prompt with the completion of another row: the rows in a random circle, each given its neighbour's."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    given = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(g, completions=groups[given[i]].completions) for i, g in enumerate(groups)]


def log_ratios(learner: Learner, update: Experience) -> Tensor:
    """[U] Σ (logp − ref) of each completion, without gradient."""

    def read(output: PolicyOutput, part: Experience) -> Tensor:
        return _delta(output, part)

    return learner.evaluate_no_grad(read, update)


def weighted(update: Experience) -> Experience:
    """The update with its labels and weights, counted over all of it."""
    desirable = torch.tensor(labels(update.groups))
    return update.with_groups(desirable=desirable, group_weight=pair_mean(len(update.groups)))


def unpaired_loss(function: Callable[..., Tensor], mismatched_U: Tensor) -> LossFunction:
    """Σ loss·weight, given the log-ratios of the whole update's mismatched completions."""

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        delta_U, good_U = _delta(output, part), torch.tensor(labels(part.groups), dtype=torch.bool)
        mismatched = moved(mismatched_U, delta_U.device).to(delta_U.dtype)
        loss_U = function(Unpaired(delta_U, mismatched, part["desirable"]))
        metrics = {
            "desirable_logratio": delta_U.detach()[true_at(good_U, delta_U.device)],
            "undesirable_logratio": delta_U.detach()[true_at(~good_U, delta_U.device)],
            "z": mismatched_U.mean().clamp(min=0)[None],
        }
        return (loss_U * part["group_weight"]).sum(), metrics

    return loss


def _delta(output: PolicyOutput, part: Experience) -> Tensor:
    rows = part.rows.to(output.logp_N.device)
    return rows.sum(output.logp_N) - rows.sum(part["reference"])

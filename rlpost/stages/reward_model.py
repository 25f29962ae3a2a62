"""Reward models: a score for every completion, from pairs or from whole rankings.

Pairs are compared as in Bradley & Terry 1952 (Stiennon et al. 2020, arXiv:2009.01325, §3.4), rankings as in
Plackett & Luce. The score is read off the state after a completion's last token.

Axes: S completions, P pairs or ranked groups of an update, K completions of the longest group, 2 = (chosen, rejected).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlpost.devices import moved, true_at
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.weights import pair_mean
from rlpost.policy.value_head import ValueHeadModel, Values
from rlpost.recipe.specs.reward_model import RewardModel
from rlpost.stages.context import Context, steps_of
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group


def reward_model(context: Context, cfg: RewardModel) -> Path:
    """Train a model of scores that begins as the policy and a new head; returns the final checkpoint."""
    model = ValueHeadModel(context.policy())
    data = context.data(model.trunk, cfg.data, cfg.rows(), cfg.max_length, cfg.too_long)
    loss = score_loss(context.function(cfg, "loss"))
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(model, cfg, updates=steps, whole_groups=True)
    held_out = context.held_out(model.trunk, cfg, lambda groups: learner.measure(loss, weighted(Experience(groups))))
    loop = context.loop(cfg, {"data": data}, steps, held_out=held_out, policy=learner)

    for step in loop.steps():
        experience = weighted(Experience(tuple(data.next(cfg.batch_size))))
        metrics = learner.update(loss, experience)
        loop.log(step, metrics, live=("loss", "accuracy", "margin"))
    return context.finish(model.trunk, cfg.kind, steps, extra=model.save)


def weighted(update: Experience) -> Experience:
    """The update with its weights, normalised over all of it."""
    return update.with_groups(weight=pair_mean(len(update.groups)))


def score_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of scores, which is given what its parameters name.

    `accuracy` and `margin` are over all couples of completions of which one is known to be better: in a ranked group
    each with each.
    """
    parameters = set(inspect.signature(function).parameters)
    rewards = pair_rewards if "score_P2" in parameters else ranked_rewards

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        dtype, device = values.final_S.dtype, values.final_S.device
        rows_P = Ragged([len(g.completions) for g in part.groups])
        score_PK = rows_P.to(device).pad(values.final_S)
        # A shorter group is filled up with unscored completions.
        reward_PK = rows_P.pad(torch.tensor([r for g in part.groups for r in rewards(g)], dtype=dtype), math.nan)
        margins = [margin(g) if "margin_P" in parameters else 0.0 for g in part.groups]
        given = {
            "score_P2": score_PK,
            "margin_P": moved(torch.tensor(margins, dtype=dtype), device),
            "score_PK": score_PK,
            "reward_PK": moved(reward_PK, device),
        }
        loss_P = function(**{name: x for name, x in given.items() if name in parameters})
        better_PKK = reward_PK[:, :, None] > reward_PK[:, None, :]
        lead_PKK = (score_PK[:, :, None] - score_PK[:, None, :]).detach()
        lead = lead_PKK.flatten()[true_at(better_PKK.flatten(), device)]
        metrics = {"accuracy": (lead > 0).double(), "margin": lead, "score": values.final_S.detach()}
        return (loss_P * part["weight"]).sum(), metrics

    return loss


def pair_rewards(group: Group) -> list[float]:
    """1 for the chosen completion, 0 for the rejected one."""
    assert len(group.completions) == 2, "a pair"
    return [1.0, 0.0]


def ranked_rewards(group: Group) -> list[float]:
    """The score of each completion of a ranked row, NaN where it has none; of a pair, as `pair_rewards`."""
    scores = [c.score for c in group.completions]
    if all(score is None for score in scores):
        return pair_rewards(group)
    return [math.nan if score is None else score for score in scores]


def margin(group: Group) -> float:
    """By how much the chosen completion's score is to lead: the row's `margin`, or 0."""
    return float(group.example.get("margin") or 0.0)

"""Reward models: a score for every completion, from pairs or from whole rankings.

Pairs are compared as in Bradley & Terry 1952 (Stiennon et al. 2020, arXiv:2009.01325, §3.4), rankings as in
Plackett & Luce. The score is read off the state after a completion's last token.

Axes: S completions, P pairs or ranked groups of an update, K completions of the longest group, 2 = (chosen, rejected).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.formats import Need
from rlpost.errors import DataError
from rlpost.experience import Experience
from rlpost.groups import Group
from rlpost.learner import Learner, LossFunction
from rlpost.objectives.ranking import ranking
from rlpost.objectives.rows import Rows
from rlpost.objectives.weights import pair_mean
from rlpost.policy.scalar import ScalarModel, Values
from rlpost.recipe.schema import RewardModel
from rlpost.stages.context import Context, steps_of


def reward_model(context: Context, cfg: RewardModel) -> Path:
    """Train a model of scores that begins as the policy and a new head; returns the final checkpoint."""
    model = ScalarModel(context.policy())
    need = Need.ranked if cfg.loss.fn == ranking.__name__ else Need.pairs
    data = context.data(model.trunk, cfg.data, need, cfg.max_length, cfg.too_long)
    loss = score_loss(context.function(cfg.loss, "reward_model.loss"))
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(model, cfg, updates=steps, whole_groups=True)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    for step in loop.steps():
        experience = weighted(Experience(tuple(data.next(cfg.batch_size))), learner)
        metrics = learner.update(loss, experience)
        loop.log(step, metrics, live=("loss", "accuracy", "margin"))
    return context.finish(model.trunk, cfg.kind, steps, beside=model.save)


def weighted(update: Experience, learner: Learner) -> Experience:
    """The update with the margins of its rows and its weights, counted over all of it.

    Raises:
        DataError: a margin is no number.
    """
    margin_P = torch.tensor([_margin(g) for g in update.groups], dtype=torch.float64)
    weight_P = pair_mean(len(update.groups), learner.totals(update).groups)
    return update.with_groups(margin=margin_P, weight=weight_P)


def score_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of scores, which is told what it asks for by name.

    `accuracy` and `margin` are over all couples of completions of which one is known to be better: in a ranked group
    each with each.
    """
    asked = set(inspect.signature(function).parameters)

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        score_PK, reward_PK = tables(values.final_S, part.groups)
        given = {"score_P2": score_PK, "margin_P": part["margin"], "score_PK": score_PK, "reward_PK": reward_PK}
        loss_P = function(**{name: x for name, x in given.items() if name in asked})
        better_PKK = reward_PK[:, :, None] > reward_PK[:, None, :]
        margin = (score_PK[:, :, None] - score_PK[:, None, :]).detach()[better_PKK]
        metrics = {"accuracy": (margin > 0).double(), "margin": margin, "score": values.final_S.detach()}
        return (loss_P * part["weight"]).sum(), metrics

    return loss


def tables(score_S: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Scores [P, K] and rewards [P, K] of whole groups; a shorter group is filled up with unscored (NaN) rewards.

    The rewards of a pair are 1 and 0.
    """
    rows_P = Rows([len(g.completions) for g in groups]).to(score_S.device)
    reward_S = torch.tensor([r for g in groups for r in rewards_of(g)], dtype=score_S.dtype, device=score_S.device)
    return rows_P.pad(score_S), rows_P.pad(reward_S, math.nan)


def rewards_of(group: Group) -> list[float]:
    """The rewards of a ranked row's completions, or of a pair's."""
    scores = group.example.get("scores", (1.0, 0.0))
    return [math.nan if score is None else float(score) for score in scores]


def _margin(group: Group) -> float:
    """By how much the chosen completion's score is to lead: the row's `margin`, or 0.

    Raises:
        DataError: it is no number.
    """
    margin = group.example.get("margin")
    if margin is None:
        return 0.0
    if not isinstance(margin, Real) or not math.isfinite(margin):
        raise DataError(f"a row's 'margin' is {margin!r}: give a number, or leave it out")
    return float(margin)

"""Process reward models: for every step of a completion, the probability that it is right (arXiv:2305.20050).

The logit of a step is read off the state after its last action.

Axes: N action tokens, K steps of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.formats import DataRole
from rlpost.data.step_split import ends_of
from rlpost.devices import true_at
from rlpost.policy.value_head import ValueHeadModel, Values
from rlpost.recipe.specs.process_reward_model import ProcessRewardModel
from rlpost.stages.context import Context, steps_of
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group


def process_reward_model(context: Context, cfg: ProcessRewardModel) -> Path:
    """Train a model of steps that begins as the policy and a new head; returns the final checkpoint."""
    model = ValueHeadModel(context.policy())
    data = context.data(model.trunk, cfg.data, DataRole.steps, cfg.max_length, cfg.too_long)
    loss = step_loss(context.function(cfg, "loss"))
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(model, cfg, updates=steps)
    held_out = context.held_out(model.trunk, cfg, lambda groups: learner.measure(loss, weighted(Experience(groups))))
    loop = context.loop(cfg, {"data": data}, steps, held_out=held_out, policy=learner)

    for step in loop.steps():
        experience = weighted(Experience(tuple(data.next(cfg.batch_size))))
        metrics = learner.update(loss, experience)
        loop.log(step, metrics, live=("loss", "accuracy"))
    return context.finish(model.trunk, cfg.kind, steps, extra=model.save)


def weighted(update: Experience) -> Experience:
    """The update with its labels and weights, each on the last action of its step: a mean over all steps.

    An action that ends no step has NaN for a label.
    """
    label_N = torch.tensor([x for group in update.groups for x in _labels(group)], dtype=torch.float64)
    ends_N = (~label_N.isnan()).double()
    return update.with_actions(label=label_N, weight=ends_N / max(float(ends_N.sum()), 1))


def step_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of the steps' logits and labels.

    `accuracy` is at the probability 0.5; `predicted` and `label` have the same mean where a model is calibrated.
    """

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        device = values.after_N.device
        label_N = torch.tensor([x for g in part.groups for x in _labels(g)])
        end_K = true_at(~label_N.isnan(), device)
        logit_K = values.after_N[end_K]
        label_K = part["label"][end_K].to(logit_K.dtype)
        loss_K = function(logit_K, label_K)
        detached_K = logit_K.detach()
        metrics = {
            "accuracy": ((detached_K > 0) == (label_K > 0.5)).double(),
            "predicted": torch.sigmoid(detached_K),
            "label": label_K,
        }
        return (loss_K * part["weight"][end_K]).sum(), metrics

    return loss


def _labels(group: Group) -> list[float]:
    """The label of every action that ends a step, NaN for other actions."""
    labels = (label for c in group.completions for label in c.step_labels.tolist())
    return [next(labels) if end else math.nan for c in group.completions for end in ends_of(c)]

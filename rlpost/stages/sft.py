"""Supervised fine-tuning: raise the likelihood of given completions, or imitate a teacher's distributions on them.

A loss with a parameter `label_N` reads labelled rows: completions to imitate, and completions to avoid.

Axes: N action tokens of an update, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.formats import DataRole
from rlpost.data.params import Direction
from rlpost.devices import true_at
from rlpost.errors import ModelError, RecipeError
from rlpost.objectives.weights import weigh
from rlpost.policy.load import load_policy
from rlpost.policy.logprobs import DistributionLoss, LogitStats, PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.sft import Sft
from rlpost.stages.context import Context, steps_of
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group, labels

FULL = {"logp_NV", "teacher_NV", "target_N"}
"""Parameters of a loss that need the whole vocabulary's log-probabilities."""


def sft(context: Context, cfg: Sft) -> Path:
    """Train on completions; returns the final checkpoint."""
    policy = context.policy()
    function = context.function(cfg, "loss")
    data = context.data(policy, cfg.data, cfg.rows(), cfg.max_length, cfg.too_long)
    teacher = _teacher(context, policy, cfg.teacher) if cfg.teacher else None
    stats = stats_of(function, teacher)
    loss = supervised_loss(function)
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps)

    def prepared(groups: Sequence[Group]) -> Experience:
        update = weighted(Experience(tuple(groups)), cfg)
        return labelled(update) if cfg.rows() is DataRole.labelled else update

    held_out = context.held_out(policy, cfg, lambda groups: learner.measure(loss, prepared(groups), stats))
    loop = context.loop(cfg, {"data": data}, steps, held_out=held_out, policy=learner)

    for step in loop.steps():
        experience = prepared(data.next(cfg.batch_size))
        metrics = learner.update(loss, experience, stats)
        loop.log(step, {**metrics, "tokens": experience.rows.actions}, live=("nll", "grad_norm"))
    about = {"direction": str(Direction.reverse)} if cfg.leaves is Leaves.reverse else None
    return context.finish(policy, cfg.kind, steps, about=about)


def weighted(update: Experience, cfg: Sft) -> Experience:
    """The update with its weights, normalised over all of it."""
    rows = update.rows
    return update.with_actions(weight=weigh(cfg.weight, rows, rows.actions, rows.learned, cfg.max_length))


def labelled(update: Experience) -> Experience:
    """The update with its rows' labels, at every action: True where the completion is to be imitated."""
    return update.with_actions(label=_labels(update))


def _labels(update: Experience) -> Tensor:
    """[N] bool, on the CPU."""
    return torch.tensor(labels(update.groups), dtype=torch.bool).repeat_interleave(update.rows.lengths_S)


def supervised_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of log-probabilities; one of whole distributions was computed in the forward pass."""
    by_label = "label_N" in inspect.signature(function).parameters

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll_N = -output.logp_N.detach()
        if by_label:
            loss_N = function(logp_N=output.logp_N, label_N=part["label"])
            wanted_N = _labels(part)
            said, unsaid = (nll_N[true_at(mask_N, nll_N.device)] for mask_N in (wanted_N, ~wanted_N))
            return (loss_N * part["weight"]).sum(), {"nll": said, "unsaid_nll": unsaid}
        loss_N = function(logp_N=output.logp_N) if output.loss_N is None else output.loss_N
        return (loss_N * part["weight"]).sum(), {"nll": nll_N}

    return loss


def stats_of(function: Callable[..., Tensor], teacher: Policy | None) -> LogitStats:
    """What the forward pass computes: also a loss of whole distributions, tile by tile.

    Raises:
        ModelError: the loss asks for a teacher, and there is none.
        RecipeError: it asks for labels and for whole distributions.
    """
    takes = set(inspect.signature(function).parameters)
    wanted = takes & {"logp_N", *FULL}
    if "label_N" in takes and wanted & FULL:
        raise RecipeError(f"a loss with label_N takes only logp_N besides; remove {', '.join(sorted(wanted & FULL))}")
    if "teacher_NV" in wanted and teacher is None:
        raise ModelError("the loss imitates a teacher and there is none; give `teacher`")
    if not wanted & FULL:
        return LogitStats()
    return LogitStats(loss=DistributionLoss(function, frozenset(wanted), teacher if "teacher_NV" in wanted else None))


def _teacher(context: Context, policy: Policy, name: str) -> Policy:
    """The teacher, frozen.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is another one.
    """
    checkpoint = context.checkpoint(name)
    teacher = load_policy(checkpoint, context.model, bfloat16=context.bfloat16, device=context.device, trainable=False)
    if teacher.vocabulary != policy.vocabulary or teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            f"stages.{context.name}.teacher: {name} has another vocabulary than the model it is to teach; "
            "distributions are compared token by token, so name a model with the same tokenizer"
        )
    if teacher.flat != policy.flat:
        raise ModelError(f"stages.{context.name}.teacher: {name} needs other rows; set model.attention=padded")
    return teacher

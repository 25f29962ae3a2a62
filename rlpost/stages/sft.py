"""Supervised fine-tuning: raise the likelihood of given completions, or imitate a teacher's distributions on them.

Axes: N action tokens of an update, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlpost.data.formats import Need
from rlpost.errors import ModelError
from rlpost.experience import Experience
from rlpost.learner import Learner, LossFunction
from rlpost.objectives.weights import weigh
from rlpost.policy.batch import Batch
from rlpost.policy.load import load_policy
from rlpost.policy.logprobs import Reader
from rlpost.policy.policy import Policy, Scores
from rlpost.recipe.schema import Direction, Sft, reads_backwards
from rlpost.stages.context import Context, steps_of

FULL = {"logp_NV", "teacher_NV", "target_N"}
"""What a loss may ask for that needs the whole vocabulary's log-probabilities."""


def sft(context: Context, cfg: Sft) -> Path:
    """Train on completions; returns the final checkpoint."""
    policy = context.policy()
    data = context.data(policy, cfg.data, Need.completions, cfg.max_length, cfg.too_long)
    function = context.function(cfg.loss, "sft.loss")
    teacher = _teacher(context, policy, cfg.teacher) if cfg.teacher else None
    how = reading(function, teacher)
    loss = supervised_loss(function)
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    for step in loop.steps():
        experience = weighted(Experience(tuple(data.next(cfg.batch_size))), cfg, learner)
        metrics = learner.update(loss, experience, **how)
        tokens = learner.totals(experience).actions
        loop.log(step, {**metrics, "tokens": tokens}, live=("nll", "grad_norm"))
    about = {"direction": str(Direction.reverse)} if reads_backwards(cfg) else None
    return context.finish(policy, cfg.kind, steps, about=about)


def weighted(update: Experience, cfg: Sft, learner: Learner) -> Experience:
    """The update with its weights, counted over all of it."""
    totals = learner.totals(update)
    return update.with_actions(
        weight=weigh(cfg.weight, update.rows, totals.actions, totals.completions, cfg.max_length)
    )


def supervised_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of log-probabilities; one of whole distributions was read off them already."""

    def loss(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss_N = function(logp_N=scores.logp_N) if scores.read is None else scores.read
        return (loss_N * part["weight"]).sum(), {"nll": -scores.logp_N.detach()}

    return loss


def reading(function: Callable[..., Tensor], teacher: Policy | None) -> dict[str, Any]:
    """What the forward pass is told: for a loss of whole distributions, to compute it tile by tile.

    Raises:
        ModelError: the loss asks for a teacher, and there is none.
    """
    asked = set(inspect.signature(function).parameters) & {"logp_N", *FULL}
    if "teacher_NV" in asked and teacher is None:
        raise ModelError("the loss imitates a teacher and there is none; give `teacher`")
    if not asked & FULL:
        return {}

    def read(batch: Batch) -> Reader:
        says = teacher.distributions(batch) if teacher is not None and "teacher_NV" in asked else None

        def loss(logp_nV: Tensor, where: slice) -> Tensor:
            target = batch.target_N[where]
            known: dict[str, Callable[[], Tensor]] = {
                "logp_N": lambda: logp_nV.gather(1, target[:, None])[:, 0],
                "logp_NV": lambda: logp_nV,
                "teacher_NV": lambda: says(where) if says else logp_nV,
                "target_N": lambda: target,
            }
            return function(**{name: known[name]() for name in asked})

        return loss

    return {"read": read}


def _teacher(context: Context, policy: Policy, name: str) -> Policy:
    """The model that is imitated, frozen.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is another one.
    """
    checkpoint = context.checkpoint(name)
    teacher = load_policy(
        checkpoint, context.model, bfloat16=context.bfloat16, device=context.accelerator.device, trainable=False
    )
    if teacher.vocabulary != policy.vocabulary or teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            f"stages.{context.name}.teacher: {name} has another vocabulary than the model it is to teach; "
            "distributions are compared token by token, so name a model with the same tokenizer"
        )
    if teacher.flat != policy.flat:
        raise ModelError(f"stages.{context.name}.teacher: {name} needs other rows; set model.attention=padded")
    return teacher

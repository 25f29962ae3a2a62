"""Supervised fine-tuning: raise the likelihood of given completions, or imitate a teacher's distributions on them.

A loss with a parameter `label_N` reads labelled rows: completions to imitate, and completions to avoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlpost.data.formats import DataRole
from rlpost.data.params import Direction
from rlpost.errors import ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.policy import Policy
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.sft import Sft
from rlpost.stages.context import Context, steps_of
from rlpost.stages.supervised import prepared, stats_of, supervised_loss
from rlpost.train.experience import Experience
from rlpost.types import Group


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

    def update(groups: Sequence[Group]) -> Experience:
        return prepared(groups, cfg.weight, cfg.max_length, with_labels=cfg.rows() is DataRole.labelled)

    held_out = context.held_out(policy, cfg, lambda groups: learner.measure(loss, update(groups), stats))
    loop = context.loop(cfg, {"data": data}, steps, held_out=held_out, policy=learner)

    for step in loop.steps():
        experience = update(data.next(cfg.batch_size))
        metrics = learner.update(loss, experience, stats)
        loop.log(step, {**metrics, "tokens": experience.rows.actions}, live=("nll", "grad_norm"))
    about = {"direction": str(Direction.reverse)} if cfg.leaves is Leaves.reverse else None
    return context.finish(policy, cfg.kind, steps, about=about)


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

"""Trains value networks: the probability, in every state, that the policy's completion reaches a goal.

The policy samples and is not changed; the network learns whether its completions reached the goal. A network that reads
its goal can learn many: the recipe's, and the endings of completions (hindsight). An ending is the goal of the *other*
completions of its prompt, which are independent of it; its own completion always reaches it.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.codec import Codec, make_codec
from rlpost.data.formats import DataRole
from rlpost.engine.collect import collect
from rlpost.goals.goal_sampler import GoalSampler
from rlpost.goals.goal_set import GoalSet, ends_in
from rlpost.goals.params import ValueTarget
from rlpost.goals.value_network import ValueSettings, conditioned
from rlpost.objectives.values import bellman_residual, contrastive_value, monte_carlo_value
from rlpost.policy.value_head import Values, make_critic
from rlpost.recipe.specs.value import Value
from rlpost.stages.context import Context, steps_of
from rlpost.stages.on_policy import mean_of
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Completion, Group


def value(context: Context, cfg: Value) -> Path:
    """Train a value network of the policy; returns the network's final checkpoint."""
    policy = context.policy()
    model = make_critic(policy, context.start, None, context.model, trains_trunk=True)
    codec = make_codec(policy.tokenizer)
    goal_sampler = GoalSampler(cfg.goals, codec, context)
    room = cfg.max_length - cfg.sampling.max_new_tokens - goal_sampler.max_length(cfg.condition, cfg.hindsight_tokens)
    data = context.data(policy, cfg.data, DataRole.prompts, room, cfg.too_long)
    context.shard(policy)
    engine = context.engine(policy, cfg.rollouts)
    loss = goal_value_loss(cfg)
    steps = steps_of(cfg, data.epoch_length, cfg.prompts_per_step, f"stages.{context.name}")
    learner = context.learner(model, cfg, updates=steps * cfg.num_minibatches)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    for step in loop.steps():
        seed = context.seed_for("sample", step)
        engine.update_weights(policy, step)
        groups = collect(engine, data.next(cfg.prompts_per_step), cfg.group_size, cfg.sampling, seed=seed)
        draw = random.Random(context.seed_for("goal", step))
        shares = split([value_example(g, goal_sampler, cfg, codec, draw) for g in groups], cfg.num_minibatches, draw)
        metrics = mean_of([learner.update(loss, weighted(share)) for share in shares])
        loop.log(step, metrics, live=("loss", "predicted", "reached"))
    settings = ValueSettings(cfg.condition, cfg.avoid, cfg.target.value, cfg.goals.truncated_counts)

    def extra(folder: Path) -> None:
        model.save(folder)
        settings.save(folder)

    return context.finish(model.trunk, cfg.kind, steps, adapter=model.adapter, extra=extra)


@dataclass(frozen=True)
class ValueExample:
    """A group as the network reads it, with a label for each completion."""

    group: Group
    label: tuple[float, ...]
    """The target of each completion: 1 or 0."""
    counts: tuple[bool, ...]
    """False for completions that are not trained on, such as the one that the goal was taken from."""


def value_example(
    group: Group, goal_sampler: GoalSampler, cfg: Value, codec: Codec, draw: random.Random
) -> ValueExample:
    """A group with a goal, which is the recipe's or the ending of one of its completions, and its labels."""
    own = draw.random() < cfg.hindsight or cfg.target is ValueTarget.contrastive
    taken = _taken(group.completions, cfg, codec, draw) if own else None
    if taken is None and goal_sampler.all is None and goal_sampler.column is None:
        # Every completion was truncated and the recipe has no other goal: nothing to learn.
        return ValueExample(group, (0.0,) * len(group.completions), (False,) * len(group.completions))
    if taken is None:
        goal, named = goal_sampler.of(group, cfg.condition, draw)
        at = None
    else:
        at, named = taken
        goal = GoalSet([named])
    cut = cfg.goals.truncated_counts
    reached = [ends_in(goal, c, codec.stops, truncated_counts=cut) for c in group.completions]
    if cfg.target is ValueTarget.contrastive:
        label = tuple(float(i == at) for i in range(len(reached)))
        counts = (at is not None,) * len(reached)
    else:
        label = tuple(float(r != cfg.avoid) for r in reached)
        counts = tuple(i != at for i in range(len(reached)))
    prompt = conditioned(cfg.condition, named, group.prompt.tolist(), codec)
    return ValueExample(Group(prompt, group.completions, group.example), label, counts)


def split(examples: Sequence[ValueExample], updates: int, draw: random.Random) -> list[list[ValueExample]]:
    """The step's examples, shuffled, in shares of about equal size for its updates."""
    order = draw.sample(examples, len(examples))
    return [order[i::updates] for i in range(min(updates, len(order)))]


def weighted(examples: Sequence[ValueExample]) -> Experience:
    """An update: labels, and weights of a mean over the actions of completions that count."""
    experience = Experience(tuple(x.group for x in examples))
    rows = experience.rows
    label_S = torch.tensor([y for x in examples for y in x.label], dtype=torch.float64)
    counts_S = torch.tensor([c for x in examples for c in x.counts])
    counts_N = rows.spread(counts_S.double())
    total = max(float(counts_N.sum()), 1)
    experience = experience.with_actions(label=rows.spread(label_S), weight=counts_N / total)
    return replace(experience, needed_S=tuple(counts_S.tolist()))


def goal_value_loss(cfg: Value) -> LossFunction:
    """Σ loss·weight over the states in which actions were taken; the first is the prompt itself."""

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit_N, label_N = values.before_N, part["label"].to(values.before_N.dtype)
        if cfg.target is ValueTarget.monte_carlo:
            loss_N = monte_carlo_value(logit_N, label_N)
        elif cfg.target is ValueTarget.bootstrap:
            loss_N = bellman_residual(logit_N, label_N, part.rows.to(logit_N.device))
        else:
            loss_N = contrastive_value(logit_N, label_N, negatives=cfg.group_size - 1)
        value_N = torch.sigmoid(logit_N.detach())
        line = {"predicted": value_N, "reached": label_N, "brier": (value_N - label_N).square()}
        return (loss_N * part["weight"]).sum(), line

    return loss


def _taken(
    completions: Sequence[Completion], cfg: Value, codec: Codec, draw: random.Random
) -> tuple[int, tuple[int, ...]] | None:
    """A random completion and its ending, to be the goal; None if all were truncated or are empty."""
    endings = [
        tuple(i for i in c.ids.tolist() if i not in codec.stops)[-cfg.hindsight_tokens :]
        if c.finish != "length" or cfg.goals.truncated_counts
        else ()
        for c in completions
    ]
    able = [at for at, ending in enumerate(endings) if ending]
    if not able:
        return None
    at = draw.choice(able)
    return at, endings[at]

"""A dataset of guided samples, for a policy that imitates them.

Sampling from the guided distribution and maximising the samples' likelihood is distillation by cross-entropy: the
policy that `sft` trains on these rows decodes like the guided one, without the value network.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlpost.data.codec import Codec, make_codec
from rlpost.data.formats import DataRole
from rlpost.data.messages import opening
from rlpost.data.params import TooLong
from rlpost.engine.api import Engine, Guide
from rlpost.engine.collect import collect
from rlpost.errors import DataError
from rlpost.goals.goal_sampler import GoalSampler
from rlpost.goals.goal_set import Goal, ends_in
from rlpost.goals.value_network import ValueNetwork, load_value, read_settings
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.guided import Guided
from rlpost.stages.context import Context
from rlpost.stages.generate_dataset import generate_dataset
from rlpost.types import Group

AT_ONCE = 64
"""Prompts whose samples are held at a time."""


def guided(context: Context, cfg: Guided) -> Path:
    """Sample under guidance; returns the folder with the rows `prompt, completion`.

    Raises:
        DataError: no sample reaches its goal.
        ModelError: the network cannot guide this policy.
        Interrupted: when a signal asked to stop.
    """
    policy = context.policy(trains=False)
    codec = make_codec(policy.tokenizer)
    folder = context.checkpoint(cfg.network)
    network = load_value(folder, policy, (), avoid=read_settings(folder).avoid)
    goal_sampler = GoalSampler(cfg.goals, codec, context)
    data = context.data(
        policy, cfg.data, DataRole.prompts, policy.max_positions - cfg.sampling.max_new_tokens, TooLong.refuse
    )
    prompts = data.next(cfg.prompts or len(data))

    def make(some: Sequence[Group], first: int) -> Iterator[dict[str, Any]]:
        def guided_by(guide: Guide) -> Engine:
            engine = context.engine(policy, cfg.rollouts, guide)
            engine.update_weights(policy, first // AT_ONCE)
            return engine

        return guided_rows(
            guided_by, policy, network, goal_sampler, some, cfg, codec, context.seed_for("sample", first)
        )

    rows = generate_dataset(context, prompts, AT_ONCE, make)
    if not rows:
        raise DataError(
            f"stages.{context.name}: no sample reaches its goal; train the network longer, or check the goals"
        )

    return context.finish_dataset(rows, cfg.kind)


def guided_rows(
    guided_by: Callable[[Guide], Engine],
    policy: Policy,
    network: ValueNetwork,
    goal_sampler: GoalSampler,
    prompts: Sequence[Group],
    cfg: Guided,
    codec: Codec,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of finished samples; prompts with the same goal are sampled together."""
    draw = random.Random(seed)
    by_goal: dict[tuple[int, ...], tuple[Goal, list[Group]]] = {}
    for group in prompts:
        goal, named = goal_sampler.of(group, network.settings.condition, draw)
        by_goal.setdefault(named, (goal, []))[1].append(group)
    avoid, cut = network.settings.avoid, network.settings.truncated_counts
    for number, (named, (goal, some)) in enumerate(by_goal.items()):
        guide = network.about(named).guide(goal, policy.end_ids, cfg.candidates)
        for group in collect(guided_by(guide), some, cfg.group_size, cfg.sampling, seed=seed + number):
            prompt = group.example.get("prompt", opening(group.example.get("messages", [])))
            for c in group.completions:
                right = ends_in(goal, c, codec.stops, truncated_counts=cut) != avoid
                # A policy would imitate a truncated sample as if it had ended there.
                if c.finish == "stop" and (right or not cfg.reached_only):
                    yield {**group.example, "prompt": prompt, "completion": c.text}

"""Annotates rows with a value network's values, for a policy that reads them.

The policy's input is the prompt and the network's values of some states, such as the cells of a maze, as digits. It
decodes without the network.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlpost.data.codec import Codec, make_codec
from rlpost.data.encoders import plain_prompt
from rlpost.data.formats import DataRole
from rlpost.data.params import TooLong
from rlpost.errors import DataError, ModelError
from rlpost.goals.goal_sampler import GoalSampler
from rlpost.goals.params import ValueTarget
from rlpost.goals.value_network import ValueNetwork, load_value, read_settings
from rlpost.recipe.specs.value_annotations import ValueAnnotations
from rlpost.stages.context import Context
from rlpost.stages.generate_dataset import generate_dataset
from rlpost.types import Group

AT_ONCE = 64
"""Rows annotated at a time."""


def value_annotations(context: Context, cfg: ValueAnnotations) -> Path:
    """Annotate every row; returns the folder with the rows, each with a column `value_annotations`.

    Raises:
        DataError: a row does not list the texts to annotate.
        ModelError: the network gives no probabilities, or its tokens are not the model's.
        Interrupted: when a signal asked to stop.
    """
    policy = context.policy(trains=False)
    codec = make_codec(policy.tokenizer)
    folder = context.checkpoint(cfg.network)
    if read_settings(folder).target == ValueTarget.contrastive:
        raise ModelError(
            f"stages.{context.name}.network: {cfg.network} is contrastive and knows values only up to a factor; "
            "train one with target monte_carlo or bootstrap"
        )
    network = load_value(folder, policy, (), avoid=read_settings(folder).avoid)
    goal_sampler = GoalSampler(cfg.goals, codec, context)
    data = context.data(policy, cfg.data, DataRole.prompts, policy.max_positions, TooLong.refuse)
    prompts = data.all()
    draw = random.Random(context.seed_for("goals"))

    def make(some: Sequence[Group], _first: int) -> Iterator[dict[str, Any]]:
        return annotated_rows(network, goal_sampler, some, cfg, codec, f"stages.{context.name}", draw)

    rows = generate_dataset(context, prompts, AT_ONCE, make)
    return context.finish_dataset(rows, cfg.kind)


def annotated_rows(
    network: ValueNetwork,
    goal_sampler: GoalSampler,
    prompts: Sequence[Group],
    cfg: ValueAnnotations,
    codec: Codec,
    where: str,
    draw: random.Random,
) -> Iterator[dict[str, Any]]:
    """Each row with its `value_annotations`: for every text that it lists, V in [0, 1] as one of ten digits."""
    for group in prompts:
        texts = group.example.get(cfg.about)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{where}.about: a row has no list of texts in {cfg.about!r}; give each row what to ask about"
            )
        _, named = goal_sampler.of(group, network.settings.condition, draw)
        states = [(plain_prompt(text, codec, f"{where}, {cfg.about}"), ()) for text in texts]
        value = torch.sigmoid(network.about(named).logits(states)).tolist() if states else []
        yield {**group.example, "value_annotations": "".join(str(min(int(v * 10), 9)) for v in value)}

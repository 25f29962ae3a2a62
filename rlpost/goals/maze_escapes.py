"""Escape rates from held-out starts of a run's mazes: of the random walker, of the walker guided to the exits by its
value network, and of the trained policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rlpost.data.codec import make_codec
from rlpost.data.encoders import plain_prompt
from rlpost.data.tasks import maze as task
from rlpost.engine.api import Guide
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.maze_run import final_of, finished, mazes_of, policy_of, recipe_of
from rlpost.goals.value_network import load_value
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.recipe.rules import Leaves
from rlpost.recipe.schema import Recipe
from rlpost.types import Group, completions

SAMPLES = 8
"""Walks from each start."""
CANDIDATES = 8
"""Tokens that the network weighs: a cell has four neighbours, and a walk has three ends."""


def escapes(run: Path, stage: str | None = None) -> list[str]:
    """The shares of walks that escape and of optimal moves, as lines; `stage` as in `maze_run.solved`.

    Raises:
        ModelError: the run has no walker or no policy.
        DataError: its rows are not mazes.
    """
    recipe = recipe_of(run)
    rows = [row for row in mazes_of(recipe) if row["held_out"]]
    sampling = Sampling(max_new_tokens=_room(recipe))
    walker_at = final_of(run, recipe, lambda stage: stage.kind == "sft", "a walker: a stage of kind sft")
    value_at = finished(run, recipe, lambda stage: stage.leaves is Leaves.value)
    lines = []
    for name, policy, guide in _ways(walker_at, value_at, policy_of(run, recipe, stage)):
        groups = collect(frozen_engine(policy, guide), _groups(rows, policy), SAMPLES, sampling, seed=0)
        walks = [(c, g.example) for g in groups for c in completions([g])]
        out = fmean(task.escaped(c, row) for c, row in walks)
        best = fmean(task.optimal(c, row) for c, row in walks)
        lines.append(f"{name}, from held-out starts: {out:.1%} of walks escape, {best:.1%} of moves are optimal")
    return lines


def _ways(walker_at: Path, value_at: Path | None, policy_at: Path) -> Iterator[tuple[str, Policy, Guide | None]]:
    walker = load_policy(walker_at, Model(), trainable=False)
    yield "random walker", walker, None
    if value_at is not None:
        exits = GoalSet([make_codec(walker.tokenizer).ids(task.EXIT, "the exit")])
        network = load_value(value_at, walker, (), avoid=False)
        guide = network.guide(exits, walker.end_ids, CANDIDATES)
        yield "led by its value network", walker, guide
    yield "policy", load_policy(policy_at, Model(), trainable=False), None


def _groups(rows: Sequence[Mapping[str, Any]], policy: Policy) -> list[Group]:
    codec = make_codec(policy.tokenizer)
    return [Group(plain_prompt(row["prompt"], codec, "the prompt"), (), row) for row in rows]


def _room(recipe: Recipe) -> int:
    """Tokens of the longest walk that the run's stages sampled."""
    return max(int(stage.sampling.max_new_tokens) for stage in recipe.stages.values() if hasattr(stage, "sampling"))

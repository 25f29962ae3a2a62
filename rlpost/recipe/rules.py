"""Rules that stage specs share: about earlier stages, data sources and rewards. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from rlpost.data.params import Direction, Source
from rlpost.rewards.params import Reward, reward_leaves
from rlpost.suggest import hint_or_list

if TYPE_CHECKING:
    from rlpost.recipe.schema import Recipe
    from rlpost.recipe.specs.common import Stage


class Leaves(StrEnum):
    """What a stage produces. Unless it is a policy, the next stage starts from the same model as this one."""

    policy = "policy"
    rows = "rows"
    reward_model = "reward_model"
    process_reward_model = "process_reward_model"
    value = "value"
    reverse = "reverse"
    """A model of reversed text, which is no policy."""


SCORES = (Leaves.reward_model, Leaves.process_reward_model, Leaves.value)
"""Models that score completions."""
JUDGES = (*SCORES, Leaves.reverse)
"""Models that rewards can use."""
_JUDGED = {
    "reward_model": "a reward_model stage",
    "process_reward_model": "a process_reward_model stage",
    "reverse_likelihood": "an sft stage with direction: reverse",
}
"""Reward functions that need a model, and the stage that trains one."""
NODES = {"sum": (), "product": (), "min": (), "gate": ("above",), "lexicographic": ("scale",), "shaping": ("gamma",)}
"""The node functions of a reward tree, and the `args` of each."""


class Earlier:
    """The stages before a given one; explains why a name is not one of them."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        before = list(recipe.stages)[: list(recipe.stages).index(name)]
        self.own = name
        self.rollouts = recipe.rollouts
        self.evaluation = recipe.evaluation
        self.stages: dict[str, Stage] = {n: recipe.stages[n] for n in before if recipe.stages[n].enabled}
        self.disabled = recipe.stages.keys() - recipe.enabled().keys()
        self.all = set(recipe.stages)

    @property
    def eval_every(self) -> int:
        """The recipe's steps between evaluations while a stage trains; 0: none."""
        return self.evaluation.every if self.evaluation is not None else 0

    def problem(self, name: str, where: str, also: tuple[str, ...] = ()) -> str | None:
        """Why `name`, given at `where`, is no earlier stage; None when it is one (or one of `also`)."""
        if name in self.stages or name in also:
            return None
        if name in self.disabled:
            return f"{where}: stage {name!r} is disabled - enable it, or name another"
        if name == self.own:
            return f"{where}: {name!r} is this stage itself - name an earlier one"
        if name in self.all:
            return f"{where}: stage {name!r} comes later - name an earlier one"
        return f"{where}: no stage {name!r}{hint_or_list(name, [*also, *self.stages], 'there are')}"

    def no_policy(self, name: str, where: str, also: tuple[str, ...]) -> Iterator[str]:
        """Why `name`, given at `where`, is no earlier stage that leaves a policy (or one of `also`)."""
        problem = self.problem(name, where, also)
        stage = self.stages.get(name) if problem is None else None
        if problem is not None:
            yield problem
        elif stage is not None and stage.leaves is Leaves.rows:
            what = "leaves rows and no model - name a stage that trains"
            yield f"{where}: {name!r} is of kind {stage.kind}, which {what}"
        elif stage is not None and stage.leaves is Leaves.reverse:
            yield f"{where}: {name!r} reads backwards, and leaves no policy - name a stage that trains one"
        elif stage is not None and stage.leaves is not Leaves.policy:
            yield f"{where}: {name!r} is of kind {stage.kind}, which leaves no policy - name a stage that trains one"

    def no_model(self, name: str, where: str, wanted: Sequence[Leaves]) -> Iterator[str]:
        """Why the stage `name` leaves none of the models wanted; nothing where it is no stage's name: then a path."""
        if name not in self.all and name not in self.disabled:
            return
        if problem := self.problem(name, where):
            yield problem
        elif self.stages[name].leaves not in wanted:
            if wanted == (Leaves.reverse,):
                yield f"{where}: {name!r} does not read backwards - name {_JUDGED['reverse_likelihood']}"
            else:
                yield f"{where}: {name!r} is of kind {self.stages[name].kind} - name a {' or '.join(wanted)} stage"


def source_problems(data: dict[str, Source], where: str, earlier: Earlier | None) -> Iterator[str]:
    """What is wrong with the sources at `where`; without `earlier`, stages' rows cannot be read there."""
    for name, source in data.items():
        path = f"{where}.{name}"
        if source.stage and earlier is None:
            yield f"{path}.stage: only stages read other stages' rows - give path or task"
        if source.direction is Direction.reverse and earlier is None:
            yield f"{path}.direction: reverse is for sft - remove it"
        if source.stage and earlier:
            problem = earlier.problem(source.stage, f"{path}.stage")
            if problem:
                yield problem
            elif earlier.stages[source.stage].leaves is not Leaves.rows:
                kind = earlier.stages[source.stage].kind
                yield f"{path}.stage: {source.stage!r} is of kind {kind}, without rows - name a pairs stage"


def reward_problems(rewards: Sequence[Reward], where: str, earlier: Earlier | None) -> Iterator[str]:
    """What is wrong with the rewards of the stage at `where`."""
    if not rewards:
        yield f"{where}.rewards: missing - give at least one, like [{{fn: math_answer}}]"
    names: list[str] = []
    for node, place in _nodes(rewards, f"{where}.rewards"):
        name = node.name or re.split(r"[.:]", node.fn)[-1]
        if name in names:
            yield f"{place}.name: {name!r} is logged already - give this one a name of its own"
        names.append(name)
        if node.of:
            yield from _node(node, place)
    for leaf, place in reward_leaves(rewards, where):
        if leaf.fn in NODES:
            yield f"{place}.of: missing - {leaf.fn} puts other rewards together: list them"
        if leaf.fn in _JUDGED and leaf.model is None:
            yield f"{place}.model: missing - name {_JUDGED[leaf.fn]}, or a checkpoint of one"
        if leaf.model is not None and earlier is not None:
            wanted = (Leaves.reverse,) if leaf.fn == "reverse_likelihood" else SCORES
            yield from earlier.no_model(leaf.model, f"{place}.model", wanted)


def _nodes(rewards: Sequence[Reward], where: str) -> Iterator[tuple[Reward, str]]:
    for i, reward in enumerate(rewards):
        yield reward, f"{where}[{i}]"
        yield from _nodes(reward.of, f"{where}[{i}].of")


def _node(node: Reward, where: str) -> Iterator[str]:
    if node.fn not in NODES:
        yield f"{where}.fn: {node.fn!r} takes no other rewards{hint_or_list(node.fn, list(NODES), 'these do')}"
        return
    for key in node.args:
        if key not in NODES[node.fn]:
            near = hint_or_list(key, NODES[node.fn], "it takes")
            yield f"{where}.args.{key}: {node.fn} has no argument {key!r}{near}"
    for key in ("deadline", "on_failure"):
        if getattr(node, key) is not None:
            yield f"{where}.{key}: is for functions of a file, and {node.fn} is none - set it in `of`"
    if node.fn == "gate" and len(node.of) != 2:
        yield f"{where}.of: a gate has a guard and what counts if it passed - give two, not {len(node.of)}"
    if node.fn == "shaping" and len(node.of) != 1:
        yield f"{where}.of: shaping takes one potential, a reward by step - give one, not {len(node.of)}"

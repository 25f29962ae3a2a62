"""Trees of rewards: leaves are functions of completions, nodes combine other rewards.

Children have weights, which a sum uses as factors and most other nodes ignore. None is a completion that could not be
scored; a node that needs its value is None too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.console import Spell
from rlpost.errors import RecipeError

Value = float | None


@dataclass(frozen=True)
class BoundReward:
    """A leaf: a reward function ready to be called."""

    name: str
    """Its name in logs."""
    weight: float
    """Its weight in the sum above it."""
    function: Callable[..., Any]
    """The function with its arguments applied; what the program supplies remains."""
    model: Any = None
    """The argument `model` of a function that takes one."""
    unscored: bool = False
    """Completions it fails on are unscored; else a failure stops the run."""
    failing: Spell = field(default_factory=Spell, compare=False)
    """Whether its last calls failed."""


@dataclass(frozen=True)
class Node:
    """A combination of other rewards."""

    name: str
    """Its name in logs."""
    weight: float
    """Its weight in the sum above it."""
    kind: str
    """A key of NODES."""
    of: Sequence[Reward]
    args: Mapping[str, float] = field(default_factory=dict)


Reward = BoundReward | Node
SHAPING = "shaping"
"""The node whose only child is a potential, by step."""


def leaves(rewards: Sequence[Reward]) -> Iterator[BoundReward]:
    """All leaves of the trees."""
    for reward in rewards:
        if isinstance(reward, BoundReward):
            yield reward
        else:
            yield from leaves(reward.of)


def names(rewards: Sequence[Reward]) -> Iterator[str]:
    """Names of all nodes and leaves."""
    for reward in rewards:
        yield reward.name
        if isinstance(reward, Node):
            yield from names(reward.of)


def evaluate(
    reward: Reward,
    of_leaf: Mapping[str, Sequence[Value]],
    by_name: dict[str, Sequence[Value]],
    by_step: dict[str, list[list[float]]],
) -> list[Value]:
    """[S] the value of a reward for every completion; writes those of its descendants into `by_name` too.

    What it gives each step goes into `by_step`, for nodes whose value is a sum over steps: `shaping`, and `sum` and
    `gate` of a reward by step.

    Raises:
        RecipeError: a node of steps has a child that rewards whole completions.
    """
    if isinstance(reward, BoundReward):
        found = list(of_leaf[reward.name])
    elif reward.kind == SHAPING:
        (child,) = reward.of
        evaluate(child, of_leaf, by_name, by_step)
        if child.name not in by_step:
            raise RecipeError(f"rewards: {reward.name} shapes by step and {child.name} rewards whole completions")
        by_step[reward.name] = [shaped(own, **reward.args) for own in by_step[child.name]]
        found = [math.fsum(own) if own else None for own in by_step[reward.name]]
    else:
        columns = [evaluate(child, of_leaf, by_name, by_step) for child in reward.of]
        weights = [child.weight for child in reward.of]
        combine = NODES[reward.kind]
        found = [combine(values, weights, **reward.args) for values in zip(*columns, strict=True)]
        if (steps := _shares(reward, columns, by_step)) is not None:
            by_step[reward.name] = steps
    by_name[reward.name] = found
    return found


def _shares(
    node: Node, columns: Sequence[Sequence[Value]], by_step: Mapping[str, list[list[float]]]
) -> list[list[float]] | None:
    """[S] what a node gives each step; None if its value is no sum over steps.

    That of a `gate` is `then` where it is open, else nothing. A child that rewards whole completions counts at the last
    step.
    """
    if node.kind not in ("sum", "gate"):
        return None
    counted = [(child, column) for child, column in zip(node.of, columns, strict=True) if child.weight != 0]
    opened = [True] * len(columns[0])
    if node.kind == "gate":
        counted = [(node.of[1], columns[1])]
        opened = [bool(gate((guard, 1.0), (1.0, 1.0), **node.args)) for guard in columns[0]]
    divided = next((by_step[child.name] for child, _ in counted if child.name in by_step), None)
    if divided is None:
        return None
    shares = [[0.0] * len(own) for own in divided]
    for child, column in counted:
        given = by_step.get(child.name) or [
            [0.0] * (len(own) - 1) + [value or 0.0] * bool(own) for own, value in zip(divided, column, strict=True)
        ]
        for s, own in enumerate(given):
            if opened[s]:
                shares[s] = [x + child.weight * y for x, y in zip(shares[s], own, strict=True)]
    return shares


def weighted_sum(values: Sequence[Value], weights: Sequence[float]) -> Value:
    """Σ weight·value; a child of weight 0 is only logged, and may be unscored."""
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        if weight != 0:
            if value is None:
                return None
            total += weight * value
    return total


def product(values: Sequence[Value], weights: Sequence[float]) -> Value:  # noqa: ARG001 - factors have no weights
    """The product of the values: with 0/1 rewards, "and"."""
    known = _known(values)
    return None if known is None else math.prod(known)


def least(values: Sequence[Value], weights: Sequence[float]) -> Value:  # noqa: ARG001 - neither has a minimum
    """The smallest of the values."""
    known = _known(values)
    return None if known is None else min(known)


def gate(values: Sequence[Value], weights: Sequence[float], *, above: float = 0.5) -> Value:
    """(guard, then): the weighted value of `then` if the guard is above a threshold, else 0."""
    guard, then = values
    if guard is None:
        return None
    if guard <= above:
        return 0.0
    return None if then is None else weights[1] * then


def lexicographic(values: Sequence[Value], weights: Sequence[float], *, scale: float = 1.0) -> Value:  # noqa: ARG001
    """The first decides, a later one only between equals: Σ value_i·step^{−i}, all values within ±scale.

    With step = 1 + 4·scale·n a whole unit of an earlier value outweighs all later ones together, so values that
    differ are to differ by 1 at least (counts, right or wrong).

    Raises:
        RecipeError: a value beyond ±scale, which could turn the order around.
    """
    known = _known(values)
    if known is None:
        return None
    if any(abs(value) > scale for value in known):
        raise RecipeError(f"lexicographic: a value of {max(known, key=abs):g} is beyond scale={scale:g} - raise scale")
    step = 1 + 4 * scale * len(known)
    return math.fsum(value / step**i for i, value in enumerate(known))


def shaped(potential_K: Sequence[float], *, gamma: float = 1.0) -> list[float]:
    """[K] γΦ(s′) − Φ(s) of every step, from Φ after each; Φ is 0 before the first and after the last.

    Potential-based shaping (Ng, Harada & Russell 1999): it moves credit between steps and no optimum. A Φ other than
    0 at the end would. At γ = 1 the steps' rewards sum to 0.
    """
    after = [*potential_K[:-1], 0.0] if potential_K else []
    before = [0.0, *potential_K[:-1]]
    return [gamma * phi_after - phi for phi_after, phi in zip(after, before, strict=False)]


def _known(values: Sequence[Value]) -> list[float] | None:
    return None if any(v is None for v in values) else [v for v in values if v is not None]


NODES: dict[str, Callable[..., Value]] = {
    "sum": weighted_sum,
    "product": product,
    "min": least,
    "gate": gate,
    "lexicographic": lexicographic,
}
"""Names of nodes in recipes, besides SHAPING."""

"""Properties of a function beyond its signature: `declare(leave_one_out, compares_completions=True)` after it.

A recipe is checked before its functions are imported, so these lines are also parsed: only names, True and False.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlpost.suggest import hint_or_list

FACTS = {
    # Of an advantage.
    "compares_completions": False,  # the completions of a group with each other: in a group of one it is 0
    "k_in_group": False,  # its argument `k` is a number of completions of a group
    # Of a surrogate.
    "per_completion": False,  # it has one value a completion, the same at each of its actions
    "couples_group": False,  # a completion's loss depends on its group's others: it is given one whole group at a time
    "from_reference": False,  # its `old_logp_N` is the reference's log-probabilities, not the sampler's
    "clips_ratio": False,  # to [1 - low, 1 + high], by its arguments `low` and `high`
    "vanishes_without_advantage": False,  # an action of advantage 0 adds nothing to the gradient
    # Of a loss of pairs.
    "couples_pairs": True,  # a pair's loss depends on the other pairs of the update
    "needs_reference": True,
    # Of a modifier of pairs.
    "changes_log_ratios": False,  # to the reference, and nothing else
    "weighs_actions": False,  # by where they stand: before other changes of log-ratios, and once
    "needs_collision": True,  # it reads `pairs.collision_P2`
    # Of an environment.
    "one_player": False,  # it has no `step_other`; read from its class
}
"""Every fact with its default, which is safe for any function."""


def declare(*functions: Callable[..., Any], **facts: bool) -> None:
    """Declare facts of functions.

    Raises:
        TypeError: there is no such fact.
    """
    for name in facts:
        if name not in FACTS:
            raise TypeError(f"there is no fact {name!r}{hint_or_list(name, FACTS, 'there are')}")
    for function in functions:
        vars(function)["facts"] = {**vars(function).get("facts", {}), **facts}


def fact(function: Any, name: str) -> bool:
    """Whether a fact holds for a function, or for the function below a partial or a `Bound`."""
    while not hasattr(function, "facts") and hasattr(function, "call" if hasattr(function, "call") else "func"):
        function = function.call if hasattr(function, "call") else function.func
    return bool(getattr(function, "facts", {}).get(name, FACTS[name]))

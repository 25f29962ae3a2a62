"""All claims about goals on one tree: `rlpost verify goals`."""

from __future__ import annotations

from rlpost.goals.claims_direction import direction_section
from rlpost.goals.claims_engine import engine_section
from rlpost.goals.claims_goals import goal_section
from rlpost.goals.claims_safety import safety_section
from rlpost.oracle.problem import table_problem
from rlpost.oracle.report import Report
from rlpost.oracle.tree import Tree


def verify_goals(vocabulary: int = 3, depth: int = 3, seed: int = 0) -> Report:
    """Prove the claims about goals: values, guided decoding, Monte Carlo, reverse models; arguments as of `verify`.

    Raises:
        RecipeError: the tree is too small to test anything, or too large to enumerate.
    """
    problem = table_problem(Tree(vocabulary, depth), seed)
    return Report(
        vocabulary,
        depth,
        seed,
        (
            goal_section(problem, seed),
            engine_section(problem.tree, seed),
            direction_section(problem, seed),
            safety_section(problem, seed),
        ),
    )

"""All claims on one tree: `rlpost verify`."""

from __future__ import annotations

from torch import Tensor

from rlpost.oracle.claims_baselines import baseline_section
from rlpost.oracle.claims_completions import completion_section
from rlpost.oracle.claims_credit import credit_section
from rlpost.oracle.claims_definitions import definition_section
from rlpost.oracle.claims_distillation import distillation_section
from rlpost.oracle.claims_entropy import entropy_section
from rlpost.oracle.claims_groups import group_section
from rlpost.oracle.claims_kl import kl_section
from rlpost.oracle.claims_mixed import mixed_section
from rlpost.oracle.claims_models import model_section
from rlpost.oracle.claims_offpolicy import offpolicy_section
from rlpost.oracle.claims_online import online_section
from rlpost.oracle.claims_pairs import pair_section
from rlpost.oracle.claims_preference import preference_section
from rlpost.oracle.claims_pure_pairs import pure_pair_section
from rlpost.oracle.claims_shaping import shaping_section
from rlpost.oracle.claims_supervised import supervised_section
from rlpost.oracle.claims_surrogates import surrogate_section
from rlpost.oracle.claims_target import target_section
from rlpost.oracle.claims_trust import trust_section
from rlpost.oracle.claims_turns import turn_section
from rlpost.oracle.claims_values import value_section
from rlpost.oracle.multisets import MOST, count
from rlpost.oracle.problem import SIZES, Problem, table_problem
from rlpost.oracle.report import Report, Row, Section, exact, fact, holds
from rlpost.oracle.tree import Tree


def verify(vocabulary: int = 3, depth: int = 3, seed: int = 0, *, models: bool = True) -> Report:
    """Prove the claims about `rlpost.objectives` on a tree small enough to sum over.

    Args:
        vocabulary: tokens, the one that ends a completion among them.
        depth: actions of the longest completion.
        seed: of policy, reference, rewards and models.
        models: also on tiny real models, which takes seconds to import.

    Raises:
        RecipeError: the tree is too small to prove anything, or too large to enumerate.
    """
    problem = table_problem(Tree(vocabulary, depth), seed)
    sections = [
        _tree_section(problem),
        group_section(problem),
        baseline_section(problem),
        online_section(problem),
        kl_section(problem),
        credit_section(problem),
        turn_section(problem),
        shaping_section(problem),
        surrogate_section(problem),
        completion_section(problem),
        target_section(problem),
        entropy_section(problem),
        offpolicy_section(problem),
        value_section(problem),
        pair_section(problem),
        supervised_section(problem),
        distillation_section(problem),
        mixed_section(problem),
        definition_section(problem),
        preference_section(problem),
        pure_pair_section(problem),
        trust_section(problem),
        *([model_section(problem, seed)] if models else []),
    ]
    return Report(vocabulary, depth, seed, tuple(sections))


def _tree_section(problem: Problem) -> Section:
    """The tree and its policy; a proof needs rewards of three levels or more that go with the length."""
    tree, probability_L = problem.tree, problem.probability_L
    length_L = tree.length_L.double()
    levels = len(set(problem.reward_L.tolist()))
    together = _correlation(probability_L, length_L, problem.reward_L)
    return Section(
        "the tree",
        (
            fact("completions, states, actions", f"{tree.leaves}, {tree.states}, {tree.rows.actions}"),
            exact("probabilities of all completions", abs(float(probability_L.sum()) - 1), "sum to 1"),
            _group_row(problem),
            fact("expected length", f"{float(probability_L @ length_L):.4f}"),
            fact("expected reward", f"{float(problem.value_X[0]):.4f}"),
            holds("levels of the reward", str(levels), "3 or more", levels >= 3),
            holds("correlation of reward and length", f"{together:.4f}", "> 0", together > 0),
        ),
    )


def _group_row(problem: Problem) -> Row:
    leaves = problem.tree.leaves
    sets = [problem.groups(size) for size in SIZES]
    errors = [None if s is None else abs(float(s.probability_P.sum()) - 1) for s in sets]
    counts = " / ".join(f"{count(leaves, size)}" for size in SIZES)
    row = exact(f"probabilities of all {counts} groups", errors, "sum to 1")
    if None not in errors:
        return row
    return Row(row.name, row.value, row.expected, f"{row.verdict}; more than {MOST} are skipped", row.ok)


def _correlation(probability_L: Tensor, x_L: Tensor, y_L: Tensor) -> float:
    x_L = x_L - probability_L @ x_L
    y_L = y_L - probability_L @ y_L
    return float(probability_L @ (x_L * y_L) / ((probability_L @ x_L**2) * (probability_L @ y_L**2)) ** 0.5)

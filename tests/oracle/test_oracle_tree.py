"""The tree, its truths and its groups, against numbers from other ways of counting."""

from itertools import product
from math import comb

import pytest
import torch

from rlpost.errors import RecipeError
from rlpost.oracle import truth
from rlpost.oracle.multisets import count, multisets
from rlpost.oracle.problem import table_problem
from rlpost.oracle.tree import Tree


def leaves_of(tree):
    return [tuple(piece.tolist()) for piece in torch.split(tree.token_N, tree.length_L.tolist())]


def test_leaves_are_all_completions():
    expected = {(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)}
    tree = Tree(3, 2)
    assert set(leaves_of(tree)) == expected
    assert len(leaves_of(tree)) == tree.leaves == 7
    assert tree.cut_L.tolist() == [leaf[-1] != 0 for leaf in leaves_of(tree)]


@pytest.mark.parametrize(("vocabulary", "depth"), [(3, 3), (4, 3), (2, 5)])
def test_leaves_against_cutting_every_string(vocabulary, depth):
    strings = product(range(vocabulary), repeat=depth)
    expected = {s[: s.index(0) + 1] if 0 in s else s for s in strings}
    tree = Tree(vocabulary, depth)
    assert set(leaves_of(tree)) == expected
    assert tree.leaves == len(expected)


def test_states_of_actions_are_the_prefixes():
    tree = Tree(3, 3)
    prefixes = [tuple(p) for length in range(3) for p in tree.prefixes(length).tolist()]
    assert len(prefixes) == tree.states
    states = [piece.tolist() for piece in torch.split(tree.state_N, tree.length_L.tolist())]
    for leaf, state in zip(leaves_of(tree), states, strict=True):
        assert [prefixes[x] for x in state] == [leaf[:t] for t in range(len(leaf))]


@pytest.mark.parametrize(("vocabulary", "depth"), [(1, 3), (3, 1), (50, 4), (2, 3000)])
def test_trees_out_of_reach_are_refused(vocabulary, depth):
    with pytest.raises(RecipeError, match=f"vocabulary {vocabulary}, depth {depth}"):
        Tree(vocabulary, depth)


def test_a_tree_of_nearly_the_largest_size():
    problem = table_problem(Tree(10, 5), 0)
    assert 60_000 < problem.tree.leaves <= 100_000
    assert float(problem.probability_L.sum()) == pytest.approx(1, abs=1e-12)
    assert float(problem.value_X[0]) == pytest.approx(float(problem.probability_L @ problem.reward_L), rel=1e-12)
    assert problem.groups(2) is None


def test_values_visits_kl_and_entropy_against_sums_over_leaves():
    problem = table_problem(Tree(4, 3), 1)
    tree, logp_XV = problem.tree, problem.logp_XV.detach()
    p_L, logp_L = problem.probability_L, truth.leaf_logp(tree, logp_XV)
    reference_L = truth.leaf_logp(tree, problem.reference_XV)
    assert float(p_L.sum()) == pytest.approx(1, abs=1e-14)
    assert float(truth.kl(tree, logp_XV, problem.reference_XV)) == pytest.approx(float(p_L @ (logp_L - reference_L)))
    assert float(truth.entropy(tree, logp_XV)) == pytest.approx(float(-p_L @ logp_L))
    assert float(truth.visits(tree, logp_XV).sum()) == pytest.approx(float(p_L @ tree.length_L.double()))
    passes = torch.zeros(tree.states, dtype=torch.float64).index_add(0, tree.state_N, tree.rows.spread(p_L))
    assert torch.allclose(passes, truth.visits(tree, logp_XV), atol=1e-14)


def test_the_leaf_that_a_rule_leads_to():
    tree = Tree(3, 3)
    token_X = torch.tensor([2, 0, 1, 0, 0, 0, 0])  # states: (), (1), (2), (1,1), (1,2), (2,1), (2,2)
    assert leaves_of(tree)[tree.leaf_by(token_X)] == (2, 1, 0)


def test_a_policy_from_probabilities_of_leaves():
    problem = table_problem(Tree(3, 3), 0)
    wanted_L = torch.rand(problem.tree.leaves, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted_L = wanted_L / wanted_L.sum()
    found_XV = truth.conditional(problem.tree, wanted_L)
    assert torch.allclose(truth.leaf_logp(problem.tree, found_XV).exp(), wanted_L, atol=1e-15)


def test_the_soft_optimum_is_better_than_its_neighbours():
    problem = table_problem(Tree(3, 3), 0)
    tree, reference_XV = problem.tree, problem.reference_XV

    def worth(logits_XV):
        logp_XV = logits_XV.log_softmax(1)
        return truth.values(tree, logp_XV, problem.reward_L)[0] - 0.4 * truth.kl(tree, logp_XV, reference_XV)

    best_XV = truth.soft_optimum(tree, reference_XV, problem.reward_L, 0.4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 0.05 * torch.randn(best_XV.shape, dtype=torch.float64, generator=generator)
        assert worth(best_XV + step) < worth(best_XV)


@pytest.mark.parametrize("what", ["reward", "kl", "entropy"])
def test_true_gradients_against_finite_differences(what):
    problem = table_problem(Tree(3, 3), 3)
    tree, logits_XV = problem.tree, problem.policy.logits_XV.detach()

    def exact(logits_XV):
        logp_XV = logits_XV.log_softmax(1)
        p_L = truth.leaf_logp(tree, logp_XV).exp()
        reference_L = truth.leaf_logp(tree, problem.reference_XV)
        return {"reward": p_L @ problem.reward_L, "kl": p_L @ (p_L.log() - reference_L), "entropy": -p_L @ p_L.log()}

    found = {"reward": problem.reward_gradient, "kl": problem.kl_gradient, "entropy": problem.entropy_gradient}[what]
    h, slopes = 1e-5, []
    for at in range(logits_XV.numel()):
        step = torch.zeros(logits_XV.numel(), dtype=torch.float64)
        step[at] = h
        up, down = (exact(logits_XV + sign * step.view_as(logits_XV))[what] for sign in (1, -1))
        slopes.append(float(up - down) / (2 * h))
    assert found.tolist() == pytest.approx(slopes, abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_multisets_are_what_ordered_draws_make(size):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    sets = multisets(p.log(), size)
    expected = {}
    for draw in product(range(3), repeat=size):
        key = tuple(sorted(draw))
        expected[key] = expected.get(key, 0.0) + float(p[list(draw)].prod())
    found = dict(zip(map(tuple, sets.leaf_PG.tolist()), sets.probability_P.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-15)
    assert len(found) == count(3, size) == comb(size + 2, 2)
    assert float(sets.probability_P.sum()) == pytest.approx(1, abs=1e-14)


def test_too_many_multisets_are_none():
    assert multisets(torch.full((121,), -4.0, dtype=torch.float64), 3) is None


@pytest.mark.parametrize("vocabulary", [2, 3, 4])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_rewards_have_three_levels_and_binary_ones_two(vocabulary, depth):
    problem = table_problem(Tree(vocabulary, depth), 0)
    assert len(problem.reward_L.unique()) >= 3
    assert problem.binary().reward_L.unique().tolist() == [0.0, 1.0]

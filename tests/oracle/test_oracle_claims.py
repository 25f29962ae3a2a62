"""Verdicts come from numbers: a wrong estimator fails, on tables and on a model."""

import math

import pytest
import torch

from rlpost.objectives import advantages
from rlpost.objectives.kl import kl_in_reward
from rlpost.oracle import claims_groups
from rlpost.oracle.claims_groups import Claim, claim_row
from rlpost.oracle.estimators import Drawn, group_gradient, member_weights, one_by_one
from rlpost.oracle.policies import TinyModel
from rlpost.oracle.problem import Problem, relative_error, table_problem
from rlpost.oracle.report import Report, Section, biased, exact, fact, holds, skipped
from rlpost.oracle.tree import Tree


@pytest.fixture(scope="module")
def problem() -> Problem:
    return table_problem(Tree(3, 3), 0)


def claimed(function, weight="sequence_sum", scale=1.0) -> Claim:
    return Claim(function.__name__, claims_groups._of(function), weight, lambda *_: scale, "exact")


def test_a_right_estimator_passes(problem):
    assert claim_row(problem, claimed(advantages.leave_one_out)).verdict == "exact"


@pytest.mark.parametrize("weight", ["sequence_sum", "sequence_mean", "token_mean"])
def test_a_biased_estimator_that_claims_to_be_exact_fails(problem, weight):
    row = claim_row(problem, claimed(advantages.group_normalised, weight))
    assert not row.ok
    assert row.verdict.startswith("FAILED")


def test_the_right_direction_at_the_wrong_scale_fails(problem):
    assert not claim_row(problem, claimed(advantages.group_mean)).ok


def test_an_error_far_below_any_cosine_is_seen(problem):
    def nearly(reward_PG):
        return advantages.leave_one_out(reward_PG) + 1e-9 * reward_PG**2

    assert not claim_row(problem, claimed(nearly)).ok
    assert claim_row(problem, claimed(nearly)._replace(scale=None)).verdict == "no bias on this tree"


def test_the_expected_gradient_against_drawing_every_ordered_group(problem):
    """By hand: all 225 ordered pairs, each an update of its own with its own weights."""
    tree, p_L = problem.tree, problem.probability_L
    coefficient_L = torch.zeros(tree.leaves, dtype=torch.float64)
    for a in range(tree.leaves):
        for b in range(tree.leaves):
            mean = (problem.reward_L[a] + problem.reward_L[b]) / 2
            actions = tree.length_L[a] + tree.length_L[b]
            for leaf in (a, b):
                coefficient_L[leaf] += p_L[a] * p_L[b] * (problem.reward_L[leaf] - mean) / actions
    expected = problem.expected_gradient(tree.rows.spread(coefficient_L))
    sets = problem.groups(2)
    found = group_gradient(problem, sets, advantages.group_mean(problem.reward_L[sets.leaf_PG]), "token_mean")
    assert relative_error(found, expected) < 1e-13


def test_drawn_groups_have_their_leaves_actions(problem):
    drawn = Drawn(problem.tree, problem.groups(2))
    leaf_M = drawn.sets.leaf_PG.flatten()
    assert torch.equal(drawn.rows.sum(problem.old_N[drawn.action_A]), problem.tree.rows.sum(problem.old_N)[leaf_M])
    back_N = drawn.expected(torch.ones(drawn.rows.actions, dtype=torch.float64))
    assert torch.allclose(back_N, 2 * problem.tree.rows.spread(problem.probability_L), atol=1e-14)


def test_weights_of_members_are_those_of_their_own_group():
    length_PG = torch.tensor([[1, 3], [2, 2], [1, 3]])
    assert member_weights("token_mean", length_PG, 3).tolist() == [[0.25, 0.25]] * 3
    assert member_weights("sequence_mean", length_PG, 3)[0].tolist() == pytest.approx([1 / 2, 1 / 6])
    assert member_weights("constant_length", length_PG, 3).flatten().tolist() == pytest.approx([1 / 6] * 6)


def test_one_by_one_keeps_groups_apart():
    x_PG = torch.tensor([[0.0, 1.0], [2.0, 4.0], [0.0, 1.0]])
    assert one_by_one(lambda x: x / x.max(), x_PG).tolist() == [[0.0, 1.0], [0.5, 1.0], [0.0, 1.0]]
    assert one_by_one(lambda x: x, torch.arange(5000.0).view(-1, 1)) is None


def test_a_model_is_held_to_the_same(problem):
    """Through `Policy.forward` in float64; a wrong advantage is seen there as well."""
    model = Problem(problem.tree, TinyModel(problem.tree, "gpt2", 0), problem.reward_L, problem.reference_XV)
    assert claim_row(model, claimed(advantages.leave_one_out)).ok
    assert not claim_row(model, claimed(advantages.group_normalised)).ok


def test_a_tools_tokens_are_context_and_no_actions(problem):
    tool = TinyModel(problem.tree, "gpt2", 0, tool=(1, 0))
    without = TinyModel(problem.tree, "gpt2", 0)
    lengths = [(c.actions, len(c.ids)) for c in tool.group.completions]
    assert lengths[0] == (1, 1)
    assert all(ids == actions + 2 for actions, ids in lengths[1:])
    assert torch.equal(tool.logp_N()[:1], without.logp_N()[:1])
    assert (tool.logp_N() - without.logp_N())[1:].abs().max() > 1e-3


def test_kl_centred_over_the_group_is_needed_as_it_is(problem):
    """The uncentred term is exact too, a wrong group size is not even accepted."""
    drawn = Drawn(problem.tree, problem.groups(2))
    logp_A, reference_A = problem.old_N[drawn.action_A], problem.reference_N[drawn.action_A]
    alone, centred = (kl_in_reward(logp_A, reference_A, drawn.rows, size) for size in (1, 2))
    found = [problem.expected_gradient(drawn.expected(x / 2)) for x in (alone, centred)]
    assert relative_error(found[0], problem.kl_gradient) < 1e-13
    assert relative_error(found[1], problem.kl_gradient) < 1e-13


def test_verdicts():
    assert exact("a", 1e-13).ok
    assert not exact("a", 1e-11).ok
    assert not exact("a", [1e-16, math.nan]).ok
    assert not exact("a", [1e-16, 1e-3]).ok
    assert exact("a", [1e-16, None]).value == "1.0e-16 / skipped"
    assert exact("a", [None, None]).verdict == "not computed"
    assert biased("a", 0.97).verdict == "biased, as expected"
    assert biased("a", 1 - 1e-9).verdict == "no bias on this tree"
    assert not biased("a", math.nan).ok
    assert not holds("a", "0", "> 0", False).ok
    assert skipped("a", "too large").ok


def test_a_report_fails_with_its_rows():
    good, bad = exact("good", 0.0), exact("bad", 1.0)
    report = Report(3, 3, 0, (Section("one", (good, fact("leaves", "15"))), Section("two", (bad,))))
    assert report.failed == [bad]
    assert not report.ok
    assert "1 failed" in report.title
    assert report.to_json()["sections"][1]["rows"][0]["name"] == "bad"
    assert any(line.split() == ["good", "0.0e+00", "exact", "exact"] for line in report.text().splitlines())
    assert Report(3, 3, 0, (Section("one", (good,)),)).ok

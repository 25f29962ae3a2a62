"""What is proved of models of reversed text, and that a wrong ranking would be found."""

from __future__ import annotations

import math

import pytest

from rlpost.goals import claims_direction, infill
from rlpost.goals.claims_direction import direction_section, exact_pair, texts, trained_nll
from rlpost.oracle.problem import table_problem
from rlpost.oracle.tree import Tree

INFILLING = "infilling: the most probable middle is ranked first"


@pytest.fixture
def problem(monkeypatch):
    """Of the default tree; nothing is trained for it."""
    monkeypatch.setattr(claims_direction, "_learned_rows", lambda *_: [])
    return table_problem(Tree(3, 3), 0)


def rows(problem, seed: int = 0):
    return {row.name: row for row in direction_section(problem, seed).rows}


@pytest.mark.parametrize(("vocabulary", "depth", "seed"), [(2, 2, 0), (2, 5, 1), (3, 3, 7), (4, 3, 2)])
def test_other_trees(problem, vocabulary, depth, seed):
    found = rows(table_problem(Tree(vocabulary, depth), seed), seed)
    assert all(row.ok for row in found.values())
    assert len([row for row in found.values() if row.verdict == "exact"]) == 2


def test_without_the_beginning_the_ranking_is_often_wrong(problem):
    found = rows(problem)
    assert found[INFILLING].value == "100 of 100"
    (careless,) = [row.value for name, row in found.items() if name.endswith("without x")]
    assert int(careless.split(" of ")[0]) < 90


def test_a_ranking_by_the_middle_alone_is_found(problem, monkeypatch):
    honest = infill._log_likelihoods
    # Neither model says what stands at its far end: the goal, and the beginning.
    monkeypatch.setattr(
        infill, "_log_likelihoods", lambda policy, prompt, rests: honest(policy, prompt, [r[:-2] or r for r in rests])
    )
    assert not rows(problem)[INFILLING].ok


def test_a_tree_with_too_many_texts_is_left_out():
    (row,) = direction_section(table_problem(Tree(3, 9), 0), 0).rows
    assert row.verdict == "skipped: 1023 texts, more than 400"


def test_a_trained_model_comes_close_to_the_entropy_from_above_either_way():
    """Vocabulary 3, depth 3: measured 0.006 nats above, both ways."""
    problem = table_problem(Tree(3, 3), 0)
    entropy = -sum(p * math.log(p) for p in texts(problem).values())
    for reverse in (False, True):
        assert 0 < trained_nll(problem, reverse, seed=0) - entropy < 0.03


def test_a_table_is_a_language_model():
    ahead, back = exact_pair({(1, 2): 0.75, (2,): 0.25}, 3)
    first = [policy.model(input_ids=policy.model.tokens.weight.new_tensor([[3]]).long()) for policy in (ahead, back)]
    assert [x.logits[0, 0].exp().tolist() for x in first] == [[0, 0.75, 0.25, 0], [0, 0, 1, 0]]

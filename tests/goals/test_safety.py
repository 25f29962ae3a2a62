"""Forbidden endings: what is left of them and its price, on tables and on a trained policy."""

from __future__ import annotations

import math

import pytest
import torch
from engines import asked, local
from tiny_recipes import SFT, group, policy, run

from rlpost.engine.params import Sampling
from rlpost.errors import EngineError
from rlpost.goals import claims_safety
from rlpost.goals.claims_safety import divergence, least_divergence, mass, safety_section, unlearned
from rlpost.goals.exact import reached
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide, Mode
from rlpost.goals.model_tables import Tokens, guided_away, network_table, policy_table
from rlpost.goals.value_network import load_value
from rlpost.goals.verify import verify_goals
from rlpost.objectives.supervised import nll
from rlpost.oracle import truth
from rlpost.oracle.problem import table_problem
from rlpost.oracle.tree import Tree
from rlpost.policy.score import logprobs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocabulary", "depth"), [(2, 2), (2, 5), (3, 3)])
def test_every_claim_holds_on_other_trees(vocabulary, depth, seed):
    section = safety_section(table_problem(Tree(vocabulary, depth), seed), seed)
    assert [row for row in section.rows if not row.ok] == []
    assert sum(row.verdict == "exact" for row in section.rows) == 7


def test_the_command_proves_them():
    titles = [section.title for section in verify_goals(2, 2).sections]
    assert any(title.startswith("forbidden endings") for title in titles)


def test_a_loss_that_forbids_nothing_fails(monkeypatch):
    """Likelihood alone, whatever the label: the table's own samples teach it what it says already."""
    monkeypatch.setattr(claims_safety, "likelihood_by_label", lambda logp_N, _: nll(logp_N))
    failed = [row.name for row in safety_section(table_problem(Tree(2, 2), 0), 0).rows if not row.ok]
    assert "likelihood_by_label, 100 steps: forbidden mass" in failed


def test_the_least_price_by_hand():
    assert least_divergence(0.0, 0.5) == pytest.approx(math.log(2))  # −log(1 − u)
    assert least_divergence(0.2, 0.2) == 0.0
    assert least_divergence(0.25, 0.5) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_divergence_is_the_chain_rules_where_that_has_no_zeros():
    problem = table_problem(Tree(3, 3), 0)
    start_XV, other_XV = problem.logp_XV.detach(), problem.reference_XV
    expected = float(truth.kl(problem.tree, other_XV, start_XV))
    assert divergence(problem.tree, other_XV, start_XV) == pytest.approx(expected, rel=1e-12)


def test_unlearning_on_three_tokens_by_hand():
    """All odds even, completions may not end in token 2: u = P(20) + P(12) + P(22) = 1/3."""
    tree = Tree(3, 2)
    start_XV = torch.zeros(tree.states, 3, dtype=torch.float64).log_softmax(1)
    unsafe_L = reached(tree, GoalSet([[2]]), truncated_counts=True)
    after_XV = unlearned(tree, start_XV, unsafe_L)
    assert mass(tree, start_XV, unsafe_L) == pytest.approx(1 / 3)
    assert mass(tree, after_XV, unsafe_L) < 0.03
    # After token 1, ending and going on with 1 are both to be said, and were alike.
    assert float(after_XV[1, 0]) == pytest.approx(float(after_XV[1, 1]), abs=1e-12)


def test_a_guide_with_nowhere_to_go_says_so():
    tree = Tree(3, 2)
    with pytest.raises(EngineError, match="every token leads to a forbidden ending"):
        guided_away(tree, torch.zeros(3, 3).log_softmax(1), torch.zeros(3), torch.ones(tree.leaves))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy and its value network away from endings in 1 or 22."""
    folder = tmp_path_factory.mktemp("trained")
    value = {
        "kind": "value",
        "data": SFT["data"],
        "steps": 3,
        "prompts_per_step": 4,
        "sampling": {"max_new_tokens": 2},
        "goals": {"texts": ["1", "22"], "truncated_counts": True},
        "avoid": True,
        "learning_rate": 3e-3,
        "max_length": 20,
    }
    run(folder, {"sft": SFT, "value": value})
    one = policy(folder / "runs/run/sft/final")
    return one, load_value(folder / "runs/run/value/final", one, (), avoid=True)


def test_a_trained_policys_table_is_what_it_says(trained):
    one, _ = trained
    tree, tokens = Tree(one.vocabulary, 3), Tokens.made_for(one)
    logp_L = truth.leaf_logp(tree, policy_table(one, one.tokenizer.encode("4+5="), tree, tokens))
    assert float(logp_L.exp().sum()) == pytest.approx(1, abs=1e-9)
    leaf = {tokens.real(ids.tolist()): at for at, ids in enumerate(torch.split(tree.token_N, tree.length_L.tolist()))}
    for text in ("", "9", "09"):
        asked = group(one, "4+5=", text)
        said = float(logprobs(one, [asked]).double().sum())
        assert float(logp_L[leaf[tuple(asked.completions[0].ids)]]) == pytest.approx(said, abs=1e-5)


def test_the_guided_table_is_what_the_engine_samples(trained):
    one, network = trained
    tree, tokens = Tree(one.vocabulary, 2), Tokens.made_for(one)
    members = [one.tokenizer.encode(text) for text in ("1", "22")]
    prompt = one.tokenizer.encode("4+5=")
    goal = tokens.goal(members)
    log_X = network_table(network, prompt, tree, tokens)
    unsafe_L = reached(tree, goal, truncated_counts=True)
    table_XV = guided_away(tree, policy_table(one, prompt, tree, tokens), log_X, unsafe_L)
    logp_L = truth.leaf_logp(tree, table_XV)
    assert mass(tree, table_XV, unsafe_L) == 0.0
    leaf = {tokens.real(ids.tolist()): at for at, ids in enumerate(torch.split(tree.token_N, tree.length_L.tolist()))}
    guide = Guide(network.ahead, GoalSet(members), one.end_ids, Mode.away, truncated_counts=True)
    (drawn,) = local(one, guide=guide).generate(asked([prompt], 40, Sampling(max_new_tokens=2), [0]))
    assert len({tuple(c.ids) for c in drawn}) > 5
    for c in drawn:
        assert float(logp_L[leaf[tuple(c.ids)]]) == pytest.approx(sum(tuple(c.logprobs)), abs=1e-5)

"""Infilling from both ends: candidates, what they cost, and their order."""

from __future__ import annotations

import math

import pytest
import torch
from stubs import Letters, tiny_policy

from rlpost.data.direction import before_what
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.goals.claims_direction import exact_pair, texts
from rlpost.goals.infill import _joined, _written, infill, propose, rank
from rlpost.oracle.problem import table_problem
from rlpost.oracle.tree import Tree
from rlpost.types import Completion

BEGIN, END = 62, 63
X, GOAL = (5, 9), (7, 3)


def pair():
    """Two models that have nothing to do with each other."""
    torch.manual_seed(0)
    policies = tiny_policy(eos=END), tiny_policy("gpt2", eos=END)
    for policy in policies:
        policy.tokenizer = Letters(END)
        policy.tokenizer.bos_token_id = BEGIN
    return policies


def joint_order(mass, x, goal):
    """Every middle there is, the most probable first."""
    between = [t[len(x) : len(t) - len(goal)] for t in mass if len(t) >= len(x) + len(goal)]
    possible = [m for m in between if (*x, *m, *goal) in mass]
    return sorted(set(possible), key=lambda m: -mass[(*x, *m, *goal)])


@pytest.mark.parametrize("seed", range(3))
def test_exact_models_rank_by_the_probability_of_the_text(seed):
    problem = table_problem(Tree(3, 4), seed)
    mass = texts(problem)
    ahead, back = exact_pair(mass, 3)
    for x in ((1,), (2,), (1, 2)):
        best_first = joint_order(mass, x, (2,))
        found = rank(ahead, back, (3, *x), (2,), sorted(best_first))
        assert [m.ids for m in found] == best_first
        # 2·log p(text) less what depends on x and the goal alone.
        shared = [m.score - 2 * math.log(mass[(*x, *m.ids, 2)]) for m in found]
        assert shared == pytest.approx([shared[0]] * len(shared), abs=1e-12)


def test_both_terms_by_hand():
    """p(11) = 0.5, p(121) = 0.3, p(12) = 0.1, p(22) = 0.1."""
    mass = {(1, 1): 0.5, (1, 2, 1): 0.3, (1, 2): 0.1, (2, 2): 0.1}
    ahead, back = exact_pair(mass, 3)
    first, second = rank(ahead, back, (3, 1), (1,), [(2,), ()])
    assert first.ids == ()
    # Of what begins with 1 (0.9), and of what ends with 1 (0.8).
    assert (first.forward, first.reverse) == pytest.approx((math.log(0.5 / 0.9), math.log(0.5 / 0.8)))
    assert second.score == pytest.approx(math.log(0.3 / 0.9) + math.log(0.3 / 0.8))


def test_scores_are_those_of_plain_passes():
    ahead, back = pair()

    @torch.no_grad()
    def total(policy, ids, given):
        logp = policy.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(sum(logp[t - 1, ids[t]] for t in range(given, len(ids))))

    for policy in (ahead, back):
        policy.model.set_attn_implementation("eager")
    middles = [(), (8,), (11, 12, 13)]
    plain = {
        m: (total(ahead, [BEGIN, *X, *m, *GOAL, END], 3), total(back, [BEGIN, *GOAL[::-1], *m[::-1], *X[::-1], END], 3))
        for m in middles
    }
    ahead, back = pair()
    found = rank(ahead, back, (BEGIN, *X), GOAL, middles)
    assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
    for m in found:
        assert (m.forward, m.reverse) == pytest.approx(plain[m.ids], abs=1e-4)


def test_candidates_are_pieces_of_both_sides_and_all_tokens_are_counted(monkeypatch):
    ahead, back = pair()
    said = []
    generate = LocalEngine.generate

    def record(self, requests):
        (found,) = generate(self, requests)
        said.append(([tuple(r.prompt.tolist()) for r in requests], found))
        return [found]

    monkeypatch.setattr(LocalEngine, "generate", record)
    proposals = propose(ahead, back, (BEGIN, *X), GOAL, n=3, sampling=Sampling(max_new_tokens=4), seed=1, most=10**6)
    ((asked, heads), (asked_back, tails)) = said
    assert asked == [(BEGIN, *X)]
    assert asked_back == [before_what(GOAL, back.tokenizer)] == [(BEGIN, *GOAL[::-1])]
    assert proposals.sampled == sum(len(c.ids) for c in (*heads, *tails))
    fronts = {tuple(c.ids[:i]) for c in heads for i in range(5)}
    backs = {tuple(c.ids[:i][::-1]) for c in tails for i in range(5)}
    assert END not in {token for c in (*heads, *tails) for token in c.ids}
    assert set(proposals.middles) == {f + b for f in fronts for b in backs if len(f + b) <= 4}
    assert len(proposals.middles) == len(set(proposals.middles))
    assert {tuple(c.ids) for c in heads} | {tuple(c.ids[::-1]) for c in tails} <= set(proposals.middles)


def test_of_too_many_those_that_meet_in_a_token_go_before_those_that_do_not():
    heads, tails = [(1, 2)], [(3, 2, 4)]
    alone = [(), (1,), (1, 2), (), (3,), (2, 3), (4, 2, 3)]
    every = list(_joined(heads, tails))
    assert every[: len(alone)] == alone
    # The reverse model said 2 after 3: the pieces 1 2 and 3 fit together.
    assert every[len(alone)] == (1, 2, 3)
    ahead, back = pair()
    few = propose(ahead, back, (BEGIN, *X), GOAL, n=3, sampling=Sampling(max_new_tokens=4), most=5)
    assert len(few.middles) == 5


def test_an_end_token_ends_a_piece():
    ended, cut_off = (Completion(ids, (True,) * len(ids)) for ids in ((4, 5, END), (4, 5)))
    assert _written([ended, cut_off], pair()[0]) == [(4, 5), (4, 5)]


def test_infilling_is_proposals_in_order():
    ahead, back = pair()
    sampling = Sampling(max_new_tokens=3)
    found = infill(ahead, back, (BEGIN, *X), GOAL, n=2, sampling=sampling, seed=4)
    proposals = propose(ahead, back, (BEGIN, *X), GOAL, n=2, sampling=sampling, seed=4)
    assert found.middles == tuple(rank(ahead, back, (BEGIN, *X), GOAL, proposals.middles))
    assert found.sampled == proposals.sampled
    # m, goal and end; m, x and end.
    assert found.scored == sum(2 * len(m) + 6 for m in proposals.middles)
    assert infill(ahead, back, (BEGIN, *X), GOAL, n=2, sampling=sampling, seed=4) == found


def test_no_room_for_the_text():
    ahead, back = pair()
    with pytest.raises(ModelError, match="may have 131 tokens, the models read 128"):
        infill(ahead, back, (BEGIN, *X), GOAL, n=1, sampling=Sampling(max_new_tokens=124))

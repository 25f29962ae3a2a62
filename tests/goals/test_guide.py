"""Guides: candidates, exact ends, refusals; and particles."""

from __future__ import annotations

import math

import pytest
import torch

from rlpost.errors import EngineError
from rlpost.goals.exact import from_table, guided, posterior, reached
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide, Mode, Position
from rlpost.goals.smc import twisted_smc
from rlpost.oracle import truth
from rlpost.oracle.problem import table_problem
from rlpost.oracle.tree import END, Tree

FIVE = GoalSet([(5,)])


def nothing_known(positions, candidate_BK):
    """A value of ½ everywhere."""
    return torch.full(candidate_BK.shape, math.log(0.5), dtype=torch.float64)


def test_only_the_likeliest_candidates_are_weighed():
    guide = Guide(nothing_known, FIVE, {0}, candidates=2)
    weights = guide.log_weights(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), [Position((9,), (), False)])
    assert weights.exp().tolist() == [[0.0, 0.5, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("mode", "ids", "last", "expected"),
    [
        (Mode.toward, (4, 5), False, [1.0, 0.5]),  # the end token after a member
        (Mode.toward, (5, 4), False, [0.0, 0.5]),
        (Mode.away, (4, 5), False, [0.0, 0.5]),
        (Mode.away, (5, 4), False, [1.0, 0.5]),
        (Mode.toward, (5, 4), True, [1.0, 1.0]),  # all is lost: as it would have been
        (Mode.away, (5, 4), True, [1.0, 1.0]),
        (Mode.soft, (4, 5), False, [math.exp(2.0), 0.5]),
    ],
)
def test_where_a_completion_is_over_the_goal_itself_is_asked(mode, ids, last, expected):
    guide = Guide(nothing_known, FIVE, {0}, mode, beta=0.5)
    weights = guide.log_weights(torch.zeros(1, 2), [Position((9,), ids, last)])
    assert weights.exp()[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("counts", "expected"), [(True, [0.0, 1.0]), (False, [1.0, 1.0])])
def test_a_cut_off_completion_counts_if_told_so(counts, expected):
    guide = Guide(nothing_known, GoalSet([(1,)]), {0}, truncated_counts=counts)
    assert guide.log_weights(torch.zeros(1, 2), [Position((9,), (3,), True)]).exp()[0].tolist() == expected


def test_the_last_token_that_fits_is_the_one_at_each_rows_limit():
    guide = Guide(nothing_known, GoalSet([(1,)]), {0}, truncated_counts=True)
    rows = guide.begin([(9,)], [0, 0], [1, 2])
    logits, there, ahead = torch.zeros(2, 3), [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]
    assert rows.weigh(logits, torch.tensor([True, True])).exp().tolist() == [there, ahead]
    rows.append(torch.tensor([1, 2]))
    rows.keep(torch.tensor([1]))
    assert rows.weigh(logits[:1], torch.tensor([True])).exp().tolist() == [there]


def test_a_dead_end_is_refused_and_not_sampled():
    guide = Guide(lambda p, c: torch.full(c.shape, -math.inf), GoalSet([(1,)]), {0}, Mode.away, candidates=2)
    with pytest.raises(EngineError, match="every one of the 2 likeliest tokens leads to a forbidden ending"):
        guide.log_weights(
            torch.tensor([[-9.0, 1.0, 2.0]] * 2), [Position((9,), (3,), True), Position((9,), (1,), False)]
        )


def known(seed: int = 0):
    tree = Tree(3, 4)
    logp_XV = table_problem(tree, seed).logp_XV.detach()
    goal = GoalSet([(1, 2), (2,)])
    there_L = reached(tree, goal)
    return tree, logp_XV, goal, there_L, truth.values(tree, logp_XV, there_L)


def test_a_learned_value_bends_the_way_and_not_the_end():
    """Whatever the value says on the way, no completion that misses keeps any mass."""
    tree, logp_XV, goal, there_L, value_X = known()
    noise = torch.randn(len(value_X), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away_X = truth.values(tree, logp_XV, 1 - there_L).log() + noise
    found_L = truth.leaf_logp(
        tree, guided(tree, logp_XV, Guide(from_table(tree, away_X), goal, {END}, Mode.away))
    ).exp()
    assert float(found_L @ there_L) == 0
    assert float((found_L - posterior(tree, logp_XV, 1 - there_L)).abs().max()) > 0.01


def estimates(log_X, runs, seed=0, resample_below=0.5):
    tree, logp_XV, goal, _, _ = known()
    number = {
        ids: x for x, ids in enumerate(p for t in range(tree.depth) for p in map(tuple, tree.prefixes(t).tolist()))
    }
    guide = Guide(from_table(tree, log_X), goal, {END})
    generator = torch.Generator().manual_seed(seed)

    def logp(rows):
        return logp_XV[[number[row.ids] for row in rows]]

    return [
        twisted_smc(logp, guide, (), particles=5, length=4, generator=generator, resample_below=resample_below)
        for _ in range(runs)
    ]


@pytest.mark.parametrize("resample_below", [0.0, 1.1])
def test_the_estimate_is_unbiased_with_a_wrong_twist(resample_below):
    *_, value_X = known()
    wrong_X = torch.randn(len(value_X), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.tensor([p.log_estimate for p in estimates(wrong_X, 1500, resample_below=resample_below)]).exp()
    assert float(found.std()) > 0.01
    assert abs(float(found.mean() - value_X[0])) < 4 * float(found.std()) / 1500**0.5


def test_particles_carry_the_posterior():
    tree, logp_XV, _, there_L, value_X = known()
    leaf = {tuple(x.tolist()): at for at, x in enumerate(torch.split(tree.token_N, tree.length_L.tolist()))}
    mass_L = torch.zeros(tree.leaves, dtype=torch.float64)
    for cloud in estimates(value_X.log(), 800):
        for ids, weight in zip(cloud.ids, cloud.weight_B.tolist(), strict=True):
            mass_L[leaf[ids]] += weight / 800
    assert float(mass_L @ (1 - there_L)) == 0
    assert float((mass_L - posterior(tree, logp_XV, there_L)).abs().max()) < 0.03


def test_no_particle_finds_what_cannot_be_reached():
    logp_XV = known()[1]
    guide = Guide(nothing_known, GoalSet([(7,)]), {END})
    cloud = twisted_smc(
        lambda rows: logp_XV[[0] * len(rows)],
        guide,
        (),
        particles=3,
        length=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert cloud.log_estimate == -math.inf
    assert cloud.weight_B.tolist() == [0, 0, 0]

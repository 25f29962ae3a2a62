"""An update's gradient and metrics are the same however it is cut, ordered, laid out and shared: in every stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from invariance import (
    CUTS,
    FEWER,
    LONE_GROUP,
    PROCESSES,
    WAYS,
    WHOLE,
    Cut,
    distances,
    every_gradient,
    gap,
    measured,
    on_processes,
    two_steps,
    whole,
)
from stage_updates import CASES, Update, gradient, paired, with_reference
from worlds import World, pairs

from rlpost.facts import declare
from rlpost.objectives.preference import aot, bco
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.specs.common import Training
from rlpost.stages.pairwise import PairObjective
from rlpost.train.learner import Learner
from rlpost.usercode.bound import Bound

EXACT = 1e-12
ONE_A_KIND = list({name.split()[0]: name for name in reversed(CASES)}.values())
"""Cases for each kind of stage, its first: what two and six processes find of them. Three find all."""


@pytest.fixture(scope="module")
def gpt2() -> World:
    return World("gpt2", torch.float64)


@pytest.fixture(scope="module")
def llama() -> dict[torch.dtype, World]:
    return {dtype: World("llama", dtype) for dtype in (torch.float64, torch.float32)}


@pytest.fixture(scope="module")
def ranks():
    """What each of 2, 3 and 6 real processes finds."""
    works = {count: partial(every_gradient, list(CASES) if count == 3 else ONE_A_KIND) for count in PROCESSES}
    return {(count, rank): found for count in PROCESSES for rank, found in enumerate(on_processes(count, works[count]))}


def test_every_stage_that_trains_is_here():
    trained = {kind for kind in kinds() if issubclass(spec_of(kind), Training)}
    assert {name.split()[0] for name in CASES} == trained


@pytest.mark.parametrize("name", CASES)
def test_in_float64_to_the_last_digits(name, gpt2, ranks):
    case = CASES[name](gpt2)
    expected, one_pass = measured(case, gpt2, WHOLE)
    assert one_pass == 1
    assert float(expected[0].norm()) > 1e-3
    for cut in CUTS:
        found, passes = measured(case, gpt2, cut)
        assert passes > 1 or cut.at_once not in (1, 3), cut
        assert max(gap(found, expected)) <= EXACT, cut
    for rank, everything in ranks.items():
        assert name in everything or (rank[0] != 3 and name not in ONE_A_KIND)
        assert max(gap(everything.get(name, expected), expected)) <= EXACT, rank


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("count", PROCESSES)
def test_every_case_on_processes(count, gpt2):
    for rank, everything in enumerate(on_processes(count, partial(every_gradient, list(CASES)))):
        for name, case in CASES.items():
            assert max(gap(everything[name], measured(case(gpt2), gpt2, WHOLE)[0])) <= EXACT, (rank, name)


def assert_equal_on_ranks(names, ways, counts):
    """Gradients and the weights after five updates; in float32 a weight without a gradient moves by its rounding."""
    for (name, number), far in distances(names, ways, counts).items():
        gradient, weights = (EXACT, 1e-8) if ways[number].dtype is torch.float64 else (1e-5, 1e-2)
        assert far.gradient <= gradient, (name, ways[number])
        assert far.weights <= weights, (name, ways[number])


def test_five_updates_of_lora_in_float32_on_processes():
    assert_equal_on_ranks(["grpo token_mean"], WAYS[3:], [2])


@pytest.mark.slow  # three minutes
@pytest.mark.timeout(1800)
def test_gradients_and_weights_of_every_stage_full_and_with_lora_on_processes():
    assert_equal_on_ranks(list(CASES), WAYS, [2, 3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_where_norms_and_rotations_are_in_float32(name, dtype, tolerance, llama):
    world = llama[dtype]
    case = CASES[name](world)
    expected = whole(case, world)
    for cut in FEWER:
        found, _ = measured(case, world, cut)
        assert max(gap(found, expected)) <= tolerance, cut


def test_processes_take_the_steps_of_one(gpt2, ranks):
    """AdamW with clipping; in the second step a group has nothing to teach."""
    expected = two_steps(gpt2)
    assert expected[1]["grad_norm/0"] > 0.1, "nothing was clipped"
    for rank, everything in ranks.items():
        assert max(gap(everything["steps"], expected)) <= EXACT, rank


def test_all_processes_take_smaller_passes_where_the_memory_of_one_is_short(gpt2, ranks):
    expected = two_steps(gpt2)
    for rank in range(2):
        assert max(gap(ranks[2, rank]["short"], expected)) <= EXACT, rank


@pytest.mark.parametrize("function", [aot, bco])
def test_a_coupled_loss_that_is_taken_part_by_part_would_be_seen(function, gpt2):
    """Declared as one of single pairs, the loss is taken part by part: its sort, or its mean, is then a part's own."""
    coupled, groups = paired(gpt2, function.__name__), pairs()

    def single(pairs):
        return function(pairs)

    declare(single, couples_pairs=False)
    objective = PairObjective(Bound(single, "single"))

    def prepare(share, learner):
        experience = with_reference(gpt2, [groups[i] for i in share])
        return Update(objective.loss(), objective.prepared(experience, learner))

    apart = replace(coupled, prepare=prepare)
    expected = whole(coupled, gpt2)
    assert gap(whole(apart, gpt2), expected).gradient <= EXACT
    found, _ = measured(apart, gpt2, Cut(3))
    assert gap(found, expected).gradient > 1e-3


def test_leaving_out_completions_of_advantage_zero_changes_nothing(gpt2):
    learner = Learner(gpt2.policy(), learning_rate=1.0)
    update = CASES["grpo token_mean"](gpt2).prepare([0, 1, 2, 3], learner)
    assert update.experience.needed_S.count(False) > 4, "the group without a signal, and what is unscored or empty"
    part, line = gradient(learner, update)
    everything, known = gradient(learner, update._replace(experience=replace(update.experience, needed_S=None)))
    assert float((part - everything).norm() / everything.norm()) <= EXACT
    assert line["loss"] == pytest.approx(known["loss"], rel=EXACT)


def test_nothing_is_proved_of_a_special_case(gpt2):
    """Ratios are clipped on both sides, z is not the constant 0, and some samples have nothing to teach."""

    def metrics(name: str) -> dict[str, float]:
        return whole(CASES[name](gpt2), gpt2)[1]

    line = metrics("grpo token_mean")
    assert min(line["clipped_low"], line["clipped_high"], line["sampler_gap"]) > 0.05
    assert metrics("kto kto")["z"] > 0.05
    assert 0 < metrics("trpo fisher")["divergence"] < 0.1
    assert metrics("grpo correction")["importance"] < 1
    assert metrics("ppo critic")["residual_squared"] > 0.01
    learner = Learner(gpt2.policy(), learning_rate=1.0)
    idle = CASES["grpo token_mean"](gpt2).prepare([LONE_GROUP], learner)
    assert idle.experience.needed_S == (False,) * 4

"""An update's gradient and metrics are the same however it is cut, ordered, laid out and shared: in every stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from invariance import (
    CUTS,
    FEWER,
    LONE_GROUP,
    SHARES,
    WHOLE,
    Cut,
    gap,
    measured,
    on_two_processes,
    shares,
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


@pytest.fixture(scope="module")
def gpt2() -> World:
    return World("gpt2", torch.float64)


@pytest.fixture(scope="module")
def llama() -> dict[torch.dtype, World]:
    return {dtype: World("llama", dtype) for dtype in (torch.float64, torch.float32)}


@pytest.fixture(scope="module")
def ranks():
    """What two real processes find of every case."""
    return on_two_processes(list(CASES))


def test_every_stage_that_trains_is_here():
    trained = {kind for kind in kinds() if issubclass(spec_of(kind), Training)}
    assert {name.split()[0] for name in CASES} == trained


@pytest.mark.parametrize("name", CASES)
def test_in_float64_to_the_last_digits(name, gpt2, ranks):
    case = CASES[name](gpt2)
    everyone = list(range(len(case.groups)))
    expected, one_pass = measured(case, gpt2, WHOLE, everyone, Accelerator())
    assert one_pass == 1
    assert float(expected[0].norm()) > 1e-3
    for cut in CUTS:
        found, passes = measured(case, gpt2, cut, everyone, Accelerator())
        assert passes > 1 or cut.at_once not in (1, 3), cut
        assert max(gap(found, expected)) <= EXACT, cut
    for kind in SHARES:
        for rank, everything in enumerate(ranks):
            assert max(gap(everything[f"{name}/{kind}"], expected)) <= EXACT, (kind, rank)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_where_norms_and_rotations_are_in_float32(name, dtype, tolerance, llama):
    world = llama[dtype]
    case = CASES[name](world)
    expected = whole(case, world, Accelerator())
    for cut in FEWER:
        found, _ = measured(case, world, cut, list(range(len(case.groups))), Accelerator())
        assert max(gap(found, expected)) <= tolerance, cut


@pytest.mark.parametrize("kind", SHARES)
def test_two_processes_take_the_steps_of_one(kind, gpt2, ranks):
    """AdamW with clipping; in the second step the second process has nothing to teach."""
    everyone = list(range(len(gpt2.groups)))
    expected = two_steps(gpt2, everyone, shares(len(everyone), kind)[1], Accelerator())
    assert expected[1]["grad_norm/0"] > 0.1, "nothing was clipped"
    for everything in ranks:
        assert max(gap(everything[f"steps/{kind}"], expected)) <= EXACT


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
    expected = whole(coupled, gpt2, Accelerator())
    assert gap(whole(apart, gpt2, Accelerator()), expected).gradient <= EXACT
    found, _ = measured(apart, gpt2, Cut(3), list(range(len(groups))), Accelerator())
    assert gap(found, expected).gradient > 1e-3


def test_leaving_out_completions_of_advantage_zero_changes_nothing(gpt2):
    learner = Learner(gpt2.policy(), Accelerator(), learning_rate=1.0)
    update = CASES["grpo token_mean"](gpt2).prepare([0, 1, 2, 3], learner)
    assert update.experience.needed_S.count(False) > 4, "the group without a signal, and what is unscored or empty"
    part, line = gradient(learner, update)
    everything, known = gradient(learner, update._replace(experience=replace(update.experience, needed_S=None)))
    assert float((part - everything).norm() / everything.norm()) <= EXACT
    assert line["loss"] == pytest.approx(known["loss"], rel=EXACT)


def test_nothing_is_proved_of_a_special_case(gpt2):
    """Ratios are clipped on both sides, z is not the constant 0, and some samples have nothing to teach."""

    def metrics(name: str) -> dict[str, float]:
        return whole(CASES[name](gpt2), gpt2, Accelerator())[1]

    line = metrics("grpo token_mean")
    assert min(line["clipped_low"], line["clipped_high"], line["sampler_gap"]) > 0.05
    assert metrics("kto kto")["z"] > 0.05
    assert 0 < metrics("trpo fisher")["divergence"] < 0.1
    assert metrics("grpo correction")["importance"] < 1
    assert metrics("ppo critic")["residual_squared"] > 0.01
    learner = Learner(gpt2.policy(), Accelerator(), learning_rate=1.0)
    idle = CASES["grpo token_mean"](gpt2).prepare([LONE_GROUP], learner)
    assert idle.experience.needed_S == (False,) * 4

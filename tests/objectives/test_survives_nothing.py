"""Every function of completions survives those without actions, and computes in at least float32."""

import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch
from torch import Tensor

from rlpost import objectives
from rlpost.objectives import baselines, credit, kl, preference, surrogates, turns, weights
from rlpost.objectives.correction import correction, off_policy_ratio
from rlpost.objectives.distillation import divergence_to_go
from rlpost.objectives.preference_modifiers import length_multipliers
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.values import bellman_residual


def by_step(rows: Ragged) -> credit.Steps:
    """Steps of two actions, and of one where a completion has an odd number."""
    places_N = torch.arange(rows.actions) - rows.spread(rows.start_S)
    return credit.Steps(rows, places_N % 2 == 1)


def each_step(x_N: Tensor, rows: Ragged) -> Tensor:
    return x_N[by_step(rows).last_K]


SURROGATES = {
    getattr(f, "func", f).__name__: lambda x, rows, f=f, **settings: f(
        x, (2 * x).detach(), (2 * x + 1).detach(), rows, **settings
    )
    for f in (
        surrogates.policy_gradient,
        surrogates.clipped_surrogate,
        surrogates.clipped_weight,
        surrogates.sequence_clipped,
        surrogates.geometric_mean,
        surrogates.soft_adaptive,
        surrogates.divergence_masked,
        surrogates.sequence_soft,
        surrogates.tapered,
        surrogates.future_weighted,
        surrogates.target_policy,
        partial(surrogates.squared_log_ratio, tau=0.5),
        partial(surrogates.advantage_regression, beta=0.5),
    )
}
"""How each is called on one tensor of all actions and the rows; the result is of all actions. What is made of the
tensor for it is exact in half precision too, so that the functions' own rounding can be seen."""
CLIPPED_TWICE = {
    "clipped_surrogate": partial(SURROGATES["clipped_surrogate"], dual=1.7, delta=9.0, off_policy_limit=0.5),
    "divergence_masked": partial(SURROGATES["divergence_masked"], divergence="kl"),
}
CREDIT = {
    "reward_on_last_action": lambda x, rows: credit.reward_on_last_action(rows.sum(x).to(x.dtype), rows),
    "return_to_go": lambda x, rows: credit.return_to_go(x, rows, gamma=0.9),
    "gae": lambda x, rows: credit.gae(x, x / 2, rows, bootstrap_S=rows.sum(x))[0],
    "potential_shaping": lambda x, rows: credit.potential_shaping(x, rows, gamma=0.9),
    "spread_evenly": lambda x, rows: credit.spread_evenly(each_step(x, rows), by_step(rows)),
    "on_last": lambda x, rows: credit.on_last(each_step(x, rows), by_step(rows)),
    "least": lambda x, rows: credit.least(each_step(x, rows), by_step(rows)),
    "process": lambda x, rows: credit.process(each_step(x, rows), by_step(rows)),
    "process_normalised": lambda x, rows: credit.process_normalised(
        each_step(x, rows), by_step(rows), max(rows.completions, 1)
    ),
    "monte_carlo_values": lambda x, rows: credit.monte_carlo_values(each_step(x, rows), rows.sum(x), by_step(rows)),
    "turn_gae": lambda x, rows: turns.turn_gae(
        each_step(x, rows), each_step(x, rows) / 2, by_step(rows), bootstrap_S=rows.sum(x)
    )[0],
    "turn_leave_one_out": lambda x, rows: turns.turn_leave_one_out(
        each_step(x, rows), by_step(rows), max(rows.completions, 1), gamma=0.9
    ),
    "turn_normalised": lambda x, rows: turns.turn_normalised(
        each_step(x, rows), by_step(rows), max(rows.completions, 1)
    ),
    "gigpo": lambda x, rows: turns.gigpo(
        each_step(x, rows), by_step(rows), by_step(rows).last_K % 2, max(rows.completions, 1)
    ),
}
OTHERS = {
    "optimal_token_baseline": lambda x, rows: baselines.optimal_token_baseline(
        rows.sum(x).to(x.dtype).view(min(rows.completions, 1), -1 if rows.completions else 1), x, 2 * x, rows
    ),
    "kl_in_reward": lambda x, rows: kl.kl_in_reward(x, 2 * x, rows, max(rows.completions, 1)),
    "divergence_to_go": lambda x, rows: divergence_to_go(x, rows, max(rows.completions, 1)),
    "correction": lambda x, rows: correction(x, 2 * x, rows, per="completion"),
    "bellman_residual": lambda x, rows: bellman_residual(x, (x < -0.6).to(x.dtype), rows),
    "off_policy_ratio": lambda x, rows: off_policy_ratio(x, (2 * x).detach(), rows),
}
OF_TENSORS = {**SURROGATES, **CLIPPED_TWICE, **CREDIT, **OTHERS}
OF_ROWS = {
    "token_mean": weights.token_mean,
    "part_mean": lambda rows: weights.part_mean(rows, 0, 1),
    "sequence_mean": weights.sequence_mean,
    "sequence_sum": weights.sequence_sum,
    "constant_length": lambda rows: weights.constant_length(rows, 9),
    "weigh": lambda rows: weights.weigh("sequence_mean", rows, rows.actions, rows.learned, 9),
    "beyond_shorter": preference.beyond_shorter,
    "length_multipliers": lambda rows: length_multipliers(rows, 0.5),
}
"""Those that take rows alone."""

NUMBERS = [-1.0, -0.25, -2.0, -0.5, -0.75]
tensors = pytest.mark.parametrize("call", OF_TENSORS.values(), ids=OF_TENSORS)


def test_no_function_of_rows_is_left_out():
    found = set()
    for module in pkgutil.iter_modules(objectives.__path__):
        members = vars(importlib.import_module(f"rlpost.objectives.{module.name}"))
        for name, f in members.items():
            if inspect.isfunction(f) and not name.startswith("_"):
                takes = {p.annotation for p in inspect.signature(f).parameters.values()}
                found |= {f.__name__} if takes & {"Ragged", "Steps"} else set()
    assert found == {*OF_TENSORS, *OF_ROWS, "pairs_of"}


@tensors
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_completions_without_any_actions(call, lengths):
    x = torch.zeros(0, requires_grad=True)
    result = call(x, Ragged(lengths))
    assert result.shape == (0,)
    assert result.sum().item() == 0.0
    if result.requires_grad:
        result.sum().backward()
        assert x.grad.shape == (0,)


@tensors
def test_completions_without_actions_change_nothing_for_the_others(call):
    def result_and_gradient(lengths):
        x = torch.tensor(NUMBERS, dtype=torch.float64, requires_grad=True)
        result = call(x, Ragged(lengths))
        if not result.requires_grad:
            return result, torch.zeros(5)
        return result, torch.autograd.grad(result.square().sum(), x)[0]

    for found, expected in zip(result_and_gradient([0, 2, 0, 0, 3, 0]), result_and_gradient([2, 3]), strict=True):
        assert found.isfinite().all()
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@tensors
def test_half_precision_is_widened_before_anything_is_computed(call):
    rows = Ragged([2, 0, 3])
    exact = torch.tensor(NUMBERS, dtype=torch.float64)
    assert call(exact, rows).dtype == torch.float64
    assert call(exact.float(), rows).dtype == torch.float32
    # The numbers are exact in bfloat16: whatever is rounded to it on the way would show.
    narrow = call(exact.bfloat16(), rows)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, call(exact.float(), rows))


@pytest.mark.parametrize("weight", OF_ROWS.values(), ids=OF_ROWS)
def test_what_needs_no_tensor_survives_too(weight):
    for lengths in ([], [0, 0]):
        assert weight(Ragged(lengths)).shape == (0,)
    x = weight(Ragged([2, 0, 0, 3, 0, 0])).double()
    assert x.shape == (5,)
    assert ((x > 0) & (x <= 1)).all()


def test_beside_an_empty_completion_every_action_is_beyond_the_shorter_one():
    assert preference.beyond_shorter(Ragged([2, 0, 0, 1])).tolist() == [True] * 3
    assert length_multipliers(Ragged([2, 0, 0, 1]), 0.5).tolist() == [0.5] * 3


def test_pairs_without_actions():
    logp, reference = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -1.0])
    pairs = preference.pairs_of(logp, reference, Ragged([2, 0, 0, 0]))
    assert pairs.delta_P2.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert pairs.mean_delta_P2.tolist() == [[0.5, 0.0], [0.0, 0.0]]
    pairs.mean_delta_P2.sum().backward()
    assert logp.grad.tolist() == [0.5, 0.5]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert preference.pairs_of(logp.to(dtype), reference.to(dtype), Ragged([2, 0])).table_PC.dtype == wide

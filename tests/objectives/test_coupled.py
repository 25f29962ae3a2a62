"""Losses that see a whole update at once keep their gradient however the update is cut."""

import math

import pytest
import torch

from rlpost.facts import fact
from rlpost.objectives import PairBatch, Ragged
from rlpost.objectives.coupled import linearised
from rlpost.objectives.preference import aot, aot_unpaired, bco, dpo, pairs_of
from rlpost.objectives.preference_modifiers import confidence, f_divergence, length_desensitised

LENGTHS = [3, 1, 2, 2, 0, 4, 5, 3, 1, 2]
ROWS = Ragged(LENGTHS)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    # Close references, so that the policy's ranks are others.
    logp, reference = -torch.rand(2, sum(LENGTHS), dtype=torch.float64) * torch.tensor([[3.0], [0.3]])
    return logp.requires_grad_(True), reference


def parts():
    """(its actions, its rows) of every pair alone."""
    ends = [sum(LENGTHS[: 2 * (p + 1)]) for p in range(5)]
    return [
        (slice(end - sum(LENGTHS[2 * p : 2 * p + 2]), end), Ragged(LENGTHS[2 * p : 2 * p + 2]))
        for p, end in enumerate(ends)
    ]


def test_the_slope_of_a_known_function():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value, slope = linearised(lambda y: (y**2).sum() + y[0, 0] * y[1, 1], x)
    assert value.item() == 34
    assert slope.tolist() == [[6.0, 4.0], [6.0, 9.0]]
    assert not value.requires_grad
    assert not slope.requires_grad
    assert x.grad is None
    with torch.no_grad():  # a first pass is without gradient
        assert linearised(lambda y: y.sum(), x)[1].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_aot_cut_in_two_is_another_loss():
    # Whole, Δ_w = 2, −2 meets Δ_l = 1, −3 as 2 − 1 and −2 + 3; cut, 2 + 3 and −2 − 1.
    pairs = PairBatch(
        torch.tensor([[2.0, -3.0], [-2.0, 1.0]], dtype=torch.float64), torch.zeros(2, 2), torch.ones(2, 2)
    )
    whole = aot_unpaired(pairs, beta=1.0).mean().item()
    cut = [
        aot_unpaired(PairBatch(pairs.logp_P2[p], torch.zeros(1, 2), torch.ones(1, 2)), beta=1.0).item()
        for p in ([0], [1])
    ]
    assert whole == pytest.approx(-math.log(sigmoid(1.0)))
    assert sum(cut) / 2 == pytest.approx(-(math.log(sigmoid(5.0)) + math.log(sigmoid(-3.0))) / 2)
    assert sum(cut) / 2 > 4 * whole


@pytest.mark.parametrize("loss", [aot, aot_unpaired, bco])
@pytest.mark.parametrize(
    "modifiers", [(), (f_divergence,), (length_desensitised, f_divergence, confidence)], ids=["plain", "one", "three"]
)
def test_the_second_pass_at_one_pair_a_part_has_the_gradient_of_the_whole(loss, modifiers):
    logp, reference = numbers()

    def mean_loss(pairs: PairBatch) -> torch.Tensor:
        for modify in modifiers:
            pairs = modify(pairs, kind="jensen_shannon") if modify is f_divergence else modify(pairs)
        loss_P = loss(pairs, beta=0.5)
        return (loss_P if pairs.weight_P is None else loss_P * pairs.weight_P).mean()

    value = mean_loss(pairs_of(logp, reference, ROWS))
    (whole,) = torch.autograd.grad(value, logp)
    table_PC = torch.cat([pairs_of(logp[at].detach(), reference[at], rows).table_PC for at, rows in parts()])
    said, slope_PC = linearised(lambda table: mean_loss(PairBatch.from_table(table)), table_PC)
    assert said.item() == pytest.approx(value.item(), abs=1e-14)
    followed, naive = torch.zeros_like(whole), torch.zeros_like(whole)
    for p, (at, rows) in enumerate(parts()):
        pairs = pairs_of(logp[at], reference[at], rows)
        followed += torch.autograd.grad((slope_PC[p] * pairs.table_PC[0]).sum(), logp)[0]
        naive += torch.autograd.grad(mean_loss(pairs_of(logp[at], reference[at], rows)) / 5, logp)[0]
    assert (followed - whole).norm() / whole.norm() < 1e-12
    assert (naive - whole).norm() / whole.norm() > 1e-3


def test_the_names_are_those_of_losses_whose_elements_depend_on_other_pairs():
    logp, reference = numbers()
    pairs, less = pairs_of(logp, reference, ROWS), pairs_of(logp[:8], reference[:8], Ragged(LENGTHS[:4]))
    for loss in (aot, aot_unpaired, bco, dpo):
        alone = torch.allclose(loss(pairs)[:2], loss(less), rtol=0, atol=1e-12)
        assert alone == (not fact(loss, "couples_pairs")), loss
    assert torch.allclose(bco(pairs, delta=0.1)[:2], bco(less, delta=0.1), rtol=0, atol=1e-12)

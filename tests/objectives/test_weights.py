"""Weights: who counts how much in an update, and that cutting an update changes nothing."""

from itertools import pairwise

import pytest
import torch

from rlpost.objectives import (
    Ragged,
    constant_length,
    nll,
    pair_mean,
    part_mean,
    policy_gradient,
    sequence_mean,
    sequence_sum,
    token_mean,
    weigh,
)


def test_weights_by_hand():
    rows = Ragged([1, 0, 3])
    assert token_mean(rows).tolist() == [0.25] * 4
    assert sequence_mean(rows).tolist() == [0.5, 1 / 6, 1 / 6, 1 / 6]  # the empty completion is not counted
    assert sequence_sum(rows).tolist() == [0.5] * 4
    assert constant_length(rows, 10).tolist() == pytest.approx([0.05] * 4)
    assert pair_mean(4).tolist() == [0.25] * 4


def test_a_part_of_every_group_is_weighed_by_its_own_actions():
    rows = Ragged([2, 1, 3, 1, 0, 1])
    assert part_mean(rows, 2, 3).tolist() == [0, 0, 0, 0.25, 0.25, 0.25, 0, 0.25]
    assert part_mean(rows, 0, 2).tolist() == [0.2, 0.2, 0, 0.2, 0.2, 0.2, 0, 0]
    assert part_mean(Ragged([2, 0, 3, 0]), 1, 2).tolist() == [0.0] * 5
    for part, of in ((3, 3), (-1, 3), (0, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"place {part} in groups of {of} of 6 completions"):
            part_mean(rows, part, of)


def test_counts_of_the_whole_update_replace_those_of_a_part():
    rows = Ragged([1, 3])
    assert token_mean(rows, 8).tolist() == [1 / 8] * 4
    assert sequence_mean(rows, 4).tolist() == [0.25, 1 / 12, 1 / 12, 1 / 12]
    assert sequence_sum(rows, 4).tolist() == [0.25] * 4
    assert constant_length(rows, 2, 4).tolist() == [1 / 8] * 4
    assert pair_mean(2, 8).tolist() == [1 / 8] * 2


def test_weights_by_name_are_given_the_counts_they_ask_for():
    rows, counts = Ragged([1, 0, 3]), {"actions": 40, "completions": 5, "length": 8}
    assert weigh("token_mean", rows, **counts).tolist() == [1 / 40] * 4
    assert weigh("sequence_mean", rows, **counts).tolist() == pytest.approx([1 / 5, 1 / 15, 1 / 15, 1 / 15])
    assert weigh("sequence_sum", rows, **counts).tolist() == [1 / 5] * 4
    assert weigh("constant_length", rows, **counts).tolist() == [1 / 40] * 4
    with pytest.raises(ValueError, match="no weight 'mean'"):
        weigh("mean", rows, **counts)


def test_means_add_up_to_one_and_are_float64():
    rows = Ragged([3, 7, 0, 1])
    for weight in (token_mean(rows), sequence_mean(rows), pair_mean(3)):
        assert weight.sum().item() == pytest.approx(1.0, abs=1e-15)
        assert weight.dtype == torch.float64


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_an_update_without_actions_has_no_weight_and_no_nan(lengths):
    rows = Ragged(lengths)
    for weight in (token_mean(rows), sequence_mean(rows), sequence_sum(rows), constant_length(rows, 5)):
        assert weight.shape == (0,)
    assert pair_mean(0).shape == (0,)


def test_constant_length_refuses_nothing_to_divide_by():
    with pytest.raises(ValueError, match="positive"):
        constant_length(Ragged([1]), 0)


def test_a_mean_of_part_means_is_another_objective():
    """Lengths (100, 100) with A = +1 and (4, 4) with A = -1: the token mean of the loss is -192/208, of parts 0."""
    lengths, advantage_S = [100, 100, 4, 4], torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    whole, first, second = Ragged(lengths), Ragged(lengths[:2]), Ragged(lengths[2:])

    def loss(rows, advantage, total):
        logp = torch.full((rows.actions,), 1.0, dtype=torch.float64)
        per_action = policy_gradient(logp, logp, rows.spread(advantage), rows)
        return (per_action * token_mean(rows, total)).sum().item()

    expected = loss(whole, advantage_S, None)
    assert -expected == pytest.approx(192 / 208)  # 0.923
    parts = loss(first, advantage_S[:2], 208) + loss(second, advantage_S[2:], 208)
    assert parts == pytest.approx(expected, abs=1e-15)
    mean_of_means = (loss(first, advantage_S[:2], None) + loss(second, advantage_S[2:], None)) / 2
    assert mean_of_means == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum", "constant_length"])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2], [3, 5], [0, 6]])
def test_the_gradient_does_not_depend_on_how_an_update_is_cut(name, cuts):
    lengths = [5, 0, 2, 9, 1, 3]
    torch.manual_seed(0)
    table = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    state = torch.randint(0, 20, (sum(lengths),))

    def weight(rows):
        if name == "token_mean":
            return token_mean(rows, sum(lengths))
        if name == "constant_length":
            return constant_length(rows, 9, 5)
        return {"sequence_mean": sequence_mean, "sequence_sum": sequence_sum}[name](rows, 5)

    def gradient(edges):
        total = torch.zeros_like(table)
        for a, b in pairwise(edges):
            rows, first = Ragged(lengths[a:b]), sum(lengths[:a])
            logp = table[state[first : first + rows.actions]].log_softmax(-1)[:, 0]
            total += torch.autograd.grad((nll(logp) * weight(rows)).sum(), table, allow_unused=True)[0]
        return total

    whole, parts = gradient([0, 6]), gradient([0, *cuts, 6])
    assert (parts - whole).norm() <= 1e-12 * whole.norm()
    assert whole.norm() > 0

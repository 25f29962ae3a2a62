"""The trust-region step on small systems with known solutions."""

import math

import pytest
import torch

from rlpost.objectives.trust_region import conjugate_gradient, finite_difference, line_search, step_length


def system(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric positive definite matrix and a right-hand side."""
    torch.manual_seed(0)
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + torch.eye(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)


def test_conjugate_gradients_solve_by_hand():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    x = conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert x.tolist() == pytest.approx([1 / 11, 7 / 11], abs=1e-14)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_parameters():
    matrix, g = system(8)
    exact = torch.linalg.solve(matrix, g)
    x = conjugate_gradient(lambda v: matrix @ v, g, iterations=8, tolerance=0.0)
    assert (x - exact).norm() < 1e-9 * exact.norm()
    early = conjugate_gradient(lambda v: matrix @ v, g, iterations=3)
    assert 1e-3 < (early - exact).norm() / exact.norm() < 1


def test_conjugate_gradients_stop_at_the_tolerance():
    products = []

    def product(v):
        products.append(v)
        return 2 * v

    assert conjugate_gradient(product, torch.ones(3)).tolist() == [0.5] * 3
    assert len(products) == 1  # one step solves it: no others are taken


def test_no_gradient_no_step():
    assert conjugate_gradient(lambda v: v / 0, torch.zeros(3)).tolist() == [0.0] * 3


def test_curvature_that_rounding_has_taken_away_ends_the_search():
    assert conjugate_gradient(lambda v: -v, torch.ones(2)).tolist() == [0.0, 0.0]
    # One good direction, then none: what was found so far is kept.
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    x = conjugate_gradient(lambda v: matrix @ v, torch.tensor([2.0, 1.0], dtype=torch.float64), iterations=5)
    assert x.isfinite().all()
    assert x.tolist() == pytest.approx([10 / 3, 5 / 3])


def test_a_step_reaches_the_edge_of_the_region():
    matrix, g = system(5)
    x = torch.linalg.solve(matrix, g)
    d = x * step_length(x, matrix @ x, 0.01)
    assert (0.5 * d @ matrix @ d).item() == pytest.approx(0.01)
    # No other step within the region gains as much.
    for _ in range(20):
        other = torch.randn(5, dtype=torch.float64)
        other *= math.sqrt(0.02 / (other @ matrix @ other))
        assert g @ other < g @ d


def test_no_curvature_no_step():
    ones = torch.ones(2)
    assert step_length(ones, torch.zeros(2), 0.01) == 0.0
    assert step_length(ones, -ones, 0.01) == 0.0


def test_a_finite_difference_of_a_quadratics_gradient_is_its_matrix():
    matrix, v = system(6)
    found = finite_difference(lambda offset: matrix @ offset, v)
    assert (found - matrix @ v).norm() < 1e-9 * v.norm()
    single = finite_difference(lambda offset: matrix.float() @ offset, v.float())
    assert single.dtype == torch.float32
    assert (single - (matrix @ v).float()).norm() < 1e-4 * v.norm()


def test_its_offset_has_the_given_length_and_even_powers_cancel():
    lengths = []

    def gradient(offset):  # of ½·|x|² + Σx³/3: the square would show in a one-sided difference
        lengths.append(offset.norm().item())
        return offset + offset.square()

    v = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert finite_difference(gradient, v, epsilon=0.1).tolist() == pytest.approx([3.0, -4.0], abs=1e-14)
    assert lengths == pytest.approx([0.1, 0.1])


def test_nothing_times_a_matrix_is_nothing():
    assert finite_difference(lambda offset: offset / 0, torch.zeros(2)).tolist() == [0.0, 0.0]


def test_a_step_inside_the_region_that_improves_is_taken_whole():
    assert line_search(lambda share: (share, 0.005), 0.01) == (1.0, 1.0, 0.005)


def test_a_step_is_shortened_until_it_is_inside_and_improves():
    # KL 0.08·share² is inside from ¼ on; the improvement share·(0.2 − share) positive from ⅛ on.
    assert line_search(lambda share: (share, 0.08 * share**2), 0.01) == (0.25, 0.25, pytest.approx(0.005))
    found = line_search(lambda share: (share * (0.2 - share), 0.08 * share**2), 0.01)
    assert found == pytest.approx((0.125, 0.125 * 0.075, 0.00125))
    assert line_search(lambda share: (1.0, share), 0.1, shrink=0.1) == pytest.approx((0.1, 1.0, 0.1))


@pytest.mark.parametrize("measured", [(-1.0, 0.0), (0.0, 0.0), (1.0, 9.0), (math.nan, 0.0), (1.0, math.nan)])
def test_a_step_that_never_serves_is_refused(measured):
    tried = []

    def measure(share):
        tried.append(share)
        return measured

    assert line_search(measure, 0.01, steps=3) == (0.0, 0.0, 0.0)
    assert tried == [1.0, 0.5, 0.25, 0.125]

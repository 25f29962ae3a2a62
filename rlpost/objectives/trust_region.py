"""The mathematics of a trust-region step (TRPO, Schulman et al. 2015, arXiv:1502.05477, appendix C).

Maximise gᵀd subject to ½·dᵀFd ≤ δ: d ∝ F⁻¹g, found by conjugate gradients from products with F alone, scaled to
the region's edge, and shortened until the measured KL is inside and the surrogate has improved.

Axes: M trained parameters as one vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dot = Callable[[Tensor, Tensor], Tensor]
"""The product of two [M]; over all ranks, where each has a part of them."""


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    g: Tensor,
    *,
    iterations: int = 10,
    tolerance: float = 1e-10,
    dot: Dot | None = None,
) -> Tensor:
    """[M] x with product(x) ≈ g, after at most `iterations` steps (Hestenes & Stiefel 1952).

    Put damping into `product`; it makes the system well-conditioned.

    Args:
        product: [M] -> [M], symmetric and positive.
        g: the right-hand side.
        iterations: most products.
        tolerance: of |residual|²/|g|².
        dot: the product of two vectors, where ranks have parts of them.
    """
    dot = dot or torch.dot
    x, residual = torch.zeros_like(g), g.clone()
    direction = residual.clone()
    size = dot(residual, residual)
    enough = tolerance * size
    for _ in range(iterations):
        if size <= enough:
            break
        image = product(direction)
        along = dot(direction, image)
        if along <= 0:  # rounding has made the curvature non-positive: stop with the current solution
            break
        step = size / along
        x = x + step * direction
        residual = residual - step * image
        new = dot(residual, residual)
        direction = residual + (new / size) * direction
        size = new
    return x


def step_length(x: Tensor, image: Tensor, delta: float, dot: Dot | None = None) -> float:
    """√(2δ/xᵀFx), the factor that takes x to the edge of the region; 0 where xᵀFx is not positive.

    `image` is F·x without damping: with damping inside, the step is shorter than the region allows.
    """
    curvature = float((dot or torch.dot)(x, image))
    return float((2 * delta / curvature) ** 0.5) if curvature > 0 else 0.0


def finite_difference(
    gradient: Callable[[Tensor], Tensor], v: Tensor, *, epsilon: float | None = None, dot: Dot | None = None
) -> Tensor:
    """[M] F·v as (∇KL(θ + εv̂) − ∇KL(θ − εv̂))·|v|/2ε, where F is the Hessian of KL(old || new) at θ.

    Nothing is differentiated twice, so any attention kernel works.

    Args:
        gradient: offset from θ -> gradient of the KL there.
        v: what F is multiplied with.
        epsilon: length of the offset; by default the cube root of the dtype's precision, which balances rounding
            against curvature.
        dot: the product of two vectors, where ranks have parts of them.
    """
    length = v.norm() if dot is None else dot(v, v).sqrt()
    if length == 0:
        return torch.zeros_like(v)
    epsilon = torch.finfo(v.dtype).eps ** (1 / 3) if epsilon is None else epsilon
    offset = v * (epsilon / length)
    product: Tensor = (gradient(offset) - gradient(-offset)) * (length / (2 * epsilon))
    return product


def line_search(
    measure: Callable[[float], tuple[float, float]], delta: float, *, shrink: float = 0.5, steps: int = 10
) -> tuple[float, float, float]:
    """(share, improvement, KL) of the first share in 1, ½, ¼, … with KL ≤ δ and an improvement; 0 if there is none.

    Args:
        measure: share of the full step -> (the surrogate's improvement, the measured KL).
        delta: radius of the region.
        shrink: factor from one try to the next.
        steps: tries after the first.
    """
    share = 1.0
    for _ in range(steps + 1):
        improvement, kl = measure(share)
        if kl <= delta and improvement > 0:
            return share, improvement, kl
        share *= shrink
    return 0.0, 0.0, 0.0

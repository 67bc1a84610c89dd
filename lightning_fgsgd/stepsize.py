"""The step size of FG-SGD: how far a group moves, given the norm of its gradient and the curvature of its POM."""

from __future__ import annotations

from torch import Tensor

__all__ = ["step_normalizer"]


def step_normalizer(grad_norm: Tensor, rho: Tensor | float, curvature: Tensor | float) -> Tensor:
    """𝔤 of Eq. 5, by which the learning rate of a group is divided (Eq. 3).

        𝔤 = sqrt(max{1, R_g² Γ₂}),  Γ₂ = max{(2ρ + R_g)², 1 + c (ρ + R_g)}

    With ρ = 1 and c = 1, spheres, this is Eq. 7: the first term of the maximum is then always the larger.

    Args:
        grad_norm: R_g, the norm of the group's Riemannian gradient (Theorem 1), any shape.
        rho: ρ, geodesic distance to a minimum: unknown in practice, a parameter or an estimate; broadcast like the next.
        curvature: c, upper bound of the POM's sectional curvature; broadcast against ``grad_norm``.
    """
    gamma2 = ((2 * rho + grad_norm) ** 2).maximum(1 + curvature * (rho + grad_norm))
    return (grad_norm**2 * gamma2).clamp_min(1.0).sqrt()

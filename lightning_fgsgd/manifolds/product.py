"""Products of manifolds: what a group of components lives on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fgsgd.manifolds.base import Manifold

__all__ = ["Product"]


class Product:
    """The Cartesian product of manifolds, with the product metric (Remark 2 of the paper): a POM.

    A point, and a tangent vector, is a sequence of matrices (..., n, p), one for each factor. The optimizer computes the
    same for all groups of a layer at once; this is the definition that it is tested against.

    Args:
        factors: the component manifolds.

    Raises:
        ValueError: no factor.
    """

    def __init__(self, factors: Sequence[Manifold]) -> None:
        if not factors:
            raise ValueError("factors: a product needs at least one manifold")
        self.factors = tuple(factors)

    @property
    def curvature(self) -> tuple[float, float]:
        """Bounds of the sectional curvature.

        Planes that are spanned by two factors are flat, so 0 lies between the bounds of a product of several. The paper's
        lower bound of 0 holds where no factor is Stiefel, whose own is −1/2; Eq. 5 needs the upper bound only.
        """
        bounds = [m.curvature for m in self.factors] + ([(0.0, 0.0)] if len(self.factors) > 1 else [])
        return min(lower for lower, _ in bounds), max(upper for _, upper in bounds)

    def dim(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Dimension: the sum of the factors'. ``shapes``: n and p of each."""
        return sum(m.dim(n, p) for m, (n, p) in zip(self.factors, shapes, strict=True))

    def tangent(self, q: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
        """Tangent projection, factor by factor (Remark 2; line 5 of Algorithm 1)."""
        return [m.tangent(x, y) for m, x, y in zip(self.factors, q, g, strict=True)]

    def retract(self, q: Sequence[Tensor], h: Sequence[Tensor]) -> list[Tensor]:
        """Retraction, factor by factor (lines 7 and 8)."""
        return [m.retract(x, y) for m, x, y in zip(self.factors, q, h, strict=True)]

    def exp(self, q: Sequence[Tensor], h: Sequence[Tensor]) -> list[Tensor]:
        """Exponential map: a geodesic of a product is one in every factor."""
        return [m.exp(x, y) for m, x, y in zip(self.factors, q, h, strict=True)]

    def transport(self, q_new: Sequence[Tensor], h: Sequence[Tensor]) -> list[Tensor]:
        """Transport by projection, factor by factor."""
        return [m.transport(x, y) for m, x, y in zip(self.factors, q_new, h, strict=True)]

    def project(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Nearest point, factor by factor."""
        return [m.project(x) for m, x in zip(self.factors, v, strict=True)]

    def inner(self, u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """Inner product: the sum of the factors'."""
        return torch.stack([m.inner(x, y) for m, x, y in zip(self.factors, u, v, strict=True)]).sum(0)

    def norm(self, u: Sequence[Tensor]) -> Tensor:
        """Norm of a tangent vector: the root of the sum of the factors' squared norms (Theorem 1, Eq. 6)."""
        return torch.stack([m.norm(x) for m, x in zip(self.factors, u, strict=True)]).square().sum(0).sqrt()

    def dist(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Geodesic distance: the root of the sum of the factors' squared distances."""
        parts = [m.dist(x, y) for m, x, y in zip(self.factors, a, b, strict=True)]
        return torch.stack(parts).square().sum(0).sqrt()

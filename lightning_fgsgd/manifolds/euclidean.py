"""All matrices: no constraint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.manifolds.base import Manifold
from lightning_fgsgd.matrices import multiple

__all__ = ["Euclidean"]


class Euclidean(Manifold):
    """All n x p matrices: no constraint, and nothing to scale."""

    name = "euclidean"
    curvature = (0.0, 0.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return n * p

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        return v

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return g

    def normal(self, gram: Any) -> Any:  # noqa: D102
        return multiple(gram.new_zeros(()).expand(*gram.shape[:-2], 1, 1) if isinstance(gram, Tensor) else 0.0, gram)

    def inverse_root(self, gram: Any) -> Any:  # noqa: D102
        return multiple(gram.new_ones(()).expand(*gram.shape[:-2], 1, 1) if isinstance(gram, Tensor) else 1.0, gram)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        return q + h

    def exp(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        return q + h

    def dist(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return self.norm(a - b)

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_zeros(*omega.shape[:-2], 1)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_ones(*omega.shape[:-2], 1, 1)

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(s)[..., 0]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.new_ones(())

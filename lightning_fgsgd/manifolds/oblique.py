"""The oblique manifold: matrices with columns of norm 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.manifolds.base import Manifold, angle, divide, inverse_length, norm, sinc, unit, wide_dtype
from lightning_fgsgd.matrices import diagonal

__all__ = ["Oblique"]


class Oblique(Manifold):
    """Matrices whose p columns all have norm 1: the diagonal of qᵀq is 1. A product of p spheres."""

    name = "oblique"
    curvature = (0.0, 1.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return (n - 1) * p

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        frame = torch.eye(v.shape[-2], v.shape[-1], dtype=v.dtype, device=v.device)
        zero = (v == 0).all(-2, keepdim=True)
        return torch.where(zero, frame, unit(v, (-2,)))

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return g - q * (q * g).sum(-2, keepdim=True)

    def normal(self, gram: Any) -> Any:  # noqa: D102
        return diagonal(gram)

    def inverse_root(self, gram: Any) -> Any:  # noqa: D102
        return diagonal(gram, inverse_length)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        v = q + h
        # In double precision, so that the squares of a long step do not overflow.
        return divide(v, torch.linalg.vector_norm(v, dim=-2, keepdim=True, dtype=wide_dtype(v)).to(v.dtype))

    def exp(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        t = norm(h, (-2,))
        return torch.cos(t) * q + sinc(t) * h

    def dist(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return angle(a, b, (-2,)).square().sum((-2, -1)).sqrt()

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.square().sum(-2)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return norm(omega, (-2,))

    def unit_scale(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_ones(()).expand(*omega.shape[:-2], 1, omega.shape[-1])

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square()[..., 0, :]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().mean()

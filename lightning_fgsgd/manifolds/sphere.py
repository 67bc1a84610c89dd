"""The sphere: matrices of Frobenius norm 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.manifolds.base import Manifold, angle, divide, inverse_length, norm, sinc, unit, wide_dtype
from lightning_fgsgd.matrices import multiple, trace

__all__ = ["Sphere"]


class Sphere(Manifold):
    """Matrices with ‖q‖_F = 1: the trace of qᵀq is 1."""

    name = "sphere"
    curvature = (0.0, 1.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return n * p - 1

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        frame = torch.eye(v.shape[-2], v.shape[-1], dtype=v.dtype, device=v.device) / v.shape[-1] ** 0.5
        zero = (v == 0).all(-2, keepdim=True).all(-1, keepdim=True)
        return torch.where(zero, frame, unit(v, (-2, -1)))

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return g - q * (q * g).sum((-2, -1), keepdim=True)

    def normal(self, gram: Any) -> Any:  # noqa: D102
        return multiple(trace(gram), gram)

    def inverse_root(self, gram: Any) -> Any:  # noqa: D102
        return multiple(inverse_length(trace(gram)), gram)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        v = q + h
        # In double precision, so that the squares of a long step do not overflow.
        return divide(v, torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True, dtype=wide_dtype(v)).to(v.dtype))

    def exp(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        t = norm(h, (-2, -1))
        return torch.cos(t) * q + sinc(t) * h

    def dist(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return angle(a, b, (-2, -1))[..., 0, 0]

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.square().sum((-2, -1))[..., None]

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return norm(omega, (-2, -1))

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square()[..., 0]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().mean()

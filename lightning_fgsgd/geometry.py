"""The geometry of some components of a weight at once, on whichever manifold each of them lives: what a step needs of it.

A component is ω = R · q · U, with q on a unit manifold and U an upper triangular factor of the Gram information that is
kept, UᵀU = S². For Sphere and Oblique U is S itself, a number or p of them. On Stiefel it is S up to a rotation of q, which
the manifold, its metric and its retraction do not see; and unlike S it is solved for up to rounding, also where it is
singular: if a column of ω depends on those before it, that row of U and that column of q are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import matrices
from lightning_fgsgd.manifolds import Manifold, Stiefel
from lightning_fgsgd.manifolds.stiefel import SHORT
from lightning_fgsgd.matrices import Planes, gram, matmul, where

__all__ = ["Geometry"]

# Sum of squared inner products of unit columns up to which rounding left them; beyond, others changed the weight.
_ROUNDING = 1e-3
_FAR = 1e12  # squared length of a step on the other manifolds from which its double precision is needed


class Geometry:
    """Geometry of a batch of components, as tensors (..., n, p) or as :class:`~lightning_fgsgd.matrices.Planes`.

    Args:
        manifolds: the manifolds that occur, each with a mask of the components that live on it; ``True`` for all.
        inverse_root_metric: 1/√m of each component; see :meth:`~lightning_fgsgd.pom.POM.metric`.
        radius: R of each component; None for 1.
        upper: U of each component; a compact tensor, or Planes; None for the identity.
        inverse: its inverse, of what is larger than small kernels; these are solved for one column after the other.
    """

    def __init__(
        self,
        manifolds: Sequence[tuple[Manifold, Any]],
        inverse_root_metric: Any,
        radius: Any = None,
        upper: Any = None,
        inverse: Any = None,
    ) -> None:
        self.manifolds = manifolds
        self.inverse_root_metric = inverse_root_metric
        self.radius = radius
        self.upper = upper
        self.inverse = inverse

    def unit(self, omega: Any) -> Any:
        """q of ω."""
        q = omega if self.radius is None else omega * (1.0 / self.radius)
        if self.upper is None:
            return q
        if self.inverse is None:
            return _solve(q, self.upper)
        return self._straightened(matmul(q, self.inverse))

    def pull(self, grad: Any) -> Any:
        """The gradient for q of the gradient G for ω: R · G · Uᵀ."""
        g = grad if self.upper is None else matmul(grad, self.upper.mT if _is_full(self.upper) else self.upper)
        return g if self.radius is None else g * self.radius

    def follow(self, omega: Any, q: Any, new: Any) -> Any:
        """The weights that go with new unit points: R · new · U.

        Without U they are changed by what q changes by, as SGD changes a weight.
        """
        if self.upper is not None:
            return matmul(new if self.radius is None else new * self.radius, self.upper)
        return new if self.radius is None else omega + (new - q) * self.radius

    def tangent(self, q: Any, g: Any) -> Any:
        """Orthogonal projection of ``g`` on the tangent spaces at ``q`` (Remark 2)."""
        inner = gram(q, g)
        return matrices.subtract_product(g, q, self._select([m.normal(inner) for m, _ in self.manifolds]))

    def retract(self, v: Any) -> tuple[Any, Any]:
        """Where v = q + h is retracted to (lines 7 and 8 of Algorithm 1), and before that, for which components that holds.

        It does not for steps that are too long for the Newton-Schulz products on Stiefel, for any that is not finite, and
        where v is shorter than q is on Stiefel: then others have changed the weight, and the products would not converge.
        """
        inner = matrices.symmetric_matmul(v.mT, v)
        length: Any = matrices.trace(inner)  # about ‖h‖²
        middle: Any = 0.0
        limit: Any = _FAR
        for manifold, mask in self.manifolds:
            if isinstance(manifold, Stiefel):
                p = matrices.size(inner)
                length = matrices.trace(inner + matrices.diagonal_where_zero(inner)) - float(p)
                half = (manifold.reach(inner) + SHORT) / 2
                middle, limit = where(mask, half - SHORT, middle), where(mask, half, limit)
        off = length - middle
        within = matrices.settled(off * off <= limit * limit)
        return within, matmul(v, self._select([m.inverse_root(inner) for m, _ in self.manifolds]))

    def retract_far(self, q: Tensor, h: Tensor) -> Tensor:
        """As :meth:`retract`, for steps of any length: beyond its reach by the manifolds' own retractions. Of tensors."""
        within, new = self.retract(q + h)
        if within is True:
            return new
        for manifold, mask in self.manifolds:
            far = (~within if mask is True else mask & ~within)[..., 0, 0]
            new[far] = manifold.retract(q[far], h[far])
        return new

    def decayed(self, grad: Any, omega: Any, decay: Any) -> Any:
        """The gradient with weight decay, which acts on Euclidean components only: on the others it is a normal vector."""
        for manifold, mask in self.manifolds:
            if manifold.name == "euclidean" and not (isinstance(decay, float) and decay == 0.0):
                grad = where(mask, matrices.combine(grad, 1.0, omega, decay), grad)
        return grad

    def _straightened(self, q: Any) -> Any:
        """Each column of q on Stiefel made orthogonal to those before it, up to the square of what is missing.

        Where U is ill-conditioned, the rounding of ω and of U⁻¹ is magnified in the columns of small diagonal entries, that
        of U⁻¹ in the same way in every step. The retraction would turn the large columns to meet it. Weights that others
        have changed stay where they are: more is missing there than rounding leaves.
        """
        for manifold, mask in self.manifolds:
            if isinstance(manifold, Stiefel):
                above = matrices.strictly_upper(matrices.symmetric_matmul(q.mT, q))
                share = where(matrices.squares(above) <= _ROUNDING, 1.0, 0.0)
                return matrices.subtract_product(q, q, where(mask, above * share, 0.0))
        return q

    def _select(self, of_each: list[Any]) -> Any:
        """Of each component the matrix that belongs to its manifold."""
        found = list(zip((mask for _, mask in self.manifolds), of_each, strict=True))
        if isinstance(of_each[0], Tensor):  # compact ones first, so that one expansion does for them all
            found.sort(key=lambda one: one[1].shape[-2])
        _, chosen = found[0]
        for mask, matrix in found[1:]:
            if isinstance(matrix, Tensor) and chosen.shape[-2] < matrix.shape[-2]:
                chosen = matrices.expand(chosen, matrix.shape[-1])
            chosen = where(mask, matrix, chosen)
        return chosen


def _is_full(upper: Any) -> bool:
    return not isinstance(upper, Tensor) or upper.shape[-2] > 1


def _solve(omega: Any, upper: Any) -> Any:
    """ω · U⁻¹ by back substitution; columns whose diagonal entry is zero become zero.

    Columns are made orthogonal to those before them, for what :meth:`Geometry._straightened` says.
    """
    if isinstance(upper, Tensor) and upper.shape[-2] == 1:
        return omega * where(upper == 0, 0.0, 1 / where(upper == 0, 1.0, upper))
    if isinstance(omega, Tensor):
        columns: list[Any] = []
        for j in range(upper.shape[-1]):
            rest = omega[..., j] - sum(q * upper[..., i, j, None] for i, q in enumerate(columns))
            pivot = upper[..., j, j, None]
            q = torch.where(pivot == 0, 0.0, rest / torch.where(pivot == 0, 1.0, pivot))
            on_stiefel = [upper[..., i, j, None] != 0 for i in range(j)]
            along = [o * ((o * q).sum(-1, keepdim=True) * s) for o, s in zip(columns, on_stiefel, strict=True)]
            columns.append(q - sum(along))
        return torch.stack(columns, -1)
    solved: list[list[Any]] = []
    for j, column in enumerate(omega.mT.rows):
        pivot = upper.rows[j][j]
        inverse = where(pivot == 0, 0.0, 1.0 / where(pivot == 0, 1.0, pivot))
        above = [upper.rows[i][j] for i in range(j)]
        rest = [matrices.subtract(x, matrices.dot([q[r] for q in solved], above)) for r, x in enumerate(column)]
        unit = [x * inverse for x in rest]
        # On Stiefel only, where U is more than a diagonal.
        along = [
            0.0 if isinstance(u, float) else where(u == 0, 0.0, matrices.dot(other, unit))
            for u, other in zip(above, solved, strict=True)
        ]
        solved.append([matrices.subtract(x, matrices.dot([o[r] for o in solved], along)) for r, x in enumerate(unit)])
    return Planes(solved).mT

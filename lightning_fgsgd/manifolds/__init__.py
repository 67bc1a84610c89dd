"""Geometry on batches of n x p matrices: the unit manifolds, and the scale that carries a weight onto one of them.

A component ω (n x p, n >= p) is written ω = R · q · S: q lies on a *unit* manifold, S is a fixed scale and R > 0 the
radius. Each manifold fixes a part of the Gram matrix ωᵀω: :class:`Sphere` its trace, :class:`Oblique` its diagonal,
:class:`Stiefel` all of it, :class:`Euclidean` nothing. S is the root of that part: a number, p numbers, a p x p matrix.

Everything is batched over the leading dimensions, (..., n, p), and stateless. Nothing here knows about layers or
optimizers.
"""

from __future__ import annotations

from lightning_fgsgd.manifolds.base import Manifold, wide, working, working_dtype
from lightning_fgsgd.manifolds.euclidean import Euclidean
from lightning_fgsgd.manifolds.oblique import Oblique
from lightning_fgsgd.manifolds.product import Product
from lightning_fgsgd.manifolds.sphere import Sphere
from lightning_fgsgd.manifolds.stiefel import Stiefel

__all__ = [
    "MANIFOLDS",
    "Euclidean",
    "Manifold",
    "Oblique",
    "Product",
    "Sphere",
    "Stiefel",
    "get_manifold",
    "wide",
    "working",
    "working_dtype",
]

MANIFOLDS: dict[str, Manifold] = {m.name: m for m in (Sphere(), Oblique(), Stiefel(), Euclidean())}


def get_manifold(name: str) -> Manifold:
    """The manifold called ``name``; a ``ValueError`` that lists the names where there is none."""
    if name not in MANIFOLDS:
        raise ValueError(f"manifolds: unknown manifold {name!r}; choose from {', '.join(map(repr, MANIFOLDS))}")
    return MANIFOLDS[name]

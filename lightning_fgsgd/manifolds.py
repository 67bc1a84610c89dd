"""Geometry on batches of n x p matrices: the unit manifolds, and the scale that carries a weight onto one of them.

A component ω (n x p, n >= p) is written ω = R · q · S: q lies on a *unit* manifold, S is a fixed scale and R > 0 the
radius. Each manifold fixes a part of the Gram matrix ωᵀω: :class:`Sphere` its trace, :class:`Oblique` its diagonal,
:class:`Stiefel` all of it, :class:`Euclidean` nothing. S is the root of that part: a number, p numbers, a p x p matrix.

Everything is batched over the leading dimensions, (..., n, p), and stateless. Nothing here knows about layers or
optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MANIFOLDS", "Euclidean", "Manifold", "Oblique", "Sphere", "Stiefel", "get_manifold"]


class Manifold(ABC):
    """A unit manifold of n x p matrices, with the Euclidean metric of the space around it.

    Attributes:
        name: the name by which users choose it.
        curvature: bounds (lower, upper) of the sectional curvature. Eq. 5 of the paper uses the upper one. The paper's
            Remark 2 takes 0 for the lower bound of a product; with the Euclidean metric, Stiefel's is −1/2.
    """

    name: str
    curvature: tuple[float, float]

    @abstractmethod
    def dim(self, n: int, p: int) -> int:
        """Dimension of the manifold of n x p matrices."""

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """Nearest point of the unit manifold to ``v`` (..., n, p).

        Where there are several (a zero matrix or column), one is chosen that does not depend on chance.
        """

    @abstractmethod
    def tangent(self, q: Tensor, g: Tensor) -> Tensor:
        """Orthogonal projection of ``g`` (..., n, p) on the tangent space at the unit point ``q``."""

    @abstractmethod
    def retract(self, q: Tensor, h: Tensor) -> Tensor:
        """Unit point reached from ``q`` along the tangent vector ``h`` (..., n, p); zero parts of ``q`` stay zero."""

    def transport(self, q_new: Tensor, h: Tensor) -> Tensor:
        """Move a tangent vector to ``q_new`` by projecting it there, as geoopt does."""
        return self.tangent(q_new, h)

    def random(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Points drawn uniformly on the unit manifold: the projection of a Gaussian matrix is uniform on all three."""
        return self.project(torch.randn(*shape, generator=generator, dtype=dtype))

    @abstractmethod
    def fixed(self, omega: Tensor) -> Tensor:
        """The part of ωᵀω that the manifold fixes, flattened to (..., f); f is 1, p or p²."""

    @abstractmethod
    def root(self, omega: Tensor) -> Tensor:
        """The scale S for which ``omega`` (..., n, p) itself lies on the scaled manifold {q · S}.

        Compact: (..., 1, 1) for Sphere, (..., 1, p) for Oblique, the symmetric (..., p, p) for Stiefel.
        """

    def unit_scale(self, omega: Tensor) -> Tensor:
        """The compact scale that is the identity, for components like ``omega``."""
        return omega.new_ones(()).expand(*omega.shape[:-2], 1, 1)

    def scaled(self, q: Tensor, s: Tensor) -> Tensor:
        """The product q · S; S is symmetric, so this is also the map G -> G · Sᵀ of gradients."""
        return q * s

    def inverse(self, s: Tensor) -> Tensor:
        """Pseudo-inverse of a compact scale: parts that are zero stay zero."""
        return torch.where(s > 0, 1 / s, torch.zeros_like(s))

    @abstractmethod
    def target(self, s: Tensor) -> Tensor:
        """What :meth:`fixed` gives for every point of {q · S}: (..., f)."""

    @abstractmethod
    def mean_square(self, s: Tensor) -> Tensor:
        """Mean of S² over the batch: how much larger than the unit manifold {q · S} is, squared."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Sphere(Manifold):
    """Matrices with ‖q‖_F = 1: the trace of qᵀq is 1."""

    name = "sphere"
    curvature = (0.0, 1.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return n * p - 1

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        frame = torch.eye(v.shape[-2], v.shape[-1], dtype=v.dtype, device=v.device) / v.shape[-1] ** 0.5
        norm = _norm(v, (-2, -1))
        return torch.where(norm > 0, _divide(v, norm), frame)

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return g - q * (q * g).sum((-2, -1), keepdim=True)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        v = q + h
        return _divide(v, _norm(v, (-2, -1)))

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.square().sum((-2, -1))[..., None]

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return _norm(omega, (-2, -1))

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square()[..., 0]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().mean()


class Oblique(Manifold):
    """Matrices whose p columns all have norm 1: the diagonal of qᵀq is 1. A product of p spheres."""

    name = "oblique"
    curvature = (0.0, 1.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return (n - 1) * p

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        frame = torch.eye(v.shape[-2], v.shape[-1], dtype=v.dtype, device=v.device)
        norm = _norm(v, (-2,))
        return torch.where(norm > 0, _divide(v, norm), frame)

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return g - q * (q * g).sum(-2, keepdim=True)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        v = q + h
        return _divide(v, _norm(v, (-2,)))

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.square().sum(-2)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return _norm(omega, (-2,))

    def unit_scale(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_ones(()).expand(*omega.shape[:-2], 1, omega.shape[-1])

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square()[..., 0, :]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().mean()


class Stiefel(Manifold):
    """Matrices with orthonormal columns, qᵀq = I, with the Euclidean metric; the retraction is the polar factor.

    The curvature bounds are those of Zimmermann and Stoye (arXiv 2403.01879).

    A scale S = (ωᵀω)^(1/2) can be singular: {ω : ωᵀω = P} is then {q · S} with q a *partial isometry*, whose qᵀq is the
    projection on the range of S, that is a smaller Stiefel manifold. Singular values below √eps of the largest (so
    eigenvalues of P below eps of the largest: P is singular in the weight's own precision) count as zero. Every
    operation here keeps to that range.
    """

    name = "stiefel"
    curvature = (-0.5, 1.0)

    def dim(self, n: int, p: int) -> int:  # noqa: D102
        return n * p - p * (p + 1) // 2

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        u, _, vh = torch.linalg.svd(v, full_matrices=False)
        return u @ vh

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        qtg = q.mT @ g
        return g - q @ ((qtg + qtg.mT) / 2)

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        # (q + h)ᵀ(q + h) = qᵀq + hᵀh for a tangent h: its eigenvalues are at least 1 in the range of the scale, however
        # large the step. Outside the range q + h is zero, so any finite root does there.
        v = q + h
        eigenvalues, vectors = torch.linalg.eigh(v.mT @ v)
        return v @ (vectors * eigenvalues.clamp_min(0.25).rsqrt()[..., None, :]) @ vectors.mT

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return (omega.mT @ omega).flatten(-2)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        _, sigma, vh = torch.linalg.svd(wide(omega), full_matrices=False)
        sigma = torch.where(_regular(sigma, omega.dtype), sigma, torch.zeros_like(sigma))
        return ((vh.mT * sigma[..., None, :]) @ vh).to(omega.dtype)

    def unit_scale(self, omega: Tensor) -> Tensor:  # noqa: D102
        p = omega.shape[-1]
        return torch.eye(p, dtype=omega.dtype, device=omega.device).expand(*omega.shape[:-2], p, p)

    def scaled(self, q: Tensor, s: Tensor) -> Tensor:  # noqa: D102
        return q @ s

    def inverse(self, s: Tensor) -> Tensor:  # noqa: D102
        sigma, vectors = torch.linalg.eigh(wide(s))
        # Half the tolerance of `root`: rounding to the weight's precision must not drop a direction that it kept.
        regular = _regular(sigma, s.dtype, 0.5)
        inverse = torch.where(regular, 1 / sigma, torch.zeros_like(sigma))
        return ((vectors * inverse[..., None, :]) @ vectors.mT).to(s.dtype)

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return (s.mT @ s).flatten(-2)

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().sum((-2, -1)).mean() / s.shape[-1]


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

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        return q + h

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_zeros(*omega.shape[:-2], 1)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        return omega.new_ones(*omega.shape[:-2], 1, 1)

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(s)[..., 0]

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.new_ones(())


MANIFOLDS: dict[str, Manifold] = {m.name: m for m in (Sphere(), Oblique(), Stiefel(), Euclidean())}


def get_manifold(name: str) -> Manifold:
    """The manifold called ``name``; a ``ValueError`` that lists the names where there is none."""
    if name not in MANIFOLDS:
        raise ValueError(f"manifolds: unknown manifold {name!r}; choose from {', '.join(map(repr, MANIFOLDS))}")
    return MANIFOLDS[name]


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest precision of its device: for what is computed once, and for measuring."""
    return x.float() if x.device.type == "mps" else x.double()


def _norm(v: Tensor, dims: Sequence[int]) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(dims), keepdim=True)


def _divide(v: Tensor, norm: Tensor) -> Tensor:
    """``v / norm``, and zero where the norm is zero."""
    return v / torch.where(norm > 0, norm, torch.ones_like(norm))


def _regular(sigma: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Which singular values count as non-zero in a weight of this precision."""
    return sigma > factor * torch.finfo(dtype).eps ** 0.5 * sigma.amax(-1, keepdim=True)

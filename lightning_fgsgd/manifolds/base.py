"""What every manifold offers, and the helpers that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import matrices

__all__ = ["Manifold"]


class Manifold(ABC):
    """A unit manifold of n x p matrices, with the Euclidean metric of the space around it.

    Every operation works matrix by matrix: one that holds NaN or infinite values gives a result that is not finite, raises
    nothing, and does not touch the others of its batch.

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

    @abstractmethod
    def exp(self, q: Tensor, h: Tensor) -> Tensor:
        """Exponential map: the end of the geodesic that leaves ``q`` with velocity ``h`` after unit time."""

    @abstractmethod
    def dist(self, a: Tensor, b: Tensor) -> Tensor:
        """Geodesic distance between unit points, (...)."""

    def dist_bound(self, a: Tensor, b: Tensor) -> Tensor:
        """A lower bound of the distance in closed form, (...); the distance itself but on :class:`Stiefel`."""
        return self.dist(a, b)

    @abstractmethod
    def normal(self, gram: Any) -> Any:
        """N, of which q · N is the normal part of G at the unit point q: tangent(q, G) = G − q · N, from qᵀG.

        All three manifolds say it through the p x p matrix qᵀG: Sphere takes its trace, Oblique its diagonal, Stiefel its
        symmetric part. A step needs no more than this and :meth:`inverse_root`; both take either form of
        :mod:`~lightning_fgsgd.matrices`, and give compact tensors.
        """

    @abstractmethod
    def inverse_root(self, gram: Any) -> Any:
        """Z, with which v · Z is the unit point that v = q + h is retracted to, from vᵀv.

        The inverse square root of the part of vᵀv that the manifold fixes. On Stiefel by a few Newton-Schulz products, so
        for steps within its :meth:`~lightning_fgsgd.manifolds.Stiefel.reach` only; zero parts of v stay zero.
        """

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of tangent vectors at one point: that of the space around the manifold, (...)."""
        return (u * v).sum((-2, -1))

    def norm(self, u: Tensor) -> Tensor:
        """Norm of a tangent vector, (...)."""
        return norm(u, (-2, -1))[..., 0, 0]

    def residual(self, q: Tensor) -> Tensor:
        """How far ``q`` is from the constraint: ‖fixed part of qᵀq − its target‖_F / ‖target‖_F, (...)."""
        target = self.target(self.unit_scale(q))
        return (self.fixed(q) - target).norm(dim=-1) / target.norm(dim=-1).clamp_min(1e-30)

    def transport(self, q_new: Tensor, h: Tensor) -> Tensor:
        """Move a tangent vector to ``q_new`` by projecting it there, as geoopt does."""
        return self.tangent(q_new, h)

    def random(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Points drawn uniformly on the unit manifold: the projection of a Gaussian matrix is uniform on all three."""
        return self.project(
            torch.randn(*shape, generator=generator, dtype=dtype, device=generator.device if generator else None)
        )

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
        return torch.where(s == 0, torch.zeros_like(s), 1 / s)

    @abstractmethod
    def target(self, s: Tensor) -> Tensor:
        """What :meth:`fixed` gives for every point of {q · S}: (..., f)."""

    @abstractmethod
    def mean_square(self, s: Tensor) -> Tensor:
        """Mean of S² over the batch: how much larger than the unit manifold {q · S} is, squared."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def wide_dtype(x: Tensor) -> torch.dtype:
    """The widest precision of the device of ``x``."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest precision of its device: for what is computed once, and for measuring."""
    return x.to(wide_dtype(x))


def working(weight: Tensor) -> Tensor:
    """``weight`` in the precision of the geometry."""
    return weight.to(working_dtype(weight))


def working_dtype(weight: Tensor) -> torch.dtype:
    """The precision of the geometry: float32 for half precision and less, the weight's own otherwise."""
    return torch.float32 if weight.is_floating_point() and weight.dtype.itemsize < 4 else weight.dtype


def norm(v: Tensor, dims: Sequence[int]) -> Tensor:
    """Euclidean norm over ``dims``, which are kept, without overflow or underflow of the squares."""
    largest = v.abs().amax(tuple(dims), keepdim=True)
    return largest * torch.linalg.vector_norm(divide(v, largest), dim=tuple(dims), keepdim=True)


def unit(v: Tensor, dims: Sequence[int]) -> Tensor:
    """``v`` divided by its norm over ``dims``, at any scale; zero where that is zero."""
    v = divide(v, v.abs().amax(tuple(dims), keepdim=True))
    return divide(v, torch.linalg.vector_norm(v, dim=tuple(dims), keepdim=True))


def divide(v: Tensor, length: Tensor) -> Tensor:
    """``v / length``, and zero where the length is zero."""
    return v / torch.where(length == 0, torch.ones_like(length), length)


def inverse_length(square: Any) -> Any:
    """1 / length of vectors of this squared length, and 1 where that is zero; of tensors or symbols."""
    return matrices.where(square == 0, 1.0, square).rsqrt()


def by_lapack(f: Callable[[Tensor], Any], m: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a decomposition ``f`` gives of some matrices, always computed on the CPU.

    On a GPU the eigenvalues of a layer's 3x3 matrices, some 100 000 at once, end in an error of cuSOLVER (CUDA 13). They are
    wanted when weights are placed and when an epoch ends, not in a step.
    """
    found = f(m.cpu())
    return tuple(x.to(m.device) for x in ((found,) if isinstance(found, Tensor) else found))


def finite(v: Tensor) -> Tensor:
    """Which matrices hold finite values only, (..., 1, 1)."""
    return torch.isfinite(v).all(-1, keepdim=True).all(-2, keepdim=True)


def angle(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """Angle between unit vectors, accurate also where it is small or close to π (Kahan)."""
    apart, together = norm(a - b, dims), norm(a + b, dims)
    return 2 * torch.atan2(apart, together)


def sinc(x: Tensor) -> Tensor:
    """sin(x) / x, and 1 at 0."""
    return torch.sinc(x / torch.pi)

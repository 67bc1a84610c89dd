"""The Stiefel manifold: matrices with orthonormal columns."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import matrices
from lightning_fgsgd.manifolds.base import Manifold, angle, by_lapack, divide, finite, norm, wide
from lightning_fgsgd.matrices import symmetric_part

__all__ = ["Stiefel"]


# A step whose columns are longer than this goes another way: the Gram matrix squares its length, and loses 1 beside it.
_LONG = 4.0


# Iterations of Newton-Schulz, and the t = ‖h‖² up to which they end within 2e-7 (in double precision, 1e-14) of the root.
_REACH = (
    {2: 0.053, 3: 0.44, 4: 1.68, 5: 4.7, 6: 11.7, 7: 27.5, 8: 63.0},
    {3: 0.046, 4: 0.4, 5: 1.59, 6: 4.5, 7: 11.2, 8: 26.3, 9: 60.5, 10: 137.0},
)
_MOST_ITERATIONS = (8, 10)
SHORT = 0.05  # of t, for a point that is not on the manifold: tr(vᵀv) is below p for none that a tangent step leads to
_SERIES_REACH = 0.5  # a step that turns a component further is rare
_SERIES = [math.prod((-0.5 - k) / (k + 1) for k in range(degree)) for degree in range(9)]  # of (1 + x)^(-1/2)


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
        u, _, vh = _svd(v)
        return u @ vh

    def tangent(self, q: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        qtg = q.mT @ g
        return g - q @ ((qtg + qtg.mT) / 2)

    def normal(self, gram: Any) -> Any:  # noqa: D102
        return symmetric_part(gram)

    def inverse_root(self, gram: Any) -> Any:
        """gram^(-1/2), by products only.

        For v = q + h with a tangent h, vᵀv = I + hᵀh has its eigenvalues in [1, 1 + t], t = ‖h‖². Divided by 1 + t/2 they
        are within r = t / (2 + t) of 1. In compiled code, where every product counts, the binomial series of degree 8 is
        taken, four products, with an error of 0.19 r⁹. Of tensors, the coupled Newton-Schulz iteration (Higham, *Functions
        of Matrices*, Eq. 6.35), of which each squares the distance from 1, times 3/4 and a little; t says how many it takes
        (:data:`_REACH`). Directions that q lacks (columns of v that are zero) have a 1 put in their place.
        """
        m = matrices
        p, double = m.size(gram), m.is_double(gram)
        gram = gram + m.diagonal_where_zero(gram)
        t = m.trace(gram) - float(p)
        root = (t * 0.5 + 1.0).rsqrt()
        y, z = gram * (root * root), None
        if isinstance(t, Tensor):
            steps = _iterations(t, double)
        else:
            z = _series(y)
            steps = 1 if double else 0  # from the rounding of single precision to that of double
            y = m.symmetric_matmul(y, z) if double else y
        for step in range(steps):
            correction = m.add_identity(y if z is None else m.symmetric_matmul(z, y), 1.5, -0.5)
            y = m.symmetric_matmul(y, correction) if step < steps - 1 else y
            z = correction if z is None else m.symmetric_matmul(z, correction)
        return z * root

    @staticmethod
    def reach(gram: Any) -> float:
        """The t = ‖h‖² up to which :meth:`inverse_root` of such matrices is exact to rounding; from −:data:`SHORT` on."""
        double = matrices.is_double(gram)
        return _REACH[double][_MOST_ITERATIONS[double]] if isinstance(gram, Tensor) else _SERIES_REACH

    def retract(self, q: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        # (q + h)ᵀ(q + h) = qᵀq + hᵀh for a tangent h: its eigenvalues are at least 1 in the range of the scale, however
        # large the step. Outside the range q + h is zero, so any finite root does there.
        v = q + h
        gram = v.mT @ v
        short = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] <= _LONG**2  # NaN is not
        eigenvalues, vectors = by_lapack(torch.linalg.eigh, torch.where(short, gram, torch.zeros_like(gram)))
        near = v @ (vectors * eigenvalues.clamp_min(0.25).rsqrt()[..., None, :]) @ vectors.mT
        return near if bool(short.all()) else torch.where(short, near, self._retract_far(q, h))

    def _retract_far(self, q: Tensor, h: Tensor) -> Tensor:
        """Polar factor of q + h from its singular vectors, in as many directions as q has."""
        u, _, vh = _svd(wide(q) + wide(h))
        rank = q.square().sum((-2, -1)).round()[..., None]
        kept = torch.arange(q.shape[-1], device=q.device) < rank
        return ((u * kept[..., None, :]) @ vh).to(q.dtype)

    def retract_qr(self, q: Tensor, h: Tensor) -> Tensor:
        """The other retraction: the Q factor of q + h, with a positive diagonal of R. For regular points only.

        It agrees with the exponential map to second order only, the polar factor to third.
        """
        factor, r = torch.linalg.qr(q + h)
        sign = r.diagonal(dim1=-2, dim2=-1).sign()
        return factor * torch.where(sign == 0, torch.ones_like(sign), sign)[..., None, :]

    def exp(self, q: Tensor, h: Tensor) -> Tensor:
        """Exponential map of the Euclidean metric (Edelman, Arias and Smith 1998, Eq. 2.2.2)."""
        p = q.shape[-1]
        a, s = q.mT @ h, h.mT @ h
        identity = torch.eye(p, dtype=q.dtype, device=q.device).expand_as(a)
        block = torch.cat([torch.cat([a, -s], -1), torch.cat([identity, a], -1)], -2)
        # exp(−a) as exp(I − a) / e: of a single matrix of norm 0.05, torch's matrix_exp is right to 2e-10 only.
        turn = torch.linalg.matrix_exp(identity - a) / math.e
        return torch.cat([q, h], -1) @ torch.linalg.matrix_exp(block)[..., :, :p] @ turn

    def dist(self, a: Tensor, b: Tensor) -> Tensor:
        """Length of the geodesic from ``a`` to ``b`` found by :meth:`log`; NaN where it finds none.

        A length below π is the distance itself, for π is the injectivity radius (Zimmermann and Stoye, arXiv 2405.02268); a
        greater one is an upper bound. In any case the distance is at least :meth:`dist_bound`.
        """
        h = self.log(a, b)
        error = (self.exp(a, h) - b).norm(dim=(-2, -1))
        found = error <= 1e-3 * torch.finfo(a.dtype).eps ** 0.5 * b.shape[-1]
        return torch.where(found, h.norm(dim=(-2, -1)), torch.full_like(error, torch.nan))

    def dist_bound(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of the columns along great circles, a lower bound: Stiefel lies in the oblique manifold, with its metric.

        At least ‖a − b‖_F; exact for p = 1, and to third order in the distance for points that are close.
        """
        arcs = norm(a, (-2,)) * angle(a, b, (-2,))
        return arcs.square().sum((-2, -1)).sqrt()

    def log(self, a: Tensor, b: Tensor, steps: int = 60, stages: int = 6) -> Tensor:
        """Tangent vector at ``a`` whose geodesic ends at ``b``, by shooting (Bryner 2017).

        The miss at the end is carried back along the geodesic in ``stages`` projections that keep its length, and added.
        Converges for points that are not too far apart; check with :meth:`exp`.
        """
        h = self.tangent(a, b - a)
        h = divide(h, norm(h, (-2, -1))) * norm(b - a, (-2, -1))
        for _ in range(steps):
            miss = b - self.exp(a, h)
            length = norm(miss, (-2, -1))
            for stage in range(stages, -1, -1):
                miss = self.tangent(self.exp(a, h * (stage / stages)), miss)
                miss = divide(miss, norm(miss, (-2, -1))) * length
            h = h + miss
        return h

    def fixed(self, omega: Tensor) -> Tensor:  # noqa: D102
        return (omega.mT @ omega).flatten(-2)

    def root(self, omega: Tensor) -> Tensor:  # noqa: D102
        _, sigma, vh = _svd(wide(omega))
        sigma = torch.where(_regular(sigma, omega.dtype) | sigma.isnan(), sigma, torch.zeros_like(sigma))
        return ((vh.mT * sigma[..., None, :]) @ vh).to(omega.dtype)

    def unit_scale(self, omega: Tensor) -> Tensor:  # noqa: D102
        p = omega.shape[-1]
        return torch.eye(p, dtype=omega.dtype, device=omega.device).expand(*omega.shape[:-2], p, p)

    def scaled(self, q: Tensor, s: Tensor) -> Tensor:  # noqa: D102
        return q @ s

    def inverse(self, s: Tensor) -> Tensor:  # noqa: D102
        good = finite(s)
        sigma, vectors = by_lapack(torch.linalg.eigh, torch.where(good, wide(s), torch.zeros_like(wide(s))))
        # Half the tolerance of `root`: rounding to the weight's precision must not drop a direction that it kept.
        regular = _regular(sigma, s.dtype, 0.5)
        inverse = torch.where(regular, 1 / sigma, torch.zeros_like(sigma))
        inverse = torch.where(good[..., 0], inverse, torch.full_like(inverse, torch.nan))
        return ((vectors * inverse[..., None, :]) @ vectors.mT).to(s.dtype)

    def target(self, s: Tensor) -> Tensor:  # noqa: D102
        return (s.mT @ s).flatten(-2)

    def mean_square(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.square().sum((-2, -1)).mean() / s.shape[-1]


def _iterations(t: Any, double: bool) -> int:
    """How many iterations are enough for all matrices: as few as can be where looking costs no wait for a device."""
    most = _MOST_ITERATIONS[double]
    if not isinstance(t, Tensor) or t.device.type != "cpu" or t.numel() == 0:
        return most
    longest = float(t.max())
    return next((steps for steps, reach in _REACH[double].items() if longest <= reach), most)


def _series(y: Any) -> Any:
    """y^(-1/2) near the identity: the binomial series in x = y − I, in powers of x³."""
    x = matrices.add_identity(y, -1.0)
    x2 = matrices.symmetric_matmul(x, x)
    x3 = matrices.symmetric_matmul(x2, x)

    def three_terms(degree: int) -> Any:
        a, b, c = _SERIES[degree : degree + 3]
        return matrices.add_identity(matrices.combine(x, b, x2, c), a)

    high = three_terms(3) + matrices.symmetric_matmul(x3, three_terms(6))
    return three_terms(0) + matrices.symmetric_matmul(x3, high)


def _svd(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition; NaN for matrices that are not finite, on which LAPACK gives up."""
    good = finite(v)
    whole = torch.where(good, v, torch.zeros_like(v))
    u, sigma, vh = by_lapack(partial(torch.linalg.svd, full_matrices=False), whole)
    nan = torch.full_like(sigma, torch.nan)
    return torch.where(good, u, nan[..., None, :]), torch.where(good[..., 0], sigma, nan), vh


def _regular(sigma: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Which singular values count as non-zero in a weight of this precision."""
    return sigma > factor * torch.finfo(dtype).eps ** 0.5 * sigma.amax(-1, keepdim=True)

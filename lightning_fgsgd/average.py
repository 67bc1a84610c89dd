"""ρ of Eq. 5 as the distance of the weights to a running average of themselves: ``rho="average"``."""

from __future__ import annotations

from torch import Tensor

from lightning_fgsgd.manifolds import working
from lightning_fgsgd.pom import POM

__all__ = ["distance_to_average"]

_AVERAGED_STEPS = 100  # how far back the average reaches


def distance_to_average(pom: POM, weight: Tensor, average: Tensor, steps: int, metric: str) -> Tensor:
    """ρ² of every group, (G,): how far the weights are from their average over ``steps`` steps, which is moved along."""
    here = coordinates(pom, pom.cutting.cut(working(weight)))
    mean = here if steps == 1 else pull(pom, pom.cutting.cut(average), here, 1 / min(steps, _AVERAGED_STEPS))
    average.copy_(pom.cutting.join(mean))
    return group_distances(pom, here, mean, metric)


def group_distances(pom: POM, a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Squared distance ρ_g² of every group between two points, (G,); see :func:`coordinates` for ``a`` and ``b``, (k, n, p).

    The sum of the components' squared distances; on Stiefel the lower bound in closed form.
    """
    squares, m = (a - b).square().sum((-2, -1)), pom.metric(metric)
    for i, manifold in pom.manifolds.items():
        if manifold.name != "euclidean":
            index = (pom.sets.manifold == i).nonzero()[:, 0]
            squares[index] = manifold.dist_bound(a[index], b[index]).square() * m[index]
    return pom.group_sums(squares)


def coordinates(pom: POM, omega: Tensor) -> Tensor:
    """Unit points q where there is a constraint and ω where there is none, as one tensor (k, n, p)."""
    out = omega.clone()
    parts = pom.parts
    for part, q in zip(parts, pom.unit_points(omega, parts), strict=True):
        out[part.members] = q
    return out


def pull(pom: POM, average: Tensor, towards: Tensor, share: float) -> Tensor:
    """Move ``average`` the ``share`` of the way towards another point, by a retraction; both as :func:`coordinates`."""
    moved = average.lerp(towards, share)
    for i, manifold in pom.manifolds.items():
        if manifold.name != "euclidean":
            index = (pom.sets.manifold == i).nonzero()[:, 0]
            a, b = average[index], towards[index]
            moved[index] = manifold.retract(a, share * manifold.tangent(a, b - a))
    return moved

"""Sectional curvatures, measured from the exponential maps alone: the bounds hold, and are attained.

By Gauss' equation K(x, y) = <II(x, x), II(y, y)> − ‖II(x, y)‖² for orthonormal x, y, where II(x, x) is the acceleration of
the geodesic that leaves along x.
"""

import pytest
import torch

from lightning_fgsgd.manifolds import Product, get_manifold
from tests.manifolds.strategies import CONSTRAINED


def acceleration(exp, q, x, eps=2e-3):
    # Fourth-order differences.
    at = {k: exp(q, k * eps * x) for k in (-2, -1, 0, 1, 2)}
    return (-at[-2] + 16 * at[-1] - 30 * at[0] + 16 * at[1] - at[2]) / (12 * eps**2)


def curvature(exp, q, x, y):
    """Sectional curvature of the plane of orthonormal x and y, (...)."""
    xx, yy, both = acceleration(exp, q, x), acceleration(exp, q, y), acceleration(exp, q, x + y)
    xy = (both - xx - yy) / 2
    return (xx * yy).flatten(-2).sum(-1) - xy.square().flatten(-2).sum(-1)


def planes(manifold, n, p, count=300):
    q = manifold.random(count, n, p, dtype=torch.float64)
    x, y = (manifold.tangent(q, torch.randn_like(q)) for _ in range(2))
    x = x / manifold.norm(x)[:, None, None]
    y = y - manifold.inner(x, y)[:, None, None] * x
    return q, x, y / manifold.norm(y)[:, None, None]


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [(3, 1), (4, 2), (3, 3), (6, 4)])
def test_curvatures_of_random_planes_are_within_the_bounds(name, n, p):
    manifold = get_manifold(name)
    k = curvature(manifold.exp, *planes(manifold, n, p))
    lower, upper = manifold.curvature
    assert k.min() >= lower - 1e-6
    assert k.max() <= upper + 1e-6
    if name == "sphere" or p == 1:
        torch.testing.assert_close(k, torch.ones_like(k), atol=1e-6, rtol=0)


def vector(n, p, *entries):
    v = torch.zeros(1, n, p, dtype=torch.float64)
    for i, j in entries:
        v[0, i, j] = 1
    return v


@pytest.mark.parametrize(
    ("name", "x", "y", "expected"),
    [
        ("stiefel", (2, 0), (3, 0), 1.0),  # one column turns in two directions, as on a sphere
        ("stiefel", (2, 0), (2, 1), -0.5),  # two columns turn towards one direction
        ("oblique", (2, 0), (3, 0), 1.0),
        ("oblique", (2, 0), (3, 1), 0.0),  # columns of an oblique matrix know nothing of each other
    ],
)
def test_the_bounds_are_attained(name, x, y, expected):
    q = vector(4, 2, (0, 0), (1, 1))
    k = curvature(get_manifold(name).exp, q, vector(4, 2, x), vector(4, 2, y))
    assert k.item() == pytest.approx(expected, abs=1e-6)


def test_remark_2_a_product_of_two_spheres_is_flat_across_and_has_unit_curvature_within():
    # The paper's example, with two-spheres.
    spheres = Product([get_manifold("sphere")] * 2)

    def exp(q, h):
        return torch.cat(spheres.exp(q.split(3, -2), h.split(3, -2)), -2)

    q = vector(6, 1, (0, 0), (3, 0))
    first, second, other = vector(6, 1, (1, 0)), vector(6, 1, (2, 0)), vector(6, 1, (4, 0))
    assert curvature(exp, q, first, second).item() == pytest.approx(1.0, abs=1e-6)
    assert curvature(exp, q, first, other).item() == pytest.approx(0.0, abs=1e-6)
    lower, upper = spheres.curvature
    for _ in range(100):
        x, y = torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64)).Q.T
        full = [torch.tensor([0, *v[:2], 0, *v[2:]]).view(1, 6, 1) for v in (x, y)]
        assert lower - 1e-6 <= curvature(exp, q, *full).item() <= upper + 1e-6


def test_remark_2s_lower_bound_of_zero_does_not_hold_for_a_product_with_stiefel():
    # The plane of the second case above, in one factor of a product.
    factors = Product([get_manifold("stiefel"), get_manifold("sphere")])

    def exp(q, h):
        return torch.cat(factors.exp(q.split(2, -1), h.split(2, -1)), -1)

    q = torch.cat([vector(4, 2, (0, 0), (1, 1)), vector(4, 2, (0, 0))], -1)
    x, y = (torch.cat([vector(4, 2, entry), vector(4, 2)], -1) for entry in ((2, 0), (2, 1)))
    assert curvature(exp, q, x, y).item() == pytest.approx(-0.5, abs=1e-6)
    assert factors.curvature == (-0.5, 1.0)

"""Agreement with geoopt and pymanopt in double precision, to 1e-10, wherever they define the same operation."""

import geoopt
import numpy as np
import pymanopt.manifolds
import pytest
import torch

from lightning_fgsgd.manifolds import get_manifold
from tests.manifolds.strategies import CONSTRAINED

SHAPES = [(3, 3), (6, 3), (7, 1), (64, 16), (64, 64), (1, 1)]


def sample(name, n, p, count=4, length=1.0):
    """Points, other points, ambient vectors, and tangent vectors of norm ``length``."""
    manifold = get_manifold(name)
    generator = torch.Generator().manual_seed(n * p)
    v, w, g = (torch.randn(count, n, p, generator=generator, dtype=torch.float64) for _ in range(3))
    q = manifold.project(v)
    h = manifold.tangent(q, w)
    return manifold, v, q, g, length * h / manifold.norm(h).clamp_min(1e-30)[:, None, None]


def agree(mine, theirs):
    torch.testing.assert_close(mine, torch.as_tensor(np.asarray(theirs)).reshape(mine.shape), atol=1e-10, rtol=0)


def geoopts(name):
    """geoopt's manifold, and how our matrices lie in it: its sphere is over the last axes."""
    if name == "sphere":
        return geoopt.Sphere(), lambda x: x.flatten(-2)
    if name == "oblique":
        return geoopt.Sphere(), lambda x: x.mT.contiguous()
    return geoopt.EuclideanStiefel(), lambda x: x


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [s for s in SHAPES if s != (1, 1)])
def test_agrees_with_geoopt(name, n, p):
    manifold, v, q, g, h = sample(name, n, p, length=0.7)
    other, there = geoopts(name)

    def same(mine, theirs):
        torch.testing.assert_close(there(mine), theirs, atol=1e-10, rtol=0)

    same(q, other.projx(there(v)))
    same(manifold.tangent(q, g), other.proju(there(q), there(g)))
    end = manifold.exp(q, h)
    same(manifold.transport(end, h), other.proju(there(end), there(h)))
    inner = other.inner(there(q), there(h), there(manifold.tangent(q, g)))
    torch.testing.assert_close(
        manifold.inner(h, manifold.tangent(q, g)), inner.reshape(len(q), -1).sum(1), atol=1e-10, rtol=0
    )
    assert all(other.check_point_on_manifold(there(x), atol=1e-10) for x in (q, end, manifold.retract(q, h)))
    if name == "stiefel":  # geoopt's retraction there is QR
        same(manifold.retract_qr(q, h), other.retr(q, h))
        exact = geoopt.EuclideanStiefelExact()  # the retraction of which is the exponential map
        same(manifold.exp(q, h), exact.expmap(q, h))
    else:
        same(manifold.retract(q, h), other.retr(there(q), there(h)))
        same(manifold.exp(q, h), other.expmap(there(q), there(h)))
        theirs = other.dist(there(q), there(end)).square().reshape(len(q), -1).sum(1).sqrt()
        torch.testing.assert_close(manifold.dist(q, end), theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [s for s in SHAPES if s != (1, 1)])
def test_agrees_with_pymanopt(name, n, p):
    manifold, _, q, g, h = (x[0] if isinstance(x, torch.Tensor) else x for x in sample(name, n, p, length=0.7))
    other = {
        "sphere": lambda: pymanopt.manifolds.Sphere(n, p),
        "oblique": lambda: pymanopt.manifolds.Oblique(n, p),
        "stiefel": lambda: pymanopt.manifolds.Stiefel(n, p, retraction="polar"),
    }[name]()
    x, u, v = (t.numpy() for t in (q, h, g))
    assert manifold.dim(n, p) == other.dim
    agree(manifold.tangent(q, g), other.projection(x, v))
    # Of the gradient of a function with Euclidean gradient g: line 5 of Algorithm 1.
    agree(manifold.tangent(q, g), other.euclidean_to_riemannian_gradient(x, v))
    agree(manifold.retract(q, h), other.retraction(x, u))
    agree(manifold.transport(manifold.retract(q, h), h), other.projection(other.retraction(x, u), u))
    agree(manifold.norm(h), other.norm(x, u))
    agree(manifold.inner(h, manifold.tangent(q, g)), other.inner_product(x, u, other.projection(x, v)))
    agree(manifold.exp(q, h), other.exp(x, u))
    if name == "stiefel":
        agree(manifold.retract_qr(q, h), pymanopt.manifolds.Stiefel(n, p, retraction="qr").retraction(x, u))
    else:
        agree(manifold.dist(q, manifold.exp(q, h)), other.dist(x, other.exp(x, u)))


@pytest.mark.parametrize("name", CONSTRAINED)
def test_one_by_one_components_are_the_two_points_plus_and_minus_one(name):
    manifold = get_manifold(name)
    q = manifold.project(torch.tensor([[[3.0]], [[-0.1]]], dtype=torch.float64))
    assert q.flatten().tolist() == [1.0, -1.0]
    assert manifold.dim(1, 1) == 0
    assert manifold.tangent(q, torch.randn_like(q)).abs().max() < 1e-15

import pytest
import torch

from lightning_fgsgd.manifolds import MANIFOLDS, get_manifold

CONSTRAINED = ["sphere", "oblique", "stiefel"]
ALL = [*CONSTRAINED, "euclidean"]


def draw(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_projection_is_the_nearest_point(name):
    manifold, v = get_manifold(name), draw((1, 5, 3))
    best = (v - manifold.project(v)).norm()
    others = manifold.project(manifold.project(v) + 0.1 * draw((2000, 5, 3), 1))
    assert ((v - others).flatten(1).norm(dim=1) >= best).all()


@pytest.mark.parametrize("name", CONSTRAINED)
def test_the_gradient_of_the_norm_has_no_tangent_part(name):
    # Why weight decay cannot act on a constrained weight.
    manifold = get_manifold(name)
    omega = draw((4, 6, 3))
    s = manifold.root(omega)
    q = manifold.scaled(omega, manifold.inverse(s))
    assert manifold.tangent(q, manifold.scaled(omega, s)).abs().max() < 1e-12


def test_the_polar_retraction_equals_the_projection():
    manifold = get_manifold("stiefel")
    q = manifold.project(draw((9, 8, 4)))
    h = manifold.tangent(q, draw((9, 8, 4), 1))
    torch.testing.assert_close(manifold.retract(q, h), manifold.project(q + h))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("n", "p"), [(3, 3), (5, 2), (4, 1)])
def test_dimension_is_the_rank_of_the_tangent_projection(name, n, p):
    manifold = get_manifold(name)
    q = manifold.project(draw((1, n, p)))
    basis = torch.eye(n * p, dtype=torch.float64).reshape(n * p, n, p)
    projected = manifold.tangent(q.expand(n * p, n, p), basis).flatten(1)
    assert torch.linalg.matrix_rank(projected, tol=1e-8) == manifold.dim(n, p)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_the_root_of_a_weight_is_the_scale_on_which_it_lies(name):
    manifold, omega = get_manifold(name), draw((6, 5, 3))
    s = manifold.root(omega)
    q = manifold.scaled(omega, manifold.inverse(s))
    torch.testing.assert_close(manifold.fixed(q), manifold.target(manifold.unit_scale(q)))
    torch.testing.assert_close(manifold.scaled(q, s), omega)
    torch.testing.assert_close(manifold.fixed(omega), manifold.target(s))


def test_a_singular_scale_keeps_to_its_range():
    manifold = get_manifold("stiefel")
    omega = draw((1, 5, 2)) @ draw((1, 2, 3), 1)  # rank 2 of 3
    s = manifold.root(omega)
    q = manifold.scaled(omega, manifold.inverse(s))
    projector = q.mT @ q
    torch.testing.assert_close(projector @ projector, projector, atol=1e-7, rtol=0)
    assert round(projector.diagonal(dim1=1, dim2=2).sum().item()) == 2
    h = manifold.tangent(q, manifold.scaled(draw((1, 5, 3), 2), s))
    r = manifold.retract(q, h)
    torch.testing.assert_close(r.mT @ r, projector, atol=1e-7, rtol=0)


def test_an_unknown_manifold_is_named():
    with pytest.raises(ValueError, match=r"unknown manifold 'torus'; choose from 'sphere', 'oblique', 'stiefel'"):
        get_manifold("torus")
    assert repr(MANIFOLDS["sphere"]) == "Sphere()"

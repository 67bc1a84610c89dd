import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fgsgd.manifolds import MANIFOLDS, get_manifold

CONSTRAINED = ["sphere", "oblique", "stiefel"]
ALL = [*CONSTRAINED, "euclidean"]


def shapes():
    return st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)).map(
        lambda s: (s[0], max(s[1:]), min(s[1:]))
    )


def draw(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CONSTRAINED)
@settings(deadline=None, max_examples=40)
@given(shape=shapes(), exponent=st.integers(-20, 20))
def test_projection_lands_on_the_unit_manifold_at_any_scale(name, shape, exponent):
    manifold = get_manifold(name)
    q = manifold.project(draw(shape) * 10.0**exponent)
    torch.testing.assert_close(manifold.fixed(q), manifold.target(manifold.unit_scale(q)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CONSTRAINED)
@settings(deadline=None, max_examples=40)
@given(shape=shapes(), size=st.floats(1e-3, 1e2))
def test_retraction_stays_on_the_manifold_however_long_the_step(name, shape, size):
    manifold = get_manifold(name)
    q = manifold.project(draw(shape))
    h = manifold.tangent(q, size * draw(shape, 1))
    r = manifold.retract(q, h)
    torch.testing.assert_close(manifold.fixed(r), manifold.fixed(q), atol=1e-10, rtol=0)


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


def test_agrees_with_geoopt():
    # geoopt's Sphere normalises over the last axes, its Oblique over columns, its Stiefel has the same two metrics.
    v, g = draw((5, 7, 3)), draw((5, 7, 3), 1)
    theirs = {
        "sphere": (geoopt.Sphere(), lambda x: x.flatten(1), lambda x: x.reshape(5, 7, 3)),
        "oblique": (geoopt.Sphere(), lambda x: x.mT, lambda x: x.mT),
        "stiefel": (geoopt.EuclideanStiefel(), lambda x: x, lambda x: x),
    }
    for name, (other, there, back) in theirs.items():
        manifold = get_manifold(name)
        q = manifold.project(v)
        torch.testing.assert_close(q, back(other.projx(there(v))))
        h = manifold.tangent(q, g)
        torch.testing.assert_close(h, back(other.proju(there(q), there(g))))
        torch.testing.assert_close(
            manifold.transport(manifold.retract(q, h), h),
            back(other.proju(there(manifold.retract(q, h)), there(h))),
        )
        if name != "stiefel":  # geoopt's retraction there is QR
            torch.testing.assert_close(manifold.retract(q, h), back(other.retr(there(q), there(h))))


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


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_zero_matrix_is_projected_to_a_definite_point(name):
    manifold = get_manifold(name)
    q = manifold.project(torch.zeros(2, 4, 3))
    torch.testing.assert_close(manifold.fixed(q), manifold.target(manifold.unit_scale(q)))
    assert torch.equal(q, manifold.project(torch.zeros(2, 4, 3)))


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


@pytest.mark.parametrize("name", CONSTRAINED)
def test_random_points_are_uniform(name):
    # On all three, E[q qᵀ] is (‖q‖²/n) I for the uniform distribution; and the seed decides.
    manifold, n, p = get_manifold(name), 4, 2
    q = manifold.random(20000, n, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squared = 1 if name == "sphere" else p
    mean = (q @ q.mT).mean(0)
    torch.testing.assert_close(mean, torch.eye(n, dtype=torch.float64) * squared / n, atol=0.02, rtol=0)
    assert q.mean(0).abs().max() < 0.02
    assert torch.equal(
        q[:3], manifold.random(20000, n, p, generator=torch.Generator().manual_seed(0), dtype=q.dtype)[:3]
    )


def test_an_unknown_manifold_is_named():
    with pytest.raises(ValueError, match=r"unknown manifold 'torus'; choose from 'sphere', 'oblique', 'stiefel'"):
        get_manifold("torus")
    assert repr(MANIFOLDS["sphere"]) == "Sphere()"

import math

import pytest
import torch

from lightning_fgsgd.manifolds import MANIFOLDS, get_manifold

CONSTRAINED = ["sphere", "oblique", "stiefel"]


def pair(name, n=6, p=3, count=8, length=1.0, seed=0):
    """Points, unit-speed tangent vectors times ``length``."""
    manifold = get_manifold(name)
    generator = torch.Generator().manual_seed(seed)
    q = manifold.random(count, n, p, generator=generator, dtype=torch.float64)
    h = manifold.tangent(q, torch.randn(count, n, p, generator=generator, dtype=torch.float64))
    return manifold, q, length * h / manifold.norm(h)[:, None, None]


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [(3, 3), (6, 3), (5, 1)])
def test_geodesics_stay_on_the_manifold_have_constant_speed_and_normal_acceleration(name, n, p):
    manifold, q, h = pair(name, n, p)
    for t in (0.0, 0.3, 1.0, 2.5):
        assert manifold.residual(manifold.exp(q, t * h)).max() < 1e-12
    eps = 1e-3
    before, here, after = (manifold.exp(q, t * h) for t in (0.7 - eps, 0.7, 0.7 + eps))
    speed = manifold.norm(after - before) / (2 * eps)
    torch.testing.assert_close(speed, torch.ones_like(speed), atol=1e-5, rtol=0)
    acceleration = (after - 2 * here + before) / eps**2
    assert manifold.norm(manifold.tangent(here, acceleration)).max() < 1e-4


@pytest.mark.parametrize("name", [*CONSTRAINED, "euclidean"])
@pytest.mark.parametrize("length", [1e-9, 0.1, 1.5])
def test_the_distance_to_the_end_of_a_geodesic_is_its_length(name, length):
    manifold, q, h = pair(name, length=length)
    d = manifold.dist(q, manifold.exp(q, h))
    torch.testing.assert_close(d, torch.full_like(d, length), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("length", [1e-4, 3e-3, 0.03, 0.05, 0.07, 0.1, 0.3, 1.0, 3.0])
def test_geodesics_on_stiefel_end_on_it_to_rounding_whatever_their_length(length):
    # torch's matrix_exp, of which they are made, is not that precise at every length, for a single matrix.
    for n, p in ((2, 2), (4, 2), (8, 5)):
        manifold, points, steps = pair("stiefel", n, p, count=10, length=length)
        for q, h in zip(points, steps, strict=True):
            assert manifold.residual(manifold.exp(q, h)) < 2e-14


def test_the_distance_on_stiefel_is_not_invented_where_shooting_fails():
    manifold, q, h = pair("stiefel", length=30.0)
    other = manifold.exp(q, h)
    d = manifold.dist(q, other)
    assert (d.isnan() | (d >= manifold.dist_bound(q, other))).all()
    rotation = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))  # another component of O(3)
    eye = torch.eye(3, dtype=torch.float64)
    assert manifold.dist(eye[None], rotation[None]).isnan().all()


@pytest.mark.parametrize("name", CONSTRAINED)
def test_retractions_leave_along_the_step_and_miss_the_geodesic_by_t_cubed(name):
    # Polar factor and sphere: third order; the QR factor: second.
    manifold, q, h = pair(name)
    retractions = {"retract": 3} | ({"retract_qr": 2} if name == "stiefel" else {})
    for retraction, order in retractions.items():
        t = torch.tensor([1e-1, 1e-2], dtype=torch.float64)
        errors = torch.stack(
            [manifold.norm(getattr(manifold, retraction)(q, s * h) - manifold.exp(q, s * h)) for s in t]
        )
        measured = (errors[0] / errors[1]).log10()
        assert (measured - order).abs().max() < 0.2


def test_distances_are_exact_for_points_that_are_close_or_opposite():
    manifold = MANIFOLDS["sphere"]
    q = torch.zeros(1, 4, 1, dtype=torch.float64)
    q[0, 0] = 1
    assert math.isclose(manifold.dist(q, -q), math.pi)
    near = q.clone()
    near[0, 1] = 1e-12
    assert math.isclose(manifold.dist(q, manifold.project(near)), 1e-12, rel_tol=1e-9)  # acos would say 0


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1e20])
def test_projection_and_root_hold_at_extreme_scales_in_float32(name, scale):
    manifold = get_manifold(name)
    v = torch.randn(5, 6, 3) * scale
    assert manifold.residual(manifold.project(v)).max() < 1e-5
    s = manifold.root(v)
    torch.testing.assert_close(
        manifold.scaled(manifold.scaled(v, manifold.inverse(s)), s) / scale, v / scale, atol=1e-4, rtol=0
    )

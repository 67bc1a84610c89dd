"""Points at which a formula divides by zero, or has no unique answer: each has a stated result."""

import pytest
import torch

from lightning_fgsgd.manifolds import get_manifold
from tests.manifolds.strategies import CONSTRAINED

HARD = {
    "zero": torch.zeros(5, 3),
    "one zero column": torch.tensor(
        [[1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    ),
    "rank one": torch.outer(torch.arange(1.0, 6.0), torch.tensor([1.0, -2.0, 0.5])),
    "equal columns": torch.ones(5, 3),
    "equal singular values": 7 * torch.eye(5)[:, :3],
    "negative identity": -torch.eye(5)[:, :3],
    "nearly singular": torch.eye(5)[:, :3] * torch.tensor([1.0, 1e-6, 1e-12]),
    "denormal": torch.full((5, 3), 1e-40),
    "largest": torch.full((5, 3), 3e38),
}


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("point", HARD)
def test_every_finite_matrix_has_a_nearest_point_and_always_the_same(name, point, dtype):
    manifold, v = get_manifold(name), HARD[point].to(dtype)
    q = manifold.project(v)
    assert manifold.residual(q) < (1e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(q, manifold.project(v.clone()))
    if dtype == torch.float64:  # none of a thousand points nearby is nearer
        others = manifold.project(q + 0.1 * torch.randn(1000, 5, 3, dtype=dtype))
        size = max(1.0, float(v.abs().max()))
        assert ((v - q) / size).norm() <= ((v - others) / size).flatten(1).norm(dim=1).min() + 1e-12


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("point", [k for k in HARD if k not in ("denormal", "largest")])
def test_a_weight_at_a_hard_point_keeps_its_gram_information_when_it_steps(name, point):
    # Zero parts stay zero; a singular Gram matrix stays the same singular one.
    manifold, omega = get_manifold(name), HARD[point].double()
    s = manifold.root(omega)
    q = manifold.scaled(omega, manifold.inverse(s))
    for seed in range(5):
        g = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q = manifold.retract(q, -0.3 * manifold.tangent(q, manifold.scaled(g, s)))
    moved = manifold.scaled(q, s)
    assert moved.isfinite().all()
    torch.testing.assert_close(manifold.fixed(moved), manifold.fixed(omega), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_matrices_that_are_not_finite_stay_so_and_leave_the_others_alone(name, bad):
    manifold = get_manifold(name)
    v = torch.randn(3, 5, 3, dtype=torch.float64)
    q, h = manifold.project(v), torch.randn(3, 5, 3, dtype=torch.float64)
    h = manifold.tangent(q, h)
    broken_v, broken_h = v.clone(), h.clone()
    broken_v[1, 2, 0] = broken_h[1, 2, 0] = bad
    operations = {
        "project": (manifold.project(broken_v), manifold.project(v)),
        "tangent": (manifold.tangent(q, broken_h), manifold.tangent(q, h)),
        "retract": (manifold.retract(q, broken_h), manifold.retract(q, h)),
        "exp": (manifold.exp(q, broken_h), manifold.exp(q, h)),
        "dist": (manifold.dist(q, broken_v), manifold.dist(q, q) + manifold.dist(q, v)),
        "root": (manifold.root(broken_v), manifold.root(v)),
        "inverse of root": (manifold.inverse(manifold.root(broken_v)), manifold.inverse(manifold.root(v))),
        "residual": (manifold.residual(broken_v), manifold.residual(v)),
    }
    if name == "stiefel":
        operations["retract_qr"] = (manifold.retract_qr(q, broken_h), manifold.retract_qr(q, h))
    for operation, (broken, whole) in operations.items():
        assert not broken[1].isfinite().all(), operation
        if operation != "dist":
            torch.testing.assert_close(broken[[0, 2]], whole[[0, 2]], atol=1e-12, rtol=0, msg=operation)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_step_of_nothing_stays_and_opposite_points_are_told(name):
    manifold = get_manifold(name)
    q = manifold.random(4, 5, 3, dtype=torch.float64)
    zero = torch.zeros_like(q)
    torch.testing.assert_close(manifold.retract(q, zero), q, atol=1e-14, rtol=0)
    torch.testing.assert_close(manifold.exp(q, zero), q, atol=1e-14, rtol=0)
    assert manifold.dist(q, q).max() == 0

"""The geometry that a step uses, against the manifolds' own, against exact arithmetic, and at singular points."""

import pytest
import torch

from lightning_fgsgd.factors import factor, inverse_factor, rounded_inverse
from lightning_fgsgd.geometry import Geometry
from lightning_fgsgd.manifolds import get_manifold
from lightning_fgsgd.manifolds.stiefel import _REACH, _SERIES, _SERIES_REACH, Stiefel

NAMES = ["sphere", "oblique", "stiefel", "euclidean"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "p"), [(3, 3), (9, 4), (40, 16), (5, 1)])
def test_normal_parts_and_inverse_roots_are_the_manifolds_own_projection_and_retraction(name, n, p):
    manifold = get_manifold(name)
    q = manifold.random(20, n, p, dtype=torch.float64)
    g = torch.randn(20, n, p, dtype=torch.float64)
    h = 0.3 * manifold.tangent(q, torch.randn(20, n, p, dtype=torch.float64)) / n**0.5
    geometry = Geometry([(manifold, True)], 1.0)
    torch.testing.assert_close(geometry.tangent(q, g), manifold.tangent(q, g), atol=1e-12, rtol=0)
    within, new = geometry.retract(q + h)
    assert within is True
    torch.testing.assert_close(new, manifold.retract(q, h), atol=1e-12, rtol=0)


@pytest.mark.parametrize("double", [False, True])
def test_so_many_iterations_of_newton_schulz_bring_the_whole_spectrum_to_rounding(double):
    # A matrix's error is that of its eigenvalues, and these are in [1, 1 + t] divided by 1 + t/2.
    for iterations, t in _REACH[double].items():
        c = 2 / (2 + t)
        y = torch.linspace(1, 1 + t, 10_001, dtype=torch.float64) * c
        lam, z = y.clone(), torch.ones_like(y)
        for _ in range(iterations):
            correction = (3 - z * y) / 2
            y, z = y * correction, z * correction
        assert (z.square() * lam - 1).abs().max() < (1e-14 if double else 2e-7) * 1.5


def test_the_series_is_the_inverse_root_to_rounding_over_its_reach():
    t = _SERIES_REACH
    y = torch.linspace(1, 1 + t, 10_001, dtype=torch.float64) / (1 + t / 2)
    series = sum(c * (y - 1) ** degree for degree, c in enumerate(_SERIES))
    assert (series.square() * y - 1).abs().max() < 3e-7
    assert [round(c, 6) for c in _SERIES[:4]] == [1.0, -0.5, 0.375, -0.3125]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("p", [1, 3, 4, 16, 64])
def test_the_retraction_is_the_polar_factor_to_rounding_over_all_of_its_reach(p, double):
    dtype = torch.float64 if double else torch.float32
    reach = Stiefel.reach(torch.zeros(1, p, p, dtype=dtype))
    for t in (1e-12, 1e-4, 0.05, 0.4, 1.0, reach):
        q = Stiefel().random(50, 2 * p, p, dtype=torch.float64)
        h = Stiefel().tangent(q, torch.randn(50, 2 * p, p, dtype=torch.float64))
        h *= (min(t, reach) ** 0.5 / h.norm(dim=(1, 2)))[:, None, None]
        v = q + h
        z = Stiefel().inverse_root((v.mT @ v).to(dtype))
        end = (v.to(dtype) @ z).double()
        error = (end.mT @ end - torch.eye(p, dtype=torch.float64)).norm(dim=(1, 2)).max()
        assert error < (2e-13 if double else 2e-5) * p**0.5
        torch.testing.assert_close(end, Stiefel().retract(q, h), atol=1e-13 if double else 1e-5, rtol=0)


def test_steps_beyond_reach_are_told_and_so_are_those_that_are_not_finite():
    manifold = get_manifold("stiefel")
    q = manifold.random(4, 6, 3, dtype=torch.float64)
    h = manifold.tangent(q, torch.randn(4, 6, 3, dtype=torch.float64))
    h /= 2 * h.norm(dim=(1, 2), keepdim=True)
    h[1] *= 100
    h[2, 0, 0] = torch.nan
    geometry = Geometry([(manifold, True)], 1.0)
    within, _ = geometry.retract(q + h)
    assert within.flatten().tolist() == [True, False, False, True]
    far = geometry.retract_far(q[:2], h[:2])
    torch.testing.assert_close(far, manifold.retract(q[:2], h[:2]))


@pytest.mark.parametrize("kind", ["regular", "dependent column", "zero column", "rank one", "zero", "huge", "tiny"])
def test_a_factor_gives_the_gram_matrix_back_and_its_inverse_the_unit_point(kind):
    omega = torch.randn(30, 9, 4, dtype=torch.float64)
    if kind == "dependent column":
        omega[..., 2] = omega[..., 0] - 3 * omega[..., 1]
    elif kind == "zero column":
        omega[..., 1] = 0
    elif kind == "rank one":
        omega = omega[..., :1] * torch.randn(30, 1, 4, dtype=torch.float64)
    elif kind != "regular":
        omega *= {"zero": 0.0, "huge": 1e20, "tiny": 1e-20}[kind]
    gram = omega.mT @ omega
    size = gram.norm(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    upper = factor(gram, 1e-14)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.mT @ upper / size, gram / size, atol=1e-13, rtol=0)
    q = omega @ inverse_factor(upper)
    torch.testing.assert_close(Geometry([(get_manifold("stiefel"), True)], 1.0, None, upper).unit(omega), q)
    # Orthonormal columns, and zero ones where omega has no direction of its own.
    alive = (upper.diagonal(dim1=1, dim2=2) > 0).double()
    torch.testing.assert_close(q.mT @ q, torch.diag_embed(alive), atol=1e-6, rtol=0)
    torch.testing.assert_close(q @ upper / size.sqrt(), omega / size.sqrt(), atol=1e-6, rtol=0)


def test_weights_that_others_changed_are_not_straightened_before_they_are_looked_at():
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(5, 30, 4, dtype=torch.float64, generator=generator)
    upper = factor(omega.mT @ omega, 1e-14)
    geometry = Geometry([(get_manifold("stiefel"), True)], 1.0, None, upper, inverse_factor(upper))
    changed = omega + 0.1 * torch.randn(omega.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(geometry.unit(changed), changed @ inverse_factor(upper), atol=1e-12, rtol=0)


def test_with_the_inverse_of_the_factor_rounding_leaves_columns_orthogonal_and_free_components_alone():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(2, 20, 12, 12, dtype=torch.float64, generator=generator))[0]
    omega = ((u * torch.logspace(0, -4, 12, dtype=torch.float64)) @ v).float()
    upper = factor(omega.double().mT @ omega.double(), 1e-14).float()
    free = (torch.arange(20) % 2 == 0)[:, None, None]
    upper = torch.where(free, torch.eye(12), upper)
    manifolds = [(get_manifold("euclidean"), free), (get_manifold("stiefel"), ~free)]
    q = Geometry(manifolds, 1.0, None, upper, rounded_inverse(upper)).unit(omega)
    assert torch.equal(q[::2], omega[::2])
    apart = [(x.mT @ x).triu(1).abs().max() for x in (q[1::2], (omega @ rounded_inverse(upper))[1::2])]
    assert apart[0] < 3e-6 < 1e-4 < apart[1]
    assert (q - omega.double() @ inverse_factor(upper.double()))[
        1::2
    ].abs().max() < 1e-2  # it is that, but for rounding

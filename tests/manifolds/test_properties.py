"""What must hold for every shape, batch, memory layout and scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fgsgd.manifolds import get_manifold
from tests.manifolds.strategies import CONSTRAINED, SCALES, matrices

pytestmark = pytest.mark.parametrize("name", CONSTRAINED)
many = settings(deadline=None, max_examples=60)


def like(x, seed=1):
    """Other random values of the shape of ``x``."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@many
@given(v=matrices(scaled=True))
def test_projections_are_on_the_manifold_and_are_their_own_projections(name, v):
    manifold = get_manifold(name)
    q = manifold.project(v)
    assert q.shape == v.shape
    assert manifold.residual(q).max() < 1e-12
    torch.testing.assert_close(manifold.project(q), q, atol=1e-12, rtol=0)


@many
@given(v=matrices(), exponent=SCALES)
def test_a_projection_does_not_depend_on_the_scale_or_the_layout(name, v, exponent):
    manifold = get_manifold(name)
    plain = manifold.project(v.contiguous())
    gap = 1.0
    if name == "stiefel":  # the polar factor of an ill-conditioned matrix is as badly conditioned
        gap = float(torch.linalg.svdvals(v).amin(-1).min()) / 10
    torch.testing.assert_close(manifold.project(v), plain, atol=1e-12 / gap, rtol=0)
    torch.testing.assert_close(manifold.project(v * 10.0**exponent), plain, atol=1e-12 / gap, rtol=0)


@many
@given(v=matrices())
def test_tangent_projections_are_orthogonal_projections_of_the_right_dimension(name, v):
    manifold = get_manifold(name)
    q, g, other = manifold.project(v), like(v), like(v, 2)
    h = manifold.tangent(q, g)
    scale = manifold.norm(g).max()
    torch.testing.assert_close(manifold.tangent(q, h), h, atol=1e-12 * scale.item(), rtol=0)  # idempotent
    torch.testing.assert_close(manifold.inner(h, other), manifold.inner(g, manifold.tangent(q, other)))  # self-adjoint
    assert (manifold.norm(h) <= manifold.norm(g) * (1 + 1e-12)).all()
    # Tangent to first order: the fixed part of the Gram matrix does not change along h.
    moved = manifold.fixed(q + 1e-6 * h) - manifold.fixed(q)
    assert moved.abs().max() <= 1e-11 * float(scale**2) + 1e-13


@many
@given(v=matrices(), exponent=SCALES)
def test_retractions_end_on_the_manifold_however_long_the_step(name, v, exponent):
    manifold = get_manifold(name)
    q = manifold.project(v)
    h = manifold.tangent(q, like(v)) * 10.0**exponent
    r = manifold.retract(q, h)
    assert manifold.residual(r).max() < 1e-12
    if name == "stiefel":
        assert manifold.residual(manifold.retract_qr(q, h)).max() < 1e-12


@many
@given(v=matrices(), exponent=SCALES)
def test_retractions_end_on_the_manifold_in_float32_too(name, v, exponent):
    manifold = get_manifold(name)
    q = manifold.project(v).float()
    h = manifold.tangent(q, like(v).float()) * 10.0**exponent
    assert manifold.residual(manifold.retract(q, h).double()).max() < 1e-5


@many
@given(v=matrices(largest=16), t=st.sampled_from([1e-3, 0.3, 1.0]))
def test_exponentials_and_transports_keep_to_the_manifold_and_its_tangent_spaces(name, v, t):
    manifold = get_manifold(name)
    q = manifold.project(v)
    h = manifold.tangent(q, like(v))
    end = manifold.exp(q, t * h / manifold.norm(h).clamp_min(1)[..., None, None])
    assert manifold.residual(end).max() < 1e-12
    carried = manifold.transport(end, h)
    torch.testing.assert_close(manifold.tangent(end, carried), carried, atol=1e-11, rtol=0)
    assert (manifold.norm(carried) <= manifold.norm(h) * (1 + 1e-12)).all()


@many
@given(v=matrices(scaled=True))
def test_a_weight_is_its_unit_point_times_its_scale(name, v):
    manifold = get_manifold(name)
    s = manifold.root(v)
    q = manifold.scaled(v, manifold.inverse(s))
    back = manifold.scaled(q, s)
    assert (manifold.norm(back - v) <= 1e-7 * manifold.norm(v)).all()
    fixed, target = manifold.fixed(v), manifold.target(s)
    assert ((fixed - target).norm(dim=-1) <= 1e-7 * fixed.norm(dim=-1)).all()

"""Momentum of plain SGD, taken over where its weights are constrained in the middle of training."""

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups


def constrained_after(steps, gradient, settings, *, groups, fused=False, **options):
    """A layer after steps of plain SGD with one gradient, constrained then; and its momentum just before."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    plan = pom_param_groups(layer, cutting="filter", groups=groups, **settings).plan
    optimizer = FGSGD([layer.weight], momentum=0.9, fused=fused, **options)
    for _ in range(steps):
        layer.weight.grad = gradient(layer.weight.detach())
        optimizer.step()
    before = optimizer.state[layer.weight]["momentum_buffer"].clone()
    optimizer.constrain(plan)
    return layer.weight, optimizer, before


@pytest.mark.parametrize("rho", [1.0, 100.0])
def test_each_sphere_has_its_tangent_momentum_over_the_normaliser_of_its_mean_gradient(rho):
    settings = {"block_size": 1, "manifolds": ["sphere"], "start": "project"}
    weight, optimizer, b = constrained_after(
        5, lambda w: torch.sin(torch.arange(96.0).double()).view(8, 12) * torch.arange(8.0).double()[:, None] / 8,
        settings, groups="each", lr=0.01, rho=rho, metric="unit",
    )  # fmt: skip
    q = weight.detach()
    tangent = b - (b * q).sum(1, keepdim=True) * q
    norms = 0.1 * tangent.norm(dim=1, keepdim=True)
    gamma = (norms.square() * (2 * rho + norms).square()).clamp_min(1.0).sqrt()  # Eq. 7, c = 1
    if rho == 100:
        assert gamma.max() > 10
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], tangent / gamma)


def test_without_a_normaliser_it_is_the_tangent_part_alone():
    settings = {"block_size": 1, "manifolds": ["sphere"], "start": "project"}
    weight, optimizer, b = constrained_after(
        3, lambda w: 50 * torch.ones_like(w), settings, groups=1, lr=0.01, rho=None, metric="unit"
    )
    q = weight.detach()
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], b - (b * q).sum(1, keepdim=True) * q)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("settings", [{"manifolds": ["sphere"]}, {"block_size": 4, "manifolds": ["stiefel"]}, {}])
def test_of_a_gradient_that_stays_it_is_the_momentum_that_fgsgd_itself_comes_to(settings, dampening):
    settings = {"block_size": 2, "start": "preserve", **settings}
    steady = 4 * torch.cos(torch.arange(96.0).double()).view(8, 12)
    options = {"rho": 30.0, "dampening": dampening, "metric": "start"}
    # At a rate of next to nothing, so that the weight, and with it what is tangent, stays.
    weight, late, _ = constrained_after(400, lambda w: steady, settings, groups=2, lr=1e-12, **options)
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    own = FGSGD(
        pom_param_groups(layer, cutting="filter", groups=2, **settings), lr=1e-12, momentum=0.9, fused=False, **options
    )
    for _ in range(400):
        layer.weight.grad = steady
        own.step()
    expected = own.state[layer.weight]["momentum_buffer"]
    assert expected.norm() < 0.05 * steady.norm() / 0.1
    torch.testing.assert_close(late.state[weight]["momentum_buffer"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, None])
def test_the_first_step_on_the_manifolds_is_no_longer_than_fgsgd_takes_them(fused):
    lr, rho = 12.0, 100.0
    settings = {"block_size": 1, "manifolds": ["sphere"], "start": "project"}
    weight, optimizer, _ = constrained_after(
        20, lambda w: 7 * torch.sin(w * 50), settings, groups="each", fused=fused, lr=0.001, rho=rho, metric="unit"
    )
    optimizer.param_groups[0]["lr"] = lr
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    angles = 2 * ((weight.detach() - before).norm(dim=1) / 2).asin()
    longest = lr / (2 * rho) / (1 - 0.9)
    assert angles.max() <= longest
    assert angles.max() > 0.1 * longest


def test_an_estimated_rho_begins_at_no_distance():
    settings = {"block_size": 1, "manifolds": ["sphere"], "start": "project"}
    options = {"settings": settings, "groups": 1, "lr": 0.01, "metric": "unit"}
    steady = 3 * torch.ones(8, 12).double()
    found = [constrained_after(5, lambda w: steady, rho=rho, **options) for rho in ("average", 0.0)]
    estimated, none = (optimizer.state[weight]["momentum_buffer"] for weight, optimizer, _ in found)
    torch.testing.assert_close(estimated, none)

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
def test_each_sphere_has_its_tangent_momentum_over_the_normaliser_of_gradients_that_add_up_to_it(rho):
    settings = {"block_size": 1, "manifolds": ["sphere"], "start": "project"}
    weight, optimizer, b = constrained_after(
        5, lambda w: torch.sin(torch.arange(96.0).double()).view(8, 12) * torch.arange(8.0).double()[:, None] / 8,
        settings, groups="each", lr=0.01, rho=rho, metric="unit",
    )  # fmt: skip
    q = weight.detach()
    tangent = b - (b * q).sum(1, keepdim=True) * q
    norms = (1 - 0.9**2) ** 0.5 * tangent.norm(dim=1, keepdim=True)
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


@pytest.mark.parametrize("rho", [1.0, 100.0])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("settings", [{"manifolds": ["sphere"]}, {"block_size": 4, "manifolds": ["stiefel"]}, {}])
@pytest.mark.parametrize(("noise", "least", "most"), [(1.0, 0.5, 1.5), (0.0, 0.04, 0.3)])
def test_it_is_as_long_as_fgsgds_own_where_gradients_are_noise_and_not_longer_where_they_stay(
    settings, dampening, noise, least, most, rho
):
    settings = {"block_size": 2, "start": "preserve", **settings}
    options = {"rho": rho, "dampening": dampening, "metric": "start"}
    torch.manual_seed(1)
    given = 4 * torch.randn(200, 8, 12).double() * noise + 4 * torch.cos(torch.arange(96.0).double()).view(8, 12) * (
        1 - noise
    )
    queue = iter(given)
    # At a rate of next to nothing, so that the weight, and with it what is tangent, stays.
    weight, late, _ = constrained_after(200, lambda w: next(queue), settings, groups=2, lr=1e-12, **options)
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    groups = pom_param_groups(layer, cutting="filter", groups=2, **settings)
    own = FGSGD(groups, lr=1e-12, momentum=0.9, fused=False, **options)
    for gradient in given:
        layer.weight.grad = gradient
        own.step()
    found, expected = (o.state[w]["momentum_buffer"] for o, w in ((late, weight), (own, layer.weight)))
    assert least <= found.norm() / expected.norm() <= most
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9


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

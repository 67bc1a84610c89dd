import math

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.components import cutting_of
from lightning_fgsgd.scaling import gamma, preserved_radius, radius


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Linear(20, 30)])
def test_gamma_squared_in_the_xavier_reading_is_half_of_glorots_variance(layer):
    cutting = cutting_of(layer)
    if cutting.conv_groups == 1:  # torch counts the fan-out of one conv group
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        assert math.isclose(gamma(cutting) ** 2, 0.5 * 2 / (fan_in + fan_out))
    kernel = math.prod(cutting.kernel)
    assert math.isclose(gamma(cutting) ** -2, layer.weight[0].numel() + layer.weight.shape[0] * kernel)


@pytest.mark.parametrize("r", [1.0, 0.2])
def test_weight_normalisation_is_the_sphere_with_one_neuron_a_component(r):
    # Section 4.2. Salimans and Kingma write w = g · v / ‖v‖. At ‖v‖ = 1 and g = R, the gradient for v is the Riemannian one.
    layer = nn.Linear(7, 5, bias=False).double()
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5, bias=False).double())
    groups = pom_param_groups(layer, manifolds=["sphere"], block_size=1, start="random")
    optimizer = FGSGD(groups, lr=0.1, rho=None, metric="unit")
    optimizer.rescale(layer.weight, torch.full((5,), r, dtype=torch.float64))
    with torch.no_grad():
        normalised.parametrizations.weight.original0.fill_(r)
        normalised.parametrizations.weight.original1.copy_(layer.weight / r)
    torch.testing.assert_close(normalised.weight, layer.weight)
    x, y = torch.randn(30, 7, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    for net in (layer, normalised):
        nn.functional.mse_loss(net(x), y).backward()
    gradient = optimizer.poms[layer.weight].riemannian(layer.weight.detach(), layer.weight.grad, "unit")
    torch.testing.assert_close(gradient, normalised.parametrizations.weight.original1.grad)
    # A step and the retraction are a step of SGD on v, and the normalisation of what it gives.
    v = normalised.parametrizations.weight.original1
    moved = v.detach() - 0.1 * v.grad
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), r * moved / moved.norm(dim=1, keepdim=True))


def test_r_is_the_start_of_weight_normalisation_times_gamma():
    # Their data-dependent start, g = 1/σ[v·x/‖v‖], is 1/λ for features of one deviation that are uncorrelated.
    cutting = cutting_of(nn.Linear(6, 4), block_size=1)
    basis = torch.linalg.qr(torch.randn(200, 7, dtype=torch.float64)).Q
    x = basis[:, 1:] - basis[:, 1:].mean(0)
    x = 3.0 * 200**0.5 * torch.linalg.qr(x).Q  # uncorrelated to the last digit, each of deviation 3
    v = torch.randn(4, 6, dtype=torch.float64)
    start = 1 / (x @ (v / v.norm(dim=1, keepdim=True)).mT).std(0, correction=0)
    r = radius(gamma(cutting), x.std(0, correction=0).mean().expand(4))
    torch.testing.assert_close(r, gamma(cutting) * start)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 1, 3), nn.Conv2d(8, 12, 3), nn.Linear(20, 30), nn.Conv2d(8, 8, 7, groups=8)]
)
def test_gamma_squared_is_below_the_number_of_columns(layer):
    # Section 4.1: "by definition, γ² < B".
    cutting = cutting_of(layer)
    assert gamma(cutting) ** 2 < cutting.p
    assert gamma(cutting, "literal", feature_map=1) ** 2 < cutting.p


def test_gamma_read_literally_counts_the_output_feature_map():
    cutting = cutting_of(nn.Conv2d(8, 12, 3))
    assert math.isclose(gamma(cutting, "literal", feature_map=49), (8 * 9 + 12 * 49) ** -0.5)
    with pytest.raises(ValueError, match="needs the size of the output feature map"):
        gamma(cutting, "literal")
    with pytest.raises(ValueError, match="unknown reading 'he'; choose from 'xavier', 'literal'"):
        gamma(cutting, "he")


def test_radius_is_gamma_over_lambda_with_lambda_at_least_one():
    std = torch.tensor([0.5, 2.0])
    assert radius(0.3, std).tolist() == pytest.approx([0.3, 0.15])
    assert radius(0.3, std, clamp=False).tolist() == pytest.approx([0.6, 0.15])


def test_preserved_radius_is_the_ratio_to_the_first_lambda_and_stays_where_there_is_none():
    first, std = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]), torch.tensor([2.0, 0.1, 0.0, 1.0, math.nan])
    current = torch.full((5,), 0.7)
    assert preserved_radius(first, std, current).tolist() == pytest.approx([0.5, 20.0, 0.7, 0.7, 0.7])
    assert preserved_radius(first, std, current, limit=10.0)[1] == 10.0

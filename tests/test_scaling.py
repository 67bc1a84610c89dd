import math

import pytest
import torch
from torch import nn

from lightning_fgsgd.components import cutting_of
from lightning_fgsgd.scaling import gamma, preserved_radius, radius
from lightning_fgsgd.stepsize import step_normalizer


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Linear(20, 30)])
def test_gamma_squared_in_the_xavier_reading_is_half_of_glorots_variance(layer):
    cutting = cutting_of(layer)
    if cutting.conv_groups == 1:  # torch counts the fan-out of one conv group
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        assert math.isclose(gamma(cutting) ** 2, 0.5 * 2 / (fan_in + fan_out))
    kernel = math.prod(cutting.kernel)
    assert math.isclose(gamma(cutting) ** -2, layer.weight[0].numel() + layer.weight.shape[0] * kernel)


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


def test_eq_7_is_eq_5_on_spheres():
    norm = torch.linspace(0, 50, 1001, dtype=torch.float64)
    eq7 = (norm**2 * (2 + norm) ** 2).clamp_min(1).sqrt()
    torch.testing.assert_close(step_normalizer(norm, rho=1.0, curvature=1.0), eq7)


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("c", [0.0, 1.0, 300.0])
def test_eq_5_number_by_number(rho, c):
    for norm in (0.0, 1e-3, 0.3, 1.0, 40.0):
        gamma2 = max((2 * rho + norm) ** 2, 1 + c * (rho + norm))
        expected = math.sqrt(max(1.0, norm**2 * gamma2))
        got = step_normalizer(torch.tensor(norm, dtype=torch.float64), rho, c).item()
        assert math.isclose(got, expected, rel_tol=1e-12)

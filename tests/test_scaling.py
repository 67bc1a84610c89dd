import math

import pytest
import torch
from torch import nn

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

"""The two-stage renormalisation of the paper: γ from the layer's shape (Eq. 2), λ from the features, R from both.

R¹ = 1, and for later epochs R^t = γ / λ^t. A layer that keeps its pretrained scale (``start="preserve"``) instead has
R^t = R¹ · λ¹ / λ^t: the paper's rule up to the constant that makes it continuous at the pretrained weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting

__all__ = ["GAMMA_READINGS", "gamma", "radius"]

GAMMA_READINGS = ("xavier", "literal")


def gamma(cutting: Cutting, reading: str = "xavier", feature_map: int | None = None) -> float:
    """γ = sqrt(1 / (b + b̂)) of Eq. 2, with b = C·A·B the fan-in.

    Args:
        cutting: the layer's components.
        reading: what b̂ is. ``"xavier"``: D·A·B, the fan-out of Glorot and Bengio, so that γ² is half of their
            variance. ``"literal"``: D times the size of the output feature map.
        feature_map: pixels (or tokens) of the output feature map; needed for ``"literal"`` only.
    """
    if reading not in GAMMA_READINGS:
        raise ValueError(f"gamma: unknown reading {reading!r}; choose from {', '.join(map(repr, GAMMA_READINGS))}")
    if reading == "literal" and feature_map is None:
        raise ValueError("gamma='literal' needs the size of the output feature map")
    size = math.prod(cutting.kernel) if reading == "xavier" else feature_map
    return (cutting.fan_in + cutting.out_channels * (size or 1)) ** -0.5


def radius(gamma: float, std: Tensor, clamp: bool = True) -> Tensor:
    """R = γ / λ per component, for λ = ``std`` (k,). ``clamp`` raises λ to 1 where it is less, as the paper needs."""
    return gamma / (std.clamp_min(1.0) if clamp else std)


def preserved_radius(first: Tensor, std: Tensor, current: Tensor, limit: float | None = None) -> Tensor:
    """R = R¹ · λ¹ / λ^t with R¹ = 1, kept within [1/limit, limit]; all tensors (k,).

    Where the ratio is not a number, or either λ is zero, ``current`` stays.
    """
    ratio = first / std
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, current)
    return ratio if limit is None else ratio.clamp(1 / limit, limit)

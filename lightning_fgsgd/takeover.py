"""Momentum of plain SGD, taken over by FG-SGD where weights are constrained in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import eager
from lightning_fgsgd.manifolds import working
from lightning_fgsgd.pom import POM
from lightning_fgsgd.precision import exact
from lightning_fgsgd.step import Options
from lightning_fgsgd.stepsize import step_normalizer

__all__ = ["taken_over"]


@exact
@torch.no_grad()
def taken_over(pom: POM, weight: Tensor, buffer: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The momentum of FG-SGD that belongs to one of plain SGD, tangent where ``weight`` is now.

    SGD adds up gradients, FG-SGD gradients over 𝔤 (Eq. 5), which with a large ρ is about 2ρ times their norm. Gradients of
    norm ‖g‖ that are noise add up to one of (1 − dampening)/√(1 − momentum²) · ‖g‖, so it is divided by the 𝔤 of ‖g‖. Of
    gradients that stay alike it comes out shorter than FG-SGD's own, by up to (1 + momentum)/(1 − momentum), not longer.

    Args:
        pom: where ``weight`` has been put, whole.
        weight: on its manifolds.
        buffer: b, of the weight's shape.
        group: the parameter group.
    """
    carried = pom.riemannian(weight, buffer, group["metric"])
    if group["rho"] is None:
        return carried
    momentum, fresh = group["momentum"], 1.0 - group["dampening"]
    typical = working(buffer) * ((1.0 - momentum**2) ** 0.5 / fresh if momentum < 1 and fresh else 1.0)
    options = Options(1.0, 0.0, 0.0, 0.0, 1.0)
    squares = eager.squares(pom, weight, typical, group["metric"], options, chunk=2**19)
    norms = pom.group_sums(squares).sqrt().to(carried)
    rho = 0.0 if group["rho"] == "average" else group["rho"]  # there is no average yet, so no distance to it
    share = 1 / step_normalizer(norms, rho, pom.curvatures(group["metric"]).to(norms))
    of_component = share[pom.sets.group.long()][:, None, None]
    return torch.empty_like(carried).copy_(pom.cutting.join(pom.cutting.cut(carried) * of_component))

"""What there is to see of one constrained weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ProductOfManifolds"]


class ProductOfManifolds(NamedTuple):
    """A look at one constrained weight, as ``optimizer.pom(param)`` gives it. k components of n x p.

    Attributes:
        components: the weights ω as they stand at the call, (k, n, p).
        manifold: index of each component's manifold in ``manifold_names``, (k,).
        manifold_names: names of the manifolds.
        group: number of each component's group, (k,).
        radius: R of each component, (k,).
        scale: S of each component, (k, p, p); the identity where the start was not ``"preserve"``.
        start: how the weight got onto its manifolds.
    """

    components: Tensor
    manifold: Tensor
    manifold_names: tuple[str, ...]
    group: Tensor
    radius: Tensor
    scale: Tensor
    start: str

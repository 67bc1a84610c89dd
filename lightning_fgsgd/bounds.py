"""Norms of components and groups, beside the entries of the paper's Table 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Norms", "component_norms", "group_norms", "table2"]


class Norms(NamedTuple):
    """Spectral norm, Frobenius norm and ℓ2→1 norm (the sum of the columns' norms), each of one shape."""

    spectral: Tensor
    frobenius: Tensor
    l21: Tensor


def component_norms(components: Tensor) -> Norms:
    """Norms of every component, each (k,), of ``components`` (k, n, p)."""
    # The largest eigenvalue of the small Gram matrix instead of singular values of the tall component.
    spectral = torch.linalg.eigvalsh(components.mT @ components)[..., -1].clamp_min(0).sqrt()
    columns = components.norm(dim=-2)
    return Norms(spectral, columns.norm(dim=-1), columns.sum(-1))


def group_norms(components: Tensor, group: Tensor) -> Norms:
    """Norms of every concatenated group ω_g = [ω_ι], each (G,); the spectral one is a bound.

    The components stand side by side. Frobenius and ℓ2→1 norms are then exact; the spectral norm is at most the root of
    the sum of the components' squared spectral norms, which is what is returned.
    """
    spectral, frobenius, l21 = component_norms(components)
    zeros = spectral.new_zeros(int(group.max()) + 1)
    return Norms(
        zeros.index_add(0, group, spectral.square()).sqrt(),
        zeros.index_add(0, group, frobenius.square()).sqrt(),
        zeros.index_add(0, group, l21),
    )


def table2(manifold: str, p: int) -> tuple[float | None, float, float]:
    """The paper's Table 2 for a unit component with p columns: spectral, Frobenius, ℓ2→1; None is σ(ω) itself.

    The ℓ2→1 column of the table, 1 and p^(1/4), is not what the usual definition gives: p for Stiefel and Oblique, and
    between 1 and √p for Sphere. :func:`component_norms` computes the definition.
    """
    entries = {"sphere": (None, 1.0, 1.0), "oblique": (None, p**0.5, p**0.25), "stiefel": (1.0, p**0.5, p**0.25)}
    if manifold not in entries:
        raise ValueError(f"manifold: Table 2 has no entry for {manifold!r}; it has {', '.join(map(repr, entries))}")
    return entries[manifold]

"""Norms of components and groups, the entries of the paper's Table 2, and the generalisation bounds of its Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LogBounds", "Norms", "component_norms", "group_norms", "table1", "table2"]


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


class LogBounds(NamedTuple):
    """Natural logarithms of the bounds of Table 1, up to their constants and logarithmic factors."""

    neyshabur2015: float
    bartlett2017: float
    neyshabur2018: float


def table1(layers: Sequence[Norms], samples: int, width: int) -> LogBounds:
    r"""The three bounds of Table 1, with dynamic group scaling, for a network whose layers have these group norms.

    With δ the norms of the groups g of layer l, L layers and N samples:

    .. math::
        \frac{2^L}{\sqrt N} \prod_l \prod_g δ_{g,l,F}, \qquad
        \frac{1}{\sqrt N} \prod_l \prod_g δ_{g,l,2}
        \Big(\sum_l \prod_g \big(\tfrac{δ_{g,l,2→1}}{δ_{g,l,2}}\big)^{2/3}\Big)^{3/2}, \qquad
        \frac{1}{\sqrt N} \prod_l \prod_g δ_{g,l,2} \sqrt{L^2 ϖ \sum_l \prod_g \tfrac{δ_{g,l,F}^2}{δ_{g,l,2}^2}}

    In logarithms, because products over the groups of all layers overflow.

    Args:
        layers: norms of the groups of each layer, each (G_l,).
        samples: N, training samples.
        width: ϖ, the width that the third bound takes for all layers.

    Raises:
        ValueError: no layer, or samples or width below 1.
    """
    if not layers or samples < 1 or width < 1:
        raise ValueError(f"layers, samples, width: need at least one of each, got {len(layers)}, {samples}, {width}")
    depth = len(layers)
    spectral = torch.stack([n.spectral.log().sum() for n in layers])
    frobenius = torch.stack([n.frobenius.log().sum() for n in layers])
    l21 = torch.stack([n.l21.log().sum() for n in layers])
    root = -0.5 * math.log(samples)
    return LogBounds(
        root + depth * math.log(2) + float(frobenius.sum()),
        root + float(spectral.sum() + 1.5 * ((l21 - spectral) * 2 / 3).logsumexp(0)),
        root
        + float(spectral.sum() + 0.5 * (2 * (frobenius - spectral)).logsumexp(0))
        + 0.5 * math.log(depth**2 * width),
    )

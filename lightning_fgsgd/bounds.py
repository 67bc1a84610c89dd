"""The paper's Table 1 (generalisation bounds), Table 2 (norms), Proposition 1, Remark 1 and Bai-Yin law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.manifolds import working
from lightning_fgsgd.norms import Norms, component_norms, geometric_means, group_norms
from lightning_fgsgd.pom import POM

__all__ = ["CHECKS", "LayerNorms", "LogBounds", "bai_yin", "layer_norms", "table1", "table2"]

CHECKS = ("prop1_components", "prop1_groups", "remark1", "bai_yin")
_ROUNDING = 1e-5  # of float32 weights that are exactly at a bound


class LayerNorms(NamedTuple):
    """Norms of one constrained layer, and what the paper says of them. k components, G groups.

    Attributes:
        components: norms of every ω_ι, each (k,).
        groups: norms of every concatenated ω_g, each (G,).
        means: geometric means of the norms of each group's components, each (G,): lower bounds of ``groups`` (Remark 1).
        table2: the entries of Table 2 times R, each (k,); NaN where the table has none: Euclidean components, scales that
            were preserved, and σ(ω) itself.
        gamma: γ of the layer, Eq. 2.
    """

    components: Norms
    groups: Norms
    means: Norms
    table2: Norms
    gamma: float

    def cpu(self) -> LayerNorms:
        """The same on the CPU."""
        parts = [Norms(*(x.cpu() for x in norms)) for norms in (self.components, self.groups, self.means, self.table2)]
        return LayerNorms(parts[0], parts[1], parts[2], parts[3], self.gamma)

    def largest(self) -> dict[str, float]:
        """The largest norm of every kind: ``spectral`` of a component, ``group_spectral``, ``mean_spectral``,
        ``table2_spectral`` and so on; entries that Table 2 lacks are left out.
        """
        row = {}
        kinds = {"": self.components, "group_": self.groups, "mean_": self.means, "table2_": self.table2}
        for prefix, norms in kinds.items():
            for name, values in norms._asdict().items():
                known = values if prefix != "table2_" else values[~values.isnan()]
                if known.numel():
                    row[prefix + name] = float(known.max())
        return row

    def checks(self) -> dict[str, float]:
        """What share of the components, or groups, meets each claim of the paper: 1 where it holds throughout.

        ``prop1_components``: all three norms of ω_ι are at most 1, which R = γ/λ with λ >= 1 gives for kernels, and for
        blocks of p <= √(C + D) output neurons. ``prop1_groups``: the same of ω_g, as Proposition 1 says; by the usual
        definition it fails in wide layers, where ‖ω_g‖_F = √(|g| p) R. ``remark1``: no norm of ω_g is below the geometric
        mean of its components' norms, which always holds. ``bai_yin``: σ(ω_ι) <= 1/γ.
        """

        def share(passed: Tensor) -> float:
            return float(passed.float().mean())

        def at_most_one(norms: Norms) -> Tensor:
            return torch.stack(norms).amax(0) <= 1 + _ROUNDING

        reached = [group >= mean * (1 - _ROUNDING) for group, mean in zip(self.groups, self.means, strict=True)]
        shares = (
            share(at_most_one(self.components)),
            share(at_most_one(self.groups)),
            share(torch.stack(reached).all(0)),
            share(self.components.spectral * self.gamma <= 1 + _ROUNDING),
        )
        return dict(zip(CHECKS, shares, strict=True))


@torch.no_grad()
def layer_norms(pom: POM, weight: Tensor, gamma: float) -> LayerNorms:
    """Norms of ``weight`` as ``pom`` cuts and groups it, beside Table 2 and γ of :func:`~lightning_fgsgd.scaling.gamma`."""
    components = pom.cutting.cut(working(weight.detach()))
    group = pom.sets.group.long()
    norms = component_norms(components)
    rows = []
    for name in pom.sets.manifold_names:
        known = pom.start != "preserve" and name != "euclidean"
        rows.append([math.nan if x is None else x for x in table2(name, pom.cutting.p)] if known else [math.nan] * 3)
    entries = torch.tensor(rows).to(components)[pom.sets.manifold.long()] * pom.radius[:, None]
    return LayerNorms(
        norms,
        group_norms(components, group, norms),
        geometric_means(norms, group),
        Norms(*entries.unbind(1)),
        gamma,
    )


def bai_yin(n: int, columns: int, variance: float) -> float:
    """Spectral norm of a large n x ``columns`` matrix of independent entries of that variance (Bai and Yin 1993).

    ``(√n + √columns) √variance``: the limit for entries with four moments. Uniform points of a unit sphere of n x p matrices
    have the variance 1/(np), of the oblique and Stiefel manifolds 1/n; ω_g has p|g| columns of them.
    """
    return (n**0.5 + columns**0.5) * variance**0.5


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
    """The three bounds of Table 1, with dynamic group scaling, for a network whose layers have these group norms.

    With L layers, N samples, and δ the norms of group g of layer l:

        neyshabur2015: 2^L / √N · Π_l Π_g δ_F
        bartlett2017:  1 / √N · Π_l Π_g δ_2 · (Σ_l Π_g (δ_2→1 / δ_2)^(2/3))^(3/2)
        neyshabur2018: 1 / √N · Π_l Π_g δ_2 · √(L² ϖ Σ_l Π_g (δ_F / δ_2)²)

    In logarithms, because products over the groups of all layers overflow.

    Args:
        layers: norms of the groups of each layer, each (G_l,). Where one is 0, so are the bounds.
        samples: N, training samples.
        width: ϖ, the width that the third bound takes for all layers.

    Raises:
        ValueError: no layer, or samples or width below 1.
    """
    if not layers or samples < 1 or width < 1:
        raise ValueError(f"layers, samples, width: need at least one of each, got {len(layers)}, {samples}, {width}")
    if any(bool((norms.frobenius == 0).any()) for norms in layers):
        return LogBounds(-math.inf, -math.inf, -math.inf)  # a product with a factor 0
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

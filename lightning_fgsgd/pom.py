"""The products of manifolds of one weight, live: index sets, scale S and radius R, and the maps that a step needs.

A component is ω = R · q · S, with q on a unit manifold. All geometry happens at q; the gradient for q is R · G · Sᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting
from lightning_fgsgd.grouping import IndexSets, pack, unpack
from lightning_fgsgd.manifolds import Manifold, get_manifold, wide
from lightning_fgsgd.plan import PlannedWeight, layer_seed

__all__ = ["METRICS", "POM", "ProductOfManifolds"]

METRICS = ("start", "unit", "embedded")


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


@dataclass
class _Part:
    """The components of a weight that live on one kind of manifold."""

    manifold: Manifold
    index: Tensor  # which components, (j,)
    scale: Tensor  # S, compact
    inverse: Tensor  # its pseudo-inverse
    size: Tensor  # mean square of S
    origin: Tensor  # mean square of the scale at which these weights stood before they were placed


class POM:
    """The live products of manifolds of one weight.

    Args:
        name: name of the weight, for messages.
        cutting: how it is cut into components.
        sets: index sets of the components.
        scheme: how they were drawn.
        start: ``"preserve"``, ``"project"`` or ``"random"``.
        scales: compact scale S for each manifold that occurs, by name.
        radius: R of each component, (k,).
        origins: mean square of the scale at which the weights of each manifold stood before they were placed, by name.
    """

    def __init__(
        self,
        name: str,
        cutting: Cutting,
        sets: IndexSets,
        scheme: str,
        start: str,
        scales: dict[str, Tensor],
        radius: Tensor,
        origins: dict[str, Tensor],
    ) -> None:
        device = radius.device
        self.name = name
        self.cutting = cutting
        self.scheme = scheme
        self.start = start
        self.sets = IndexSets(sets.manifold_names, sets.manifold.to(device), sets.group.to(device))
        self.radius = radius
        self.num_groups = sets.num_groups
        self.parts = []
        for i, manifold_name in enumerate(sets.manifold_names):
            index = (self.sets.manifold == i).nonzero()[:, 0]
            if manifold_name == "euclidean" or index.numel() == 0:
                continue
            manifold, scale = get_manifold(manifold_name), scales[manifold_name]
            sizes = manifold.mean_square(scale), origins[manifold_name].to(scale)
            size, origin = (torch.where(x > 0, x, torch.ones_like(x)) for x in sizes)
            inverse = manifold.inverse(scale) if start == "preserve" else scale  # elsewhere the scale is the identity
            self.parts.append(_Part(manifold, index, scale, inverse, size, origin))
        free = [i for i, manifold_name in enumerate(sets.manifold_names) if manifold_name == "euclidean"]
        self.euclidean = torch.isin(self.sets.manifold.long(), torch.tensor(free, device=device)).nonzero()[:, 0]

    @classmethod
    @torch.no_grad()
    def place(cls, planned: PlannedWeight, weight: Tensor) -> POM:
        """Put ``weight`` onto its manifolds as planned, in place, and take its scale.

        With ``"preserve"`` the weight is not touched at all.

        Raises:
            ValueError: the weight holds a value that is not finite.
        """
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{planned.name}: the weight holds NaN or infinite values, so it has no place on a manifold"
            )
        cutting, sets = planned.cutting, planned.index_sets
        omega = cutting.cut(working(weight)).clone()
        scales, origins = {}, {}
        generator = torch.Generator().manual_seed(layer_seed(planned.seed, planned.name) ^ 1)
        for i, manifold_name in enumerate(sets.manifold_names):
            index = (sets.manifold == i).nonzero()[:, 0].to(weight.device)
            if manifold_name == "euclidean" or index.numel() == 0:
                continue
            manifold = get_manifold(manifold_name)
            before = manifold.root(omega[index])
            origins[manifold_name] = manifold.mean_square(before)
            if planned.start == "project":
                omega[index] = manifold.project(omega[index])
            elif planned.start == "random":
                shape = (index.numel(), cutting.n, cutting.p)
                omega[index] = manifold.random(*shape, generator=generator, dtype=torch.float64).to(omega)
            scales[manifold_name] = before if planned.start == "preserve" else manifold.unit_scale(omega[index])
        if planned.start != "preserve":
            weight.copy_(cutting.join(omega))
        radius = torch.ones(cutting.count, dtype=omega.dtype, device=weight.device)
        return cls(planned.name, cutting, sets, planned.scheme, planned.start, scales, radius, origins)

    # Geometry -------------------------------------------------------------------------------------------------------

    def unit_points(self, omega: Tensor) -> list[Tensor]:
        """The unit points q of the constrained components, a tensor (j, n, p) for each part."""
        return [
            part.manifold.scaled(omega[part.index], part.inverse) / self.radius[part.index, None, None]
            for part in self.parts
        ]

    def set_points(self, omega: Tensor, points: list[Tensor]) -> None:
        """Write ω = R · q · S into ``omega`` (k, n, p) for the constrained components."""
        for part, q in zip(self.parts, points, strict=True):
            omega[part.index] = part.manifold.scaled(q, part.scale) * self.radius[part.index, None, None]

    def metric(self, part: _Part, metric: str) -> Tensor:
        """m for which the metric on a part is m times that of its unit manifold; () or (j,).

        ``"start"``: the squared scale at which the part's weights stood before they were placed, which for a preserved start
        is the mean of S². A step then turns a weight about as far as SGD would have turned it there, and that does not
        change when R does. ``"unit"``: 1. ``"embedded"``, the paper read literally: R² times the mean of S², the metric of
        the space in which the weights stand now.
        """
        if metric == "start":
            return part.origin
        if metric == "unit":
            return torch.ones_like(part.size)
        return part.size * self.radius[part.index].square()

    def tangent_gradient(self, points: list[Tensor], grad: Tensor, metric: str) -> Tensor:
        """Riemannian gradient of every component from the Euclidean one G, (k, n, p); line 5 of Algorithm 1.

        In coordinates √m · q, which are orthonormal in the metric m: its Frobenius norm is the Riemannian norm.
        Components on the Euclidean manifold keep G.
        """
        out = grad.clone()
        for part, q in zip(self.parts, points, strict=True):
            pulled = part.manifold.scaled(grad[part.index], part.scale) * self.radius[part.index, None, None]
            out[part.index] = part.manifold.tangent(q, pulled) / _column(self.metric(part, metric).sqrt())
        return out

    def group_norms(self, grad: Tensor) -> Tensor:
        """R_g of every group, (G,): the norm of a product is the root of the sum of squares (Theorem 1)."""
        return self._group_sums(grad.square().sum((-2, -1))).sqrt()

    def _group_sums(self, x: Tensor) -> Tensor:
        """Sums of ``x`` (k,) over the groups, (G,), in double precision: a group may have a hundred thousand components."""
        return wide(x).new_zeros(self.num_groups).index_add_(0, self.sets.group, wide(x)).to(x)

    def group_distances(self, a: Tensor, b: Tensor, metric: str) -> Tensor:
        """Distance ρ_g of every group between two points, (G,); see :meth:`coordinates` for ``a`` and ``b``, (k, n, p).

        The root of the sum of the components' squared distances; on Stiefel the lower bound in closed form.
        """
        squares = (a - b).square().sum((-2, -1))
        for part in self.parts:
            dist = part.manifold.dist_bound(a[part.index], b[part.index])
            squares[part.index] = dist.square() * self.metric(part, metric)
        return self._group_sums(squares).sqrt()

    def coordinates(self, omega: Tensor, points: list[Tensor]) -> Tensor:
        """Unit points q where there is a constraint and ω where there is none, as one tensor (k, n, p)."""
        out = omega.clone()
        for part, q in zip(self.parts, points, strict=True):
            out[part.index] = q
        return out

    def pull(self, average: Tensor, towards: Tensor, share: float) -> Tensor:
        """Move ``average`` the ``share`` of the way towards another point, by a retraction; both as :meth:`coordinates`."""
        moved = average.lerp(towards, share)
        for part in self.parts:
            a, b = average[part.index], towards[part.index]
            moved[part.index] = part.manifold.retract(a, share * part.manifold.tangent(a, b - a))
        return moved

    def curvatures(self, metric: str) -> Tensor:
        """c of every group, (G,): the largest upper curvature bound among its components, in the chosen metric."""
        of_component = self.radius.new_zeros(self.cutting.count)
        for part in self.parts:
            of_component[part.index] = part.manifold.curvature[1] / self.metric(part, metric)
        return self.radius.new_zeros(self.num_groups).scatter_reduce_(0, self.sets.group.long(), of_component, "amax")

    def retract(self, points: list[Tensor], step: Tensor, metric: str) -> list[Tensor]:
        """New unit points after the tangent ``step`` (k, n, p), given in the coordinates √m · q."""
        return [
            part.manifold.retract(q, step[part.index] / _column(self.metric(part, metric).sqrt()))
            for part, q in zip(self.parts, points, strict=True)
        ]

    def transport(self, points: list[Tensor], vector: Tensor) -> None:
        """Carry the tangent ``vector`` (k, n, p) to the new unit points, in place."""
        for part, q in zip(self.parts, points, strict=True):
            vector[part.index] = part.manifold.transport(q, vector[part.index])

    # Looking and changing -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rescale(self, weight: Tensor, radius: Tensor) -> None:
        """Set R of every component to ``radius`` (k,) and scale the weight along; the directions q stay.

        Components on the Euclidean manifold have no radius to set, and stay.
        """
        omega = self.cutting.cut(working(weight)).clone()
        new = self.radius.clone()
        for part in self.parts:
            new[part.index] = radius.to(new)[part.index]
        omega *= (new / self.radius)[:, None, None]
        self.radius = new
        weight.copy_(self.cutting.join(omega))

    @torch.no_grad()
    def project(self, weight: Tensor) -> None:
        """Bring a stray weight to the nearest point of its manifolds {R q S}, in place.

        The nearest q to v is the unit projection of v · S: on Stiefel the polar factor of vS, whatever the rank of S.
        """
        omega = self.cutting.cut(working(weight)).clone()
        points = [
            part.manifold.project(
                part.manifold.scaled(omega[part.index], part.scale) / self.radius[part.index, None, None]
            )
            for part in self.parts
        ]
        self.set_points(omega, points)
        weight.copy_(self.cutting.join(omega))

    @torch.no_grad()
    def distance(self, weight: Tensor) -> float:
        """Largest relative violation of a component, ‖fixed part of ωᵀω − its target‖_F / ‖target‖_F; NaN if one has NaN."""
        omega = wide(self.cutting.cut(weight))
        worst = [omega.new_zeros(())]
        for part in self.parts:
            target = part.manifold.target(wide(part.scale)) * wide(self.radius)[part.index, None].square()
            error = (part.manifold.fixed(omega[part.index]) - target).norm(dim=-1)
            norm = target.norm(dim=-1)
            # A zero component may stay zero; NaN is not hidden.
            worst.append(torch.where(error == 0, torch.zeros_like(error), error / norm).max())
        return float(torch.stack(worst).max())

    def look(self, weight: Tensor) -> ProductOfManifolds:
        """What ``optimizer.pom`` shows."""
        p = self.cutting.p
        scale = torch.eye(p, dtype=self.radius.dtype, device=self.radius.device).repeat(self.cutting.count, 1, 1)
        for part in self.parts:
            scale[part.index] = part.manifold.scaled(scale[part.index], part.scale)
        components = self.cutting.cut(weight.detach()).clone()
        sets = self.sets
        return ProductOfManifolds(
            components,
            sets.manifold.long(),
            sets.manifold_names,
            sets.group.long(),
            self.radius.clone(),
            scale,
            self.start,
        )

    def same_constraints(self, other: POM) -> bool:
        """Whether the components of ``other`` fall in the same groups on the same manifolds, and started alike."""
        mine, theirs = self.sets, other.sets
        return (
            self.start == other.start
            and mine.manifold_names == theirs.manifold_names
            and torch.equal(mine.manifold, theirs.manifold)
            and torch.equal(mine.group, theirs.group)
        )

    def zero_components(self) -> int:
        """Number of components whose scale is zero: they have no direction, and stay where they are."""
        return sum(int((part.scale.flatten(1) == 0).all(1).sum()) for part in self.parts)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, strings and numbers, so that ``torch.load(..., weights_only=True)`` reads them."""
        return {
            "name": self.name,
            "cutting": self.cutting.kind,
            "n": self.cutting.n,
            "p": self.cutting.p,
            "start": self.start,
            **pack(self.sets, self.cutting, self.scheme),
            "radius": self._radius_by_channel(),
            # A unit scale is known from the start, and not stored.
            "scale": {part.manifold.name: part.scale for part in self.parts} if self.start == "preserve" else {},
            "origin": {part.manifold.name: part.origin for part in self.parts},
        }

    def _radius_by_channel(self) -> Tensor:
        """R, once for all the components that read the same features where it is the same for them."""
        reads = self.cutting.reads().to(self.radius.device)
        by_channel = self.radius.new_empty(int(reads.max()) + 1)
        by_channel[reads] = self.radius
        return by_channel if torch.equal(by_channel[reads], self.radius) else self.radius

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], cutting: Cutting, weight: Tensor) -> POM:
        """The POM of ``weight`` that :meth:`state_dict` described, on the weight's device."""
        like = working(weight)
        sets = unpack(state, cutting)
        scales = {name: scale.to(like) for name, scale in state["scale"].items()}
        if state["start"] != "preserve":
            omega = cutting.cut(like)
            for i, name in enumerate(sets.manifold_names):
                scales[name] = get_manifold(name).unit_scale(omega[(sets.manifold == i).to(omega.device)])
        radius = state["radius"].to(like, copy=True)
        if len(radius) != cutting.count:
            radius = radius[cutting.reads().to(radius.device)]
        origins = state.get("origin") or {
            name: get_manifold(name).mean_square(scale) for name, scale in scales.items() if name != "euclidean"
        }
        return cls(state["name"], cutting, sets, state.get("scheme", "pio"), state["start"], scales, radius, origins)

    def __repr__(self) -> str:
        cutting = self.cutting
        return (
            f"POM({self.name}: {cutting.count} {cutting.kind} components of {cutting.n} x {cutting.p} "
            f"in {self.num_groups} groups, {', '.join(self.sets.manifold_names)}, start={self.start!r})"
        )


def working(weight: Tensor) -> Tensor:
    """``weight`` in the precision of the geometry: float32 for half precision, its own otherwise."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _column(m: Tensor) -> Tensor:
    return m[:, None, None] if m.ndim else m

"""The products of manifolds of one weight, live: index sets, scale S and radius R, and the maps that a step needs.

A component is ω = R · q · S, with q on a unit manifold. All geometry happens at q; the gradient for q is R · G · Sᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting
from lightning_fgsgd.factors import factor_of, pack_upper, rounded_inverse, unpack_upper
from lightning_fgsgd.geometry import Geometry
from lightning_fgsgd.grouping import IndexSets
from lightning_fgsgd.look import ProductOfManifolds
from lightning_fgsgd.manifolds import Manifold, get_manifold, wide, working, working_dtype
from lightning_fgsgd.matrices import expand
from lightning_fgsgd.plan import PlannedWeight, layer_seed
from lightning_fgsgd.precision import exact
from lightning_fgsgd.sharding import Shard, largest

__all__ = ["METRICS", "POM"]

METRICS = ("start", "unit", "embedded")


class Part(NamedTuple):
    """The components of a weight that live on one kind of manifold, with the symmetric root S of their Gram information."""

    manifold: Manifold
    members: Tensor  # which components, (j,)
    scale: Tensor  # S, compact
    inverse: Tensor  # its pseudo-inverse


class POM:
    """The live products of manifolds of one weight.

    What is kept for each component is little beside its n · p numbers: two bytes for its index sets, and with a start of
    ``"preserve"`` its factor U; and U's inverse, but for small kernels.

    Args:
        name: name of the weight, for messages.
        cutting: how it is cut into components.
        sets: index sets of the components.
        start: ``"preserve"``, ``"project"`` or ``"random"``.
        upper: U of the components for ``"preserve"``, of :func:`~lightning_fgsgd.factors.pack_upper`; None for the identity.
        radius: R of each component, (k,).
        origins: mean square of the scale at which the weights of each manifold stood before they were placed, by name.
        sizes: mean square of S for each manifold, by name.
        shard: where this is the part of a sharded weight; the rest is said of that part then.
        layer: how the whole weight is cut; ``cutting`` itself by default.

    Attributes:
        constrains: whether a component lives on another manifold than the Euclidean one; of a sharded weight, anywhere.
    """

    def __init__(
        self,
        name: str,
        cutting: Cutting,
        sets: IndexSets,
        start: str,
        upper: Tensor | None,
        radius: Tensor,
        origins: Mapping[str, float],
        sizes: Mapping[str, float],
        shard: Shard | None = None,
        layer: Cutting | None = None,
    ) -> None:
        self.name = name
        self.cutting = cutting
        self.shard = shard
        self.layer = layer or cutting
        self.start = start
        self.sets = sets.to(radius.device)
        self.num_groups = sets.num_groups
        self.upper = upper
        # Small kernels are solved for one column after the other; all else would take too long so.
        self.inverse = None if upper is None or cutting.small else rounded_inverse(upper)
        self.origins, self.sizes = dict(origins), dict(sizes)
        # Manifolds that occur, by their number in the index sets.
        self.manifolds = {
            i: get_manifold(name) for i, name in enumerate(sets.manifold_names) if bool((sets.manifold == i).any())
        }
        self.constrains = any(m.name != "euclidean" for m in self.manifolds.values())
        self.edition = (
            0  # how often R, or where and in which precision it is held, was set: what is told of it is then new
        )
        self.set_radius(radius)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layouts": {}}

    @classmethod
    @exact
    @torch.no_grad()
    def place(cls, planned: PlannedWeight, weight: Tensor) -> POM:
        """Put ``weight`` onto its manifolds as planned, in place, and take its scale.

        With ``"preserve"`` the weight is not touched at all.

        Raises:
            ValueError: the weight holds a value that is not finite.
        """
        planned.check(weight)
        cutting, sets = planned.cutting, planned.index_sets
        # On the CPU, whatever the device: the same bits everywhere, and LAPACK is there (see by_lapack).
        omega = cutting.cut(working(weight).cpu()).clone()
        origins, sizes, factors = {}, {}, {}
        generator = torch.Generator().manual_seed(layer_seed(planned.seed, planned.name) ^ 1)
        for i, manifold_name in enumerate(sets.manifold_names):
            index = (sets.manifold == i).nonzero()[:, 0]
            if manifold_name == "euclidean" or index.numel() == 0:
                continue
            manifold = get_manifold(manifold_name)
            before = factor_of(manifold, omega[index])
            origins[manifold_name] = sizes[manifold_name] = float(manifold.mean_square(before))
            if planned.start == "preserve":
                factors[i] = before
                continue
            sizes[manifold_name] = 1.0
            if planned.start == "project":
                omega[index] = manifold.project(omega[index])
            else:
                shape = (index.numel(), cutting.n, cutting.p)
                omega[index] = manifold.random(*shape, generator=generator, dtype=torch.float64).to(omega)
        upper = pack_upper(factors, sets, cutting, omega) if factors else None
        if planned.start != "preserve":
            weight.copy_(cutting.join(omega))
        radius = omega.new_ones(cutting.count)
        return cls(planned.name, cutting, sets, planned.start, upper, radius, origins, sizes).follow(weight)

    def part(self, shard: Shard | None) -> POM:
        """The part of it that this process steps; all of it where the weight is not sharded."""
        if shard is None:
            return self
        mine, sets = shard.components, self.sets
        upper = self.upper
        if upper is not None:
            upper = (upper[:, mine] if self.cutting.small else upper[mine]).clone()
        sets = replace(sets, manifold=sets.manifold[mine].clone(), slot=sets.slot[mine].clone(), cutting=shard.cutting)
        radius, told = self.radius[mine].clone(), (self.origins, self.sizes)
        part = POM(self.name, shard.cutting, sets, self.start, upper, radius, *told, shard, self.cutting)
        part.constrains = self.constrains
        return part

    def follow(self, weight: Tensor) -> POM:
        """Move to where the weight is, in the precision of its geometry.

        A Trainer brings a module back from the GPU when its fit ends, and ``model.double()`` keeps its parameters.
        """
        device, dtype = weight.device, working_dtype(weight)
        if self._radius.device != device or self._radius.dtype != dtype:
            self.sets = self.sets.to(device)
            if self.upper is not None:
                self.upper = self.upper.to(device, dtype)
            if self.upper is not None and self.inverse is not None:
                same = self._radius.dtype == dtype
                self.inverse = self.inverse.to(device) if same else rounded_inverse(self.upper)
            self.set_radius(self._radius.to(device, dtype), same=True)
        return self

    # What a step needs ----------------------------------------------------------------------------------------------

    @property
    def radius(self) -> Tensor:
        """R of each component, (k,)."""
        radius = self._radius
        if len(radius) != self.cutting.count:
            radius = radius[self.cutting.reads(radius.device)]
        return torch.where(self.on("euclidean"), 1.0, radius)

    def reads(self) -> Tensor:
        """Number of the features that each component reads among those of the layer, (k,)."""
        reads = self.layer.reads(self.sets.slot.device)
        return reads if self.shard is None else reads[self.shard.components]

    def set_radius(self, radius: Tensor, same: bool = False) -> None:
        """Keep R of each component (k,): once for all that read the same features, where it is the same for them.

        ``same``: it is as it is kept already, on another device.
        """
        if not same:
            reads, free = self.cutting.reads(radius.device), self.on("euclidean")
            by_channel = radius.new_ones(int(reads.max()) + 1)
            by_channel[reads[~free]] = radius[~free]
            for_all = bool(torch.where(free, True, by_channel[reads] == radius).all())
            radius = by_channel if for_all else radius.clone()
        self._radius = radius
        self.all_ones = bool((self._radius == 1).all())
        self._curvatures: dict[str, Tensor] = {}
        self.layouts: dict[Any, Any] = {}  # what compiled code is told of the weight, made when it is first run
        self.edition += 1

    def on(self, manifold_name: str) -> Tensor:
        """Which components live on a manifold, bool (k,)."""
        mask = torch.zeros_like(self.sets.manifold, dtype=torch.bool)
        for i, manifold in self.manifolds.items():
            if manifold.name == manifold_name:
                mask = self.sets.manifold == i
        return mask

    def metrics(self, metric: str) -> list[float]:
        """m of each manifold by its number: the metric on its components is m times that of the unit manifold.

        ``"start"``: the squared scale at which the weights stood before they were placed, which for a preserved start is
        the mean of S². A step then turns a weight about as far as SGD would have turned it there, and that does not change
        when R does. ``"unit"``: 1. ``"embedded"``, the paper read literally: the mean of S², which :meth:`metric` multiplies
        by R²: the metric of the space in which the weights stand now.
        """
        chosen = {"start": self.origins, "embedded": self.sizes}.get(metric, {})
        return [chosen.get(name, 1.0) or 1.0 for name in self.sets.manifold_names]

    def metric(self, metric: str) -> Tensor:
        """m of each component, (k,)."""
        m = self.radius.new_tensor(self.metrics(metric))[self.sets.manifold.long()]
        return m * self.radius.square() if metric == "embedded" else m

    def curvatures(self, metric: str) -> Tensor:
        """c of every group, (G,): the largest upper curvature bound among its components, in the chosen metric."""
        if metric not in self._curvatures:
            bounds = [get_manifold(name).curvature[1] for name in self.sets.manifold_names]
            of_component = self.radius.new_tensor(bounds)[self.sets.manifold.long()] / self.metric(metric)
            c = of_component.new_zeros(self.num_groups)
            c.scatter_reduce_(0, self.sets.group.long(), of_component, "amax")
            self._curvatures[metric] = largest(c, self.shard) if self.shard and self.shard.spread else c
        return self._curvatures[metric]

    def geometry(self, metric: str, batch: tuple[int, ...], part: slice | Tensor = slice(None)) -> Geometry:
        """The geometry of components, as tensors.

        Args:
            metric: the chosen metric.
            batch: shape in which the k components are counted, (k,) or two axes of kernels.
            part: which of them, along the first axis.
        """
        kind = self.sets.manifold.view(batch)[part][..., None, None]
        one = len(self.manifolds) == 1
        manifolds = [(m, True if one else kind == i) for i, m in self.manifolds.items()]
        of_manifold = self.metrics(metric)
        if one:
            inverse_root: Any = of_manifold[next(iter(self.manifolds))] ** -0.5
        else:
            inverse_root = self._radius.new_tensor(of_manifold).rsqrt()[kind.long()]
        radius = None if self.all_ones else self.radius.view(batch)[part][..., None, None]
        if metric == "embedded" and radius is not None:
            inverse_root = inverse_root / radius
        upper = None if self.upper is None else unpack_upper(self.upper, self.cutting, batch, part)
        inverse = None if self.inverse is None else self.inverse.view(*batch, *self.inverse.shape[1:])[part]
        return Geometry(manifolds, inverse_root, radius, upper, inverse)

    @torch.no_grad()
    def riemannian(self, weight: Tensor, grad: Tensor, metric: str) -> Tensor:
        """The Riemannian gradient that belongs to a Euclidean one, as a momentum buffer holds it, of the weight's shape."""
        omega = self.cutting.cut(working(weight))
        geometry = self.geometry(metric, (self.cutting.count,))
        g = geometry.tangent(geometry.unit(omega), geometry.pull(self.cutting.cut(working(grad))))
        return torch.empty_like(working(weight)).copy_(self.cutting.join(g * geometry.inverse_root_metric))

    @property
    def group(self) -> Tensor:
        """Number of the group of each component, int32 (k,): made anew for small kernels, which are many, and else kept."""
        if self.cutting.small:
            return self.sets.group
        if "group" not in self.layouts:
            self.layouts["group"] = self.sets.group
        found: Tensor = self.layouts["group"]
        return found

    def group_sums(self, x: Tensor) -> Tensor:
        """Sums of ``x`` (k,) over the groups, (G,), in double precision: a group may have a hundred thousand components.

        Of a sharded weight over its components in this process.
        """
        return wide(x).new_zeros(self.num_groups).index_add_(0, self.group, wide(x))

    # Unit points by manifold: for looking at a weight, and for what is done now and then --------------------------------

    @property
    def parts(self) -> list[Part]:
        """The constrained components of each manifold, with their S."""
        parts = []
        for i, manifold in self.manifolds.items():
            if manifold.name == "euclidean":
                continue
            index = (self.sets.manifold == i).nonzero()[:, 0]
            if self.upper is None:
                like = self._radius.new_empty(len(index), self.cutting.n, self.cutting.p)
                scale = inverse = manifold.unit_scale(like)
            else:
                upper = unpack_upper(self.upper, self.cutting, (self.cutting.count,), index)
                if manifold.name == "stiefel":
                    scale = manifold.root(expand(upper, self.cutting.p))
                else:
                    scale = upper.diagonal(dim1=-2, dim2=-1)[..., None, :] if upper.shape[-2] > 1 else upper
                    scale = scale[..., :1] if manifold.name == "sphere" else scale
                    scale = scale.expand(-1, 1, self.cutting.p) if manifold.name == "oblique" else scale
                inverse = manifold.inverse(scale)
            parts.append(Part(manifold, index, scale, inverse))
        return parts

    def unit_points(self, omega: Tensor, parts: Sequence[Part] | None = None) -> list[Tensor]:
        """The unit points q of the constrained components in ω = R · q · S, a tensor (j, n, p) for each part."""
        radius = self.radius
        return [
            part.manifold.scaled(omega[part.members], part.inverse) / radius[part.members, None, None]
            for part in (self.parts if parts is None else parts)
        ]

    # Looking and changing -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rescale(self, weight: Tensor, radius: Tensor) -> None:
        """Set R of every component to ``radius`` (k,) and scale the weight along; the directions q stay.

        Components on the Euclidean manifold have no radius to set, and stay.
        """
        old = self.radius
        radius = radius.to(old)
        new = torch.where(self.on("euclidean"), 1.0, radius)
        scaled = self.cutting.join(self.cutting.cut(working(weight)) * (new / old)[:, None, None])
        try:
            self.set_radius(radius)
            weight.copy_(scaled)
        except BaseException:  # an interrupt between the two: R and the weight change together, or there is no manifold
            self.set_radius(radius)
            weight.copy_(scaled)
            raise

    @exact
    @torch.no_grad()
    def project(self, weight: Tensor) -> None:
        """Bring a stray weight to the nearest point of its manifolds {R q U}, in place.

        The nearest q to v is the unit projection of v · Uᵀ: on Stiefel its polar factor, whatever the rank of U. U and not
        S, for a direction that U keeps and S counts as zero would be lost, and a step needs it.
        """
        omega, radius = self.cutting.cut(working(weight)).clone(), self.radius[:, None, None]
        for part in self.parts:
            v, r = omega[part.members], radius[part.members]
            if part.manifold.name == "stiefel" and self.upper is not None:
                upper = unpack_upper(self.upper, self.cutting, (self.cutting.count,), part.members)
                upper = wide(expand(upper, self.cutting.p))
                new = part.manifold.project(wide(v) @ upper.mT) @ upper
            else:
                new = part.manifold.scaled(part.manifold.project(part.manifold.scaled(v, part.scale) / r), part.scale)
            omega[part.members] = new.to(omega) * r
        weight.copy_(self.cutting.join(omega))

    @torch.no_grad()
    def distance(self, weight: Tensor) -> float:
        """Largest relative violation of a component, ‖fixed part of ωᵀω − its target‖_F / ‖target‖_F; NaN if one has NaN."""
        omega, radius = wide(self.cutting.cut(weight)), wide(self.radius)
        worst = [omega.new_zeros(())]
        for part in self.parts:
            target = part.manifold.target(wide(part.scale)) * radius[part.members, None].square()
            error = (part.manifold.fixed(omega[part.members]) - target).norm(dim=-1)
            norm = target.norm(dim=-1)
            # A zero component may stay zero; NaN is not hidden.
            worst.append(torch.where(error == 0, torch.zeros_like(error), error / norm).max())
        return float(torch.stack(worst).max())

    @exact
    def look(self, weight: Tensor) -> ProductOfManifolds:
        """What ``optimizer.pom`` shows."""
        p, radius, sets = self.cutting.p, self.radius, self.sets
        scale = torch.eye(p, dtype=radius.dtype, device=radius.device).repeat(self.cutting.count, 1, 1)
        for part in self.parts:
            scale[part.members] = part.manifold.scaled(scale[part.members], part.scale)
        components, manifold, group = self.cutting.cut(weight.detach()).clone(), sets.manifold.long(), sets.group.long()
        return ProductOfManifolds(components, manifold, sets.manifold_names, group, radius, scale, self.start)

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
        if self.upper is None:
            return 0
        entries = self.upper.T if self.cutting.small else self.upper.flatten(1)
        return int((entries == 0).all(1).sum())

    def __repr__(self) -> str:
        cutting = self.cutting
        return (
            f"POM({self.name}: {cutting.count} {cutting.kind} components of {cutting.n} x {cutting.p} "
            f"in {self.num_groups} groups, {', '.join(self.sets.manifold_names)}, start={self.start!r})"
        )

"""Index sets: which components of a layer form a group, and on which manifold each of them lives.

A group g is a set I_g of components; its POM is the product of their manifolds. The three schemes of the paper differ
in the *pools* that they partition into groups:

* ``"pi"``: the kernels that share an input channel, for each input channel;
* ``"po"``: the kernels that share an output channel, for each output channel;
* ``"pio"``: all kernels of the layer.

In a grouped convolution an input channel is a pool within its conv group, and for ``"pio"`` the layer is one pool. A
block of output neurons reads all input channels and writes several output channels, so on blocks (Linear layers, 1x1
convolutions, the ``"filter"`` cutting) all three schemes draw over the layer's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting

__all__ = ["SCHEMES", "IndexSets", "draw_index_sets"]

SCHEMES = ("pi", "po", "pio")


@dataclass(frozen=True)
class IndexSets:
    """The groups of one layer's components: two bytes a component.

    Attributes:
        manifold_names: names of the manifolds, in the order in which the user gave them.
        manifold: index into ``manifold_names`` of each component, uint8 (k,).
        slot: number of each component's group within its pool, (k,); uint8 where that is enough.
        groups_in_pool: number of groups in each pool.
        cutting: the components.
        scheme: which pools they were drawn from.
    """

    manifold_names: tuple[str, ...]
    manifold: Tensor
    slot: Tensor
    groups_in_pool: int
    cutting: Cutting
    scheme: str

    @property
    def num_pools(self) -> int:
        """Number of pools."""
        return int(pool_of(self.cutting, self.scheme).max()) + 1

    @property
    def num_groups(self) -> int:
        """Number of groups, G_l."""
        return self.num_pools * self.groups_in_pool

    @property
    def group(self) -> Tensor:
        """Number of the group of each component, int32 (k,): groups are numbered from 0, pool by pool."""
        pool = pool_of(self.cutting, self.scheme, self.slot.device).to(torch.int32)
        return pool * self.groups_in_pool + self.slot.to(torch.int32)

    def to(self, device: torch.device) -> IndexSets:
        """The same on another device."""
        return replace(self, manifold=self.manifold.to(device), slot=self.slot.to(device))


def draw_index_sets(
    cutting: Cutting,
    scheme: str,
    manifolds: Sequence[str],
    groups: int | str | None = None,
    *,
    generator: torch.Generator,
) -> IndexSets:
    """Draw the index sets of one layer, at random without replacement (hypergeometric).

    Args:
        cutting: the components of the layer.
        scheme: ``"pi"``, ``"po"`` or ``"pio"``.
        manifolds: names of the M manifolds to share out.
        groups: number of groups in each pool. By default M, and every group then has one manifold. With fewer groups
            than manifolds a group's components are dealt to all the manifolds: a POM of non-identical manifolds. A
            pool with fewer components than groups gets one group a component, as all do with ``"each"``.
        generator: source of the draws, on the CPU.

    Within a pool the sizes of the groups differ by at most one, and so do the numbers of groups that each manifold
    gets; which ones get the remainder is drawn too.
    """
    pool = pool_of(cutting, scheme)
    pools = int(pool.max()) + 1
    order = pool.argsort(stable=True) if pools > 1 else torch.arange(cutting.count, device="cpu")
    members = order.reshape(pools, -1)  # all pools of a layer have the same size
    size = members.shape[1]
    per_pool = size if groups == "each" else min(len(manifolds) if groups is None else int(groups), size)

    slot = _deal(pools, size, per_pool, generator)
    if per_pool >= len(manifolds) or groups is None or per_pool == size:
        manifold = _deal(pools, per_pool, len(manifolds), generator).gather(1, slot)
    else:
        # Deal within each group: every group's own order of the manifolds, taken in turn by its members.
        turn = torch.nn.functional.one_hot(slot, per_pool).cumsum(1).gather(2, slot[..., None])[..., 0] - 1
        order = _uniform(pools, per_pool, len(manifolds), generator=generator).argsort(-1)
        order = order.gather(1, slot[..., None].expand(-1, -1, len(manifolds)))
        manifold = order.gather(2, (turn % len(manifolds))[..., None])[..., 0]

    order = members.flatten()

    def in_order(values: Tensor) -> Tensor:
        dtype = torch.uint8 if int(values.max()) < 256 else torch.int32
        return torch.empty(cutting.count, dtype=dtype, device="cpu").scatter_(0, order, values.flatten().to(dtype))

    return IndexSets(tuple(manifolds), in_order(manifold), in_order(slot), per_pool, cutting, scheme)


def pack(sets: IndexSets) -> dict[str, Any]:
    """The index sets as plain tensors and strings; the cutting is described elsewhere."""
    return {
        "scheme": sets.scheme,
        "manifold_names": list(sets.manifold_names),
        "manifold": sets.manifold,
        "groups_in_pool": sets.groups_in_pool,
        "slot": sets.slot,
    }


def unpack(state: Mapping[str, Any], cutting: Cutting) -> IndexSets:
    """The index sets that :func:`pack` packed, on the CPU."""
    manifold, slot = state["manifold"].cpu().clone(), state["slot"].cpu().clone()
    return IndexSets(tuple(state["manifold_names"]), manifold, slot, state["groups_in_pool"], cutting, state["scheme"])


def pool_size(cutting: Cutting, scheme: str) -> int:
    """Number of components in each pool of a layer."""
    return cutting.count // (int(pool_of(cutting, scheme).max()) + 1)


def pool_of(cutting: Cutting, scheme: str, device: torch.device | str = "cpu") -> Tensor:
    """Number of the pool of each component, int64 (k,)."""
    by_channel = {"pi": cutting.input_channel, "po": cutting.output_channel}.get(scheme)
    channel = None if by_channel is None else by_channel(device)
    return torch.zeros(cutting.count, dtype=torch.long, device=device) if channel is None else channel


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """The same numbers whatever the default device and dtype are: what is drawn from a seed does not depend on them."""
    return torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float32)


def _deal(rows: int, length: int, labels: int, generator: torch.Generator) -> Tensor:
    """Deal ``labels`` labels over ``length`` places in each row, evenly: an int64 tensor (rows, length).

    Which labels get one place more is drawn, then all the places are shuffled.
    """
    who = _uniform(rows, labels, generator=generator).argsort(1)
    even = who.gather(1, (torch.arange(length, device="cpu") % labels).expand(rows, -1))
    return even.gather(1, _uniform(rows, length, generator=generator).argsort(1))

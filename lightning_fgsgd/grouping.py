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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting

__all__ = ["SCHEMES", "IndexSets", "draw_index_sets"]

SCHEMES = ("pi", "po", "pio")


@dataclass(frozen=True)
class IndexSets:
    """The groups of one layer's components.

    Attributes:
        manifold_names: names of the manifolds, in the order in which the user gave them.
        manifold: index into ``manifold_names`` of each component, uint8 (k,).
        group: number of the group of each component, int32 (k,); groups are numbered from 0.
    """

    manifold_names: tuple[str, ...]
    manifold: Tensor
    group: Tensor

    @property
    def num_groups(self) -> int:
        """Number of groups, G_l."""
        return int(self.group.max()) + 1


def draw_index_sets(
    cutting: Cutting,
    scheme: str,
    manifolds: Sequence[str],
    groups: int | None = None,
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
            pool with fewer components than groups gets one group a component.
        generator: source of the draws, on the CPU.

    Within a pool the sizes of the groups differ by at most one, and so do the numbers of groups that each manifold
    gets; which ones get the remainder is drawn too.
    """
    pool = _pools(cutting, scheme)
    members = pool.argsort(stable=True).reshape(int(pool.max()) + 1, -1)  # all pools of a layer have the same size
    pools, size = members.shape
    per_pool = min(len(manifolds) if groups is None else groups, size)

    slot = _deal(pools, size, per_pool, generator)
    if per_pool >= len(manifolds) or groups is None or per_pool == size:
        manifold = _deal(pools, per_pool, len(manifolds), generator).gather(1, slot)
    else:
        # Deal within each group: every group's own order of the manifolds, taken in turn by its members.
        turn = torch.nn.functional.one_hot(slot, per_pool).cumsum(1).gather(2, slot[..., None])[..., 0] - 1
        order = torch.rand(pools, per_pool, len(manifolds), generator=generator, device="cpu").argsort(-1)
        order = order.gather(1, slot[..., None].expand(-1, -1, len(manifolds)))
        manifold = order.gather(2, (turn % len(manifolds))[..., None])[..., 0]

    group = slot + torch.arange(pools, device="cpu")[:, None] * per_pool
    order = members.flatten()
    return IndexSets(
        tuple(manifolds),
        torch.empty(cutting.count, dtype=torch.uint8, device="cpu").scatter_(
            0, order, manifold.flatten().to(torch.uint8)
        ),
        torch.empty(cutting.count, dtype=torch.int32, device="cpu").scatter_(0, order, group.flatten().to(torch.int32)),
    )


def pack(sets: IndexSets, cutting: Cutting, scheme: str) -> dict[str, Any]:
    """The index sets as plain tensors, two bytes a component: a group is its known pool, and its number in there."""
    per_pool = sets.num_groups // (int(_pools(cutting, scheme).max()) + 1)
    slot = sets.group % per_pool
    return {
        "scheme": scheme,
        "manifold_names": list(sets.manifold_names),
        "manifold": sets.manifold,
        "groups_in_pool": per_pool,
        "slot": slot.to(torch.uint8 if per_pool <= 256 else torch.int32),
    }


def unpack(state: Mapping[str, Any], cutting: Cutting) -> IndexSets:
    """The index sets that :func:`pack` packed, on the CPU."""
    names, manifold = tuple(state["manifold_names"]), state["manifold"].cpu().clone()
    if "group" in state:  # a checkpoint of before they were packed
        return IndexSets(names, manifold, state["group"].cpu().clone())
    pool = _pools(cutting, state["scheme"]).to(torch.int32)
    return IndexSets(names, manifold, pool * state["groups_in_pool"] + state["slot"].cpu().to(torch.int32))


def pool_size(cutting: Cutting, scheme: str) -> int:
    """Number of components in each pool of a layer."""
    return cutting.count // (int(_pools(cutting, scheme).max()) + 1)


def _pools(cutting: Cutting, scheme: str) -> Tensor:
    """Number of the pool of each component, (k,)."""
    channel = {"pi": cutting.input_channel, "po": cutting.output_channel, "pio": lambda: None}[scheme]()
    return torch.zeros(cutting.count, dtype=torch.long, device="cpu") if channel is None else channel


def _deal(rows: int, length: int, labels: int, generator: torch.Generator) -> Tensor:
    """Deal ``labels`` labels over ``length`` places in each row, evenly: an int64 tensor (rows, length).

    Which labels get one place more is drawn, then all the places are shuffled.
    """
    who = torch.rand(rows, labels, generator=generator, device="cpu").argsort(1)
    even = who.gather(1, (torch.arange(length, device="cpu") % labels).expand(rows, -1))
    return even.gather(1, torch.rand(rows, length, generator=generator, device="cpu").argsort(1))

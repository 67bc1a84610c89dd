"""Weights that are spread over processes: DTensors, as FSDP2 and Lightning's ModelParallelStrategy make them.

Fine-grained components make sharding easy: a weight that is split along its output channels is split between components,
so each process steps its own part as if it were a weight of its own, and only the squared norms of the groups travel. Where
a boundary cuts a component (a block whose size does not divide a process's rows, a conv group, another axis), the weight is
gathered for the step, every process does all of it, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from lightning_fgsgd.components import Cutting

__all__ = [
    "Shard",
    "add_up",
    "anywhere",
    "collect",
    "count",
    "largest",
    "local",
    "opened",
    "shard_of",
    "split_like",
    "version",
    "whole_of",
]


@dataclass(frozen=True)
class Shard:
    """The part of a weight that this process steps.

    Attributes:
        cutting: how that part is cut.
        first: number of its first component in the whole weight.
        gathered: whether it is the whole weight, since a boundary cuts a component.
        spread: whether groups have components in several processes, so that sums over them must be added up.
        process_group: the processes that share the weight.
    """

    cutting: Cutting
    first: int
    gathered: bool
    spread: bool
    process_group: Any

    @property
    def components(self) -> slice:
        """Which components of the whole weight these are."""
        return slice(self.first, self.first + self.cutting.count)


def shard_of(weight: Tensor, cutting: Cutting, scheme: str) -> Shard | None:
    """The part of ``weight`` that this process holds; None for an ordinary tensor, and for one that is only replicated."""
    if not isinstance(weight, DTensor):
        return None
    mesh, sharded = weight.device_mesh, [i for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if not sharded:
        return None
    axis = sharded[0]
    process_group = mesh.get_group(axis)
    whole = Shard(cutting, 0, True, False, process_group)
    if len(sharded) > 1 or weight.placements[axis] != Split(0):
        return whole
    outputs, processes = weight.shape[0], mesh.size(axis)
    rows = -(-outputs // processes)  # of each process but the last, as torch.chunk splits
    start = min(mesh.get_local_rank(axis) * rows, outputs)
    if rows * (processes - 1) >= outputs or rows % _unit(cutting):
        return whole
    mine = weight.to_local().shape[0]
    grouped = cutting.conv_groups > 1 and cutting.experts is None
    conv_groups = cutting.conv_groups * mine // outputs if grouped else cutting.conv_groups
    if cutting.experts is None:
        part = replace(cutting, shape=(mine, *cutting.shape[1:]), conv_groups=conv_groups)
    else:
        part = replace(cutting, experts=mine)
    # Pools that lie within a process: those of the channel that the weight's first axis counts, or of its conv groups.
    own = {"pi": cutting.transposed or grouped, "po": not cutting.transposed}.get(scheme, False)
    spread = cutting.kind == "filter" or cutting.experts is not None or not own
    return Shard(part, start * cutting.count // outputs, False, spread, process_group)


def _unit(cutting: Cutting) -> int:
    """Rows of a weight that must stay together, so that no component and no conv group is cut."""
    if cutting.experts is not None:
        return 1
    rows = cutting.shape[0]
    if cutting.transposed:
        # Its rows are input channels, of which a block has all; a conv group is a run of them.
        return rows if cutting.kind == "filter" or cutting.conv_groups > 1 else 1
    of_group = rows // cutting.conv_groups if cutting.conv_groups > 1 else 1
    return max(of_group, cutting.p if cutting.kind == "filter" else 1)  # p divides the rows of a conv group


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor, without its history: the tensor itself but for DTensors."""
    if not isinstance(x, DTensor):
        return x.detach()
    with torch.no_grad():
        return x.to_local()


def count(x: Tensor) -> int:
    """How many numbers of a tensor this process holds."""
    return local(x).numel() if isinstance(x, DTensor) else x.numel()


def version(x: Tensor) -> int:
    """How often a tensor, or what this process holds of it, was written to."""
    return x._version + local(x)._version if isinstance(x, DTensor) else x._version


@contextmanager
def opened(shard: Shard | None, *tensors: Tensor | None, write: bool = False) -> Iterator[list[Any]]:
    """The tensors of a weight (gradient, momentum) whose components are those that this process steps.

    They are the tensors themselves, or for DTensors what this process holds; where a boundary cuts a component the whole
    tensors, gathered for as long as this lasts. Called by all processes that share the weight.

    Args:
        shard: of :func:`shard_of`.
        tensors: of the weight's shape and placement; None stays None.
        write: whether to keep what is written to them.
    """
    if shard is None or not shard.gathered:
        yield [local(x) if isinstance(x, DTensor) else x for x in tensors]
        return
    whole = [None if x is None else whole_of(x) for x in tensors]
    yield whole
    if write:
        for x, full in zip(tensors, whole, strict=True):
            if x is not None and full is not None:
                local(x).copy_(local(split_like(full, x)))


def whole_of(x: Tensor) -> Tensor:
    """A tensor as one process alone would have it. Called by all processes that share it."""
    return x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()


def split_like(x: Tensor, like: Tensor) -> Tensor:
    """A tensor spread as ``like`` is: one that is spread in another way, or an ordinary one, the same in all processes."""
    if not isinstance(like, DTensor):
        return x
    mesh = like.device_mesh
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x if x.placements == like.placements else x.redistribute(mesh, like.placements)


# Between processes: each is called by all that share the weights, for the same weights -------------------------------


def add_up(sums: Mapping[int, tuple[Shard, Tensor]]) -> dict[int, Tensor]:
    """Sums over processes, entry by entry, of one tensor a weight: a single message for all that are split alike."""
    found: dict[int, Tensor] = {}
    for process_group, keys in _by_process_group(sums).items():
        message = torch.cat([sums[key][1] for key in keys])
        dist.all_reduce(message, group=process_group)
        found |= dict(zip(keys, message.split([len(sums[key][1]) for key in keys]), strict=True))
    return found


def largest(x: Tensor, shard: Shard) -> Tensor:
    """The largest over the processes that share a weight, entry by entry; infinite where it is NaN."""
    x = torch.where(x.isnan(), torch.inf, x)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=shard.process_group)
    return x


def anywhere(conditions: Sequence[bool], shards: Sequence[Shard | None], device: torch.device) -> list[bool]:
    """Which conditions on some weights hold in any of the processes that share them, so that all of them act alike."""
    found = list(conditions)
    flags = {
        i: (shard, torch.tensor([float(condition)], device=device))
        for i, (shard, condition) in enumerate(zip(shards, conditions, strict=True))
        if shard is not None
    }
    for i, flag in add_up(flags).items():
        found[i] = bool(flag > 0)
    return found


def collect(parts: Mapping[int, tuple[Shard, Any]]) -> dict[int, list[Any]]:
    """What each process has of some weights, in their order; tensors on the CPU."""
    found: dict[int, list[Any]] = {}
    for process_group, keys in _by_process_group(parts).items():
        mine = [[None if x is None else x.cpu() for x in parts[key][1]] for key in keys]
        theirs: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(theirs, mine, group=process_group)
        found |= {key: [one[i] for one in theirs] for i, key in enumerate(keys)}
    return found


def _by_process_group(x: Mapping[int, tuple[Shard, Any]]) -> dict[Any, list[int]]:
    keys: dict[Any, list[int]] = {}
    for key, (shard, _) in x.items():
        keys.setdefault(shard.process_group, []).append(key)
    return keys

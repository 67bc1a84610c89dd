"""The step of many weights in one launch on a GPU: Triton code made from :mod:`~lightning_fgsgd.step` itself.

As :mod:`~lightning_fgsgd.fused` does for a CPU. What differs between the weights that a launch serves (addresses, sizes,
strides, the numbers of the step) stands in small tables in the device's memory. Kernels up to 3x3 are worked on one to a
thread, larger ones as blocks are, tile by tile. For float32; all else, and components with more than 32 rows or columns, go
through :mod:`~lightning_fgsgd.eager`.

With ``TRITON_INTERPRET=1`` in the environment it runs on a CPU, slowly, to be tested.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.factors import rounded_inverse, unpack_upper
from lightning_fgsgd.job import Job
from lightning_fgsgd.pom import POM
from lightning_fgsgd.source_gpu import NUMBERS, TOTAL, Pools, TritonProgram, lane_kernel
from lightning_fgsgd.source_tiles import BlockTiles, Matrix, Tiles, block_kernel
from lightning_fgsgd.symbolic import planes, upper_of, variant_of, written

__all__ = ["Launches", "available", "suits"]

_LANE = 9  # entries of the largest kernel that one lane works on: code for a 4x4 one takes half a minute to compile
_MOST_ROWS = 32  # of a larger kernel, or a block: likewise, minutes for 64
_MOST_SLOTS = 16  # groups in a pool up to which programs sum up their squared norms
_LANES = 128  # kernels that a program works on, one to a thread
_TILE = 64  # columns of a block that are worked on together
_PRECISION = "ieee"  # of products: all of float32
_WARPS = 4  # of 32 threads, for a program


@functools.cache
def interpreted() -> bool:
    """Whether Triton code is to run on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def suits(pom: POM, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether there is GPU code for a weight and the tensors that go with it."""
    tensors = [weight, *(x for x in others if x is not None)]
    if not (weight.is_cuda or interpreted()) or any(x.dtype != torch.float32 for x in tensors):
        return False
    key = ("suits", *(x.stride() for x in tensors), *(x.device for x in tensors))
    if key not in pom.layouts:
        here = all(x.device == weight.device and _strides(pom, x) is not None for x in tensors)
        pom.layouts[key] = here and (_by_lanes(pom) or pom.cutting.p <= _MOST_ROWS)
    return bool(pom.layouts[key])


def _by_lanes(pom: POM) -> bool:
    return pom.cutting.small and pom.cutting.n * pom.cutting.p <= _LANE


@functools.cache
def available() -> str:
    """ "" where Triton code can be compiled and run; else why not."""
    try:
        _load("import triton\n\n\n@triton.jit\ndef kernel(X):\n    pass\n")[(1,)](
            torch.zeros(1, device="cpu" if interpreted() else "cuda")
        )
    except Exception as error:  # whatever Triton, its compiler or its cache may raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


@functools.cache
def _load(source: str) -> Any:
    from torch._inductor.codecache import PyCodeCache  # Triton reads its functions from files

    return PyCodeCache.load(source).kernel


# From the step to Triton ---------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What code depends on, and where it runs.

    ``variant`` is as of :func:`~lightning_fgsgd.symbolic.variant_of`; ``pool`` and ``reads_by`` say how a component's group
    and R are found, see :func:`~lightning_fgsgd.source_gpu.lane_kernel`; ``dense``, whether rows lie in memory as such.
    """

    variant: tuple[Any, ...]
    kind: str
    pool: Pools
    reads_by: str
    dense: bool
    device: torch.device


def _alike(jobs: Sequence[Job], kind: str | None) -> dict[Key, list[int]]:
    """The jobs that one launch can do."""
    found: dict[Key, list[int]] = {}
    for i, job in enumerate(jobs):
        which = kind or job.kind
        told = ("key", which, job.metric, *(None if x is None else x.stride() for x in job[1:4]))
        layouts = job.pom.layouts
        if told not in layouts:
            layouts[told] = _key(job, which)
        found.setdefault(layouts[told], []).append(i)
    return found


def _key(job: Job, kind: str) -> Key:
    pom, cutting = job.pom, job.pom.cutting
    first, second = ("by_first", "by_second") if cutting.transposed else ("by_second", "by_first")
    counted = {"pi": first, "po": second}.get(pom.sets.scheme, "0") if cutting.kind == "kernel" else "0"
    summed = kind == "squares" and counted == "0" and pom.sets.groups_in_pool <= _MOST_SLOTS
    pool = Pools(counted, str(pom.sets.slot.dtype).removeprefix("torch."), summed)
    reads_by = "k" if cutting.kind == "filter" or len(pom._radius) == cutting.count else first
    variant = variant_of(pom, job.weight, job.metric)
    dense = False
    if not _by_lanes(pom):
        upper, _ = _factors(pom)
        variant = (0, cutting.p, variant[2], 0 if upper is None else upper[0].numel(), *variant[4:])
        dense = all(x is None or (_strides(pom, x) or (0, 0, 0))[2] == 1 for x in job[1:4])
    return Key(variant, kind, pool, reads_by, dense, job.weight.device)


@functools.cache
def _kernel(variant: tuple[Any, ...], kind: str, pool: Pools, reads_by: str, dense: bool) -> Any:
    make = source if variant[0] else functools.partial(block_source, dense=dense)
    return _load(make(variant, kind, pool, reads_by))


def source(variant: tuple[Any, ...], kind: str, pool: Pools, reads_by: str) -> str:
    """Triton code of one of the functions of a step, see :func:`lightning_fgsgd.fused.source`."""
    n, p, _, entries, has_radius, _, _ = variant
    program = TritonProgram()
    found = written(program, variant, kind, lambda x: planes(program, x, n, p), upper_of(program, entries, p, ""))
    layout: dict[str, Any] = {"pool": pool, "reads_by": reads_by}
    if kind == "squares":
        return lane_kernel(program, n, p, entries, has_radius, reads=("w", "g"), results={"q": found[0]}, **layout)
    weights, momentum, within = found
    results = {f"w{e}": x for e, x in enumerate(weights.entries)} | {"o": within}
    if momentum is not None:
        results |= {f"b{e}": x for e, x in enumerate(momentum.entries)}
    reads = ("w", "g") if momentum is None else ("w", "g", "b")
    return lane_kernel(program, n, p, entries, has_radius, reads=reads, results=results, **layout)


def block_source(variant: tuple[Any, ...], kind: str, pool: Pools, reads_by: str, dense: bool) -> str:
    """As :func:`source`, for blocks of p output neurons, of any fan-in, and for larger kernels."""
    _, p, _, entries, has_radius, _, _ = variant
    program = BlockTiles(p, dense)
    upper, inverse = (Matrix(program, x) for x in ("u", "inverse")) if entries else (None, None)
    found = written(program, variant, kind, lambda x: Tiles(program, name=x), upper, inverse)
    layout: dict[str, Any] = {"pool": pool, "reads_by": reads_by}
    if kind == "squares":
        return block_kernel(program, entries, has_radius, weights=None, momentum=None, square=found[0], **layout)
    weights, momentum, _ = found
    return block_kernel(program, entries, has_radius, weights=weights, momentum=momentum, square=None, **layout)


# Calling it ----------------------------------------------------------------------------------------------------------


class Launches:
    """The code of some weights, a launch for all that are alike; see :class:`lightning_fgsgd.fused.Launches`."""

    def __init__(self, jobs: Sequence[Job], kind: str | None = None) -> None:
        alike = _alike(jobs, kind)
        self._launches = [(members, Launch(key, [jobs[i] for i in members])) for key, members in alike.items()]

    def squares(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Sums of ‖gradL(ω)‖² over the groups of each weight, (G,) each, in double precision."""
        found: dict[int, Tensor] = {}
        for members, launch in self._launches:
            of_all = launch.run([jobs[i] for i in members])
            if launch.key.pool.summed:
                found |= zip(members, launch.sums(of_all), strict=True)
            else:
                parts = zip(members, of_all.split(launch.sizes), strict=True)
                found |= {i: jobs[i].pom.group_sums(part) for i, part in parts}
        return [found[i] for i in range(len(jobs))]

    def advance(self, jobs: Sequence[Job], shares: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Move the weights and their momenta in place, given 1/𝔤 of their groups; see :func:`lightning_fgsgd.eager.advance`.

        Returns:
            Which components of each weight were moved, bool (k,); and whether all of them were, a few answers for all.
        """
        found: dict[int, Tensor] = {}
        whole = []
        for members, launch in self._launches:
            mine = [jobs[i] for i in members]
            moved = launch.run(mine, [shares[i] for i in members]).view(torch.bool)
            torch.autograd.graph.increment_version(
                [x for job in mine for x in (job.weight, job.buffer) if x is not None]
            )
            whole.append(moved.all())
            found |= zip(members, moved.split(launch.sizes), strict=True)
        return [found[i] for i in range(len(jobs))], whole


class Launch:
    """One launch, and its tables."""

    def __init__(self, key: Key, jobs: Sequence[Job]) -> None:
        self.key = key
        programs = [-(-job.pom.cutting.count // _LANES) if key.variant[0] else job.pom.cutting.count for job in jobs]
        self.sizes = [job.pom.cutting.count for job in jobs]
        if key.pool.summed:  # sums by program
            self.sizes = [n * job.pom.sets.groups_in_pool for n, job in zip(programs, jobs, strict=True)]
        self._groups = [job.pom.num_groups for job in jobs]
        self._programs = sum(programs)
        self._starts, self._owners = _starts(tuple(self._groups), tuple(self.sizes), tuple(programs), key.device)
        self._rows = [_row(job) for job in jobs]
        self._addresses: tuple[int, ...] = ()
        self._numbers: tuple[tuple[float, ...], ...] = ()

    def run(self, jobs: Sequence[Job], shares: Sequence[Tensor] = ()) -> Tensor:
        """Launch the code, with 1/𝔤 of the groups of each weight where it needs them; what it found."""
        addresses = tuple(0 if x is None else x.data_ptr() for job in jobs for x in job[1:4])
        if addresses != self._addresses:
            rows = ((*addresses[3 * i : 3 * i + 3], *row) for i, row in enumerate(self._rows))
            self._addresses, self._whole = addresses, _table(tuple(rows), self.key.device)
        numbers = tuple(job.numbers for job in jobs)
        if numbers != self._numbers:
            self._numbers, self._table = numbers, _filled(numbers, self.key.device)
        out = torch.empty(sum(self.sizes), dtype=torch.uint8 if shares else torch.float32, device=self.key.device)
        of_groups = torch.cat(list(shares)) if shares else out
        constants: dict[str, Any] = {"TILE": _TILE, "PRECISION": _PRECISION}
        constants = {"BLOCK": _LANES} if self.key.variant[0] else constants
        tables = self._owners, self._whole, self._starts, self._table, of_groups, out
        with torch.cuda.device_of(out):
            _kernel(*self.key[:5])[(self._programs,)](*tables, **constants, num_warps=_WARPS)
        return out

    def sums(self, of_programs: Tensor) -> list[Tensor]:
        """Sums over the groups of each weight, of what its programs found."""
        sums = torch.empty(sum(self._groups), dtype=torch.float64, device=self.key.device)
        grid = (len(self._groups), max(self._groups))
        with torch.cuda.device_of(sums):
            _load(TOTAL)[grid](self._whole, self._starts, of_programs, sums, PART=256, num_warps=4)
        return list(sums.split(self._groups))


@functools.lru_cache(maxsize=64)
def _starts(
    groups: tuple[int, ...], sizes: tuple[int, ...], programs: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where a launch has what belongs to each weight, int64; and the number of the weight of each program, int32."""
    counts = torch.tensor([groups, sizes, programs], device="cpu")
    starts = counts.cumsum(1) - counts
    owners = torch.arange(len(programs), dtype=torch.int32, device="cpu").repeat_interleave(counts[2])
    return starts.T.contiguous().to(device), owners.to(device)


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _filled(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    filled = [[*row, *([0.0] * (NUMBERS - len(row)))] for row in rows]
    return torch.tensor(filled, dtype=torch.float32, device="cpu").to(device, non_blocking=True)


def _row(job: Job) -> tuple[int, ...]:
    """A weight's row of the table of whole numbers, but for the addresses of weight, gradient and momentum, its first."""
    pom, cutting = job.pom, job.pom.cutting
    lanes = _by_lanes(pom)
    upper, inverse = (pom.upper, None) if lanes else _factors(pom)
    radius = None if pom.all_ones else pom._radius
    if radius is not None and cutting.kind == "filter":
        radius = pom.layouts.setdefault("radius", pom.radius)  # kept, for its address is
    of_pom = (upper, inverse, radius, pom.sets.manifold, pom.sets.slot)
    first, second = (cutting.count, 1) if cutting.kind == "filter" else cutting.shape[:2]
    programs = -(-cutting.count // _LANES) if lanes else cutting.count
    sizes = (cutting.count, programs, cutting.n, first, second, max(first // cutting.conv_groups, 1))
    addresses = (0 if x is None else x.data_ptr() for x in of_pom)
    strides = (s for x in job[1:4] for s in ((0,) * 4 if x is None else _strides(pom, x) or ()))
    return (*addresses, *sizes, pom.sets.groups_in_pool, *strides)


def _factors(pom: POM) -> tuple[Tensor | None, Tensor | None]:
    """U of every component as a compact matrix (k, 1, 1), (k, 1, p) or (k, p, p), and its inverse."""
    if pom.upper is None or pom.inverse is not None:
        return pom.upper, pom.inverse
    if "factors" not in pom.layouts:
        upper = unpack_upper(pom.upper, pom.cutting, (pom.cutting.count,), slice(None)).contiguous()
        pom.layouts["factors"] = upper, rounded_inverse(upper)
    found: tuple[Tensor, Tensor] = pom.layouts["factors"]
    return found


def _strides(pom: POM, x: Tensor) -> tuple[int, ...] | None:
    """Strides of the first and second axis that count the components, and of their rows and columns; None without a view."""
    key = ("gpu", x.stride())
    if key not in pom.layouts:
        pom.layouts[key] = pom.cutting.strides(x)
    found: tuple[int, ...] | None = pom.layouts[key]
    return found

"""The step of many weights in one launch on a GPU: Triton code made from :mod:`~lightning_fgsgd.step` itself.

As :mod:`~lightning_fgsgd.fused` does for a CPU. What differs between the weights that a launch serves (addresses, sizes,
strides, the numbers of the step) stands in two small tables in the device's memory. For float32; all else, and kernels
larger than 3x3, go through :mod:`~lightning_fgsgd.eager`.

With ``TRITON_INTERPRET=1`` in the environment it runs on a CPU, slowly, to be tested.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.pom import POM
from lightning_fgsgd.source_gpu import (
    NUMBERS,
    WHOLE,
    BlockTiles,
    Matrix,
    Tiles,
    TritonProgram,
    block_kernel,
    lane_kernel,
)
from lightning_fgsgd.step import Options
from lightning_fgsgd.symbolic import planes, upper_of, variant_of, written

__all__ = ["Job", "advance", "available", "group_squares", "suits"]

_LARGEST = 9  # entries of a kernel: code for a 4x4 one takes half a minute to compile, for a 5x5 one minutes
_MOST_ROWS = 32  # output neurons in a block, likewise
_MOST_SLOTS = 16  # groups in a pool
_LANES = 128  # kernels that a program works on, one to a thread
_TILE = 64  # columns of a block that are worked on together
_PRECISION = "ieee"  # of products: all of float32
_FIRST_SHARE, _FIRST_OUT = WHOLE.index("first_share"), WHOLE.index("first_out")


class Job(NamedTuple):
    """What a step is to do to one weight: its momentum None without one, ``share`` 1/𝔤 of every group, (G,)."""

    pom: POM
    weight: Tensor
    grad: Tensor
    buffer: Tensor | None
    share: Tensor | None
    metric: str
    options: Options
    nesterov: bool


def interpreted() -> bool:
    """Whether Triton code is to run on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def suits(pom: POM, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether there is GPU code for a weight and the tensors that go with it."""
    tensors = [weight, *(x for x in others if x is not None)]
    if not (weight.is_cuda or interpreted()):
        return False
    if any(x.dtype != torch.float32 or x.device != weight.device or _strides(pom, x) is None for x in tensors):
        return False
    cutting, sets = pom.cutting, pom.sets
    if sets.groups_in_pool > _MOST_SLOTS or sets.slot.dtype != torch.uint8:
        return False
    if cutting.small:
        return cutting.n * cutting.p <= _LARGEST
    dense = all(x.stride() == weight.stride() for x in tensors)
    return cutting.kind == "filter" and cutting.p <= _MOST_ROWS and dense


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


def _load(source: str) -> Any:
    from torch._inductor.codecache import PyCodeCache  # Triton reads its functions from files

    return PyCodeCache.load(source).kernel


def group_squares(jobs: Sequence[Job]) -> list[Tensor]:
    """Sums of ‖gradL(ω)‖² over the groups of each weight, (G,) each, in double precision."""
    found: dict[int, Tensor] = {}
    for key, members in _alike(jobs, "squares").items():
        mine = [jobs[i] for i in members]
        sizes = [_partial(key, job) for job in mine]
        out = torch.empty(sum(sizes), device=mine[0].weight.device)
        _launch(key, mine, out, sizes, None)
        for i, job, part in zip(members, mine, out.split(sizes), strict=True):
            if key[2] == "0":
                found[i] = part.view(-1, job.pom.sets.groups_in_pool).sum(0, dtype=torch.float64)
            else:
                found[i] = job.pom.group_sums(part)
    return [found[i] for i in range(len(jobs))]


def advance(jobs: Sequence[Job]) -> list[Tensor]:
    """Move the weights and their momenta in place; which components were moved, bool (k,) each.

    See :func:`lightning_fgsgd.eager.advance`.
    """
    found: dict[int, Tensor] = {}
    for key, members in _alike(jobs, None).items():
        mine = [jobs[i] for i in members]
        sizes = [job.pom.cutting.count for job in mine]
        moved = torch.empty(sum(sizes), dtype=torch.uint8, device=mine[0].weight.device)
        _launch(key, mine, moved, sizes, [job.share for job in mine if job.share is not None])
        found |= dict(zip(members, moved.view(torch.bool).split(sizes), strict=True))
        for job in mine:
            for x in (job.weight, job.buffer):
                if x is not None:
                    torch.autograd.graph.increment_version(x)
    return [found[i] for i in range(len(jobs))]


# From the step to Triton ---------------------------------------------------------------------------------------------


def _alike(jobs: Sequence[Job], kind: str | None) -> dict[tuple[Any, ...], list[int]]:
    """The jobs that one launch can do, by what its code depends on and where it runs."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        cutting = job.pom.cutting
        which = kind or ("move" if job.buffer is None else "nesterov" if job.nesterov else "momentum")
        first, second = ("by_first", "by_second") if cutting.transposed else ("by_second", "by_first")
        pool = {"pi": first, "po": second}.get(job.pom.sets.scheme, "0") if cutting.small else "0"
        reads_by = "k" if len(job.pom._radius) == cutting.count else first
        key = (variant_of(job.pom, job.weight, job.metric), which, pool, reads_by, job.weight.device)
        found.setdefault(key, []).append(i)
    return found


@functools.cache
def _kernel(variant: tuple[Any, ...], kind: str, pool: str, reads_by: str) -> Any:
    return _load(source(variant, kind, pool, reads_by) if variant[0] else block_source(variant, kind))


def source(variant: tuple[Any, ...], kind: str, pool: str, reads_by: str) -> str:
    """Triton code of one of the functions of a step, see :func:`lightning_fgsgd.fused.source`."""
    n, p, _, entries, has_radius, _, _ = variant
    program = TritonProgram()
    found = written(program, variant, kind, lambda x: planes(program, x, n, p), upper_of(program, entries, p, ""))
    layout = {"pool": pool, "reads_by": reads_by}
    if kind == "squares":
        return lane_kernel(program, n, p, entries, has_radius, reads=("w", "g"), results={"q": found[0]}, **layout)
    weights, momentum, within = found
    results = {f"w{e}": x for e, x in enumerate(weights.entries)} | {"o": within}
    if momentum is not None:
        results |= {f"b{e}": x for e, x in enumerate(momentum.entries)}
    reads = ("w", "g") if momentum is None else ("w", "g", "b")
    return lane_kernel(program, n, p, entries, has_radius, reads=reads, results=results, **layout)


def block_source(variant: tuple[Any, ...], kind: str) -> str:
    """As :func:`source`, for blocks of p output neurons, of any fan-in."""
    _, p, _, entries, has_radius, _, _ = variant
    program = BlockTiles(p)
    upper, *inverse = (Matrix(program, x) for x in ("u", "inverse", "excess")) if entries else (None,)
    found = written(program, variant, kind, lambda x: Tiles(program, name=x), upper, inverse or None)
    if kind == "squares":
        return block_kernel(program, entries, has_radius, weights=None, momentum=None, square=found[0])
    return block_kernel(program, entries, has_radius, weights=found[0], momentum=found[1], square=None)


# Calling it ----------------------------------------------------------------------------------------------------------


def _programs(cutting: Any) -> int:
    return -(-cutting.count // _LANES) if cutting.small else cutting.count


def _partial(key: tuple[Any, ...], job: Job) -> int:
    """How many numbers a launch gives of a weight's squared norms: sums by program, or one for each component."""
    cutting = job.pom.cutting
    return _programs(cutting) * job.pom.sets.groups_in_pool if key[2] == "0" else cutting.count


def _launch(
    key: tuple[Any, ...], jobs: Sequence[Job], out: Tensor, sizes: Sequence[int], shares: list[Tensor] | None
) -> None:
    device = jobs[0].weight.device
    programs = tuple(_programs(job.pom.cutting) for job in jobs)
    groups = [job.pom.num_groups for job in jobs]
    rows, held, starts = [], [], [0, 0, 0]
    for job, size, group, program in zip(jobs, sizes, groups, programs, strict=True):
        row, more = _row(job)
        row[_FIRST_SHARE : _FIRST_OUT + 2] = starts
        starts = [starts[0] + group, starts[1] + size, starts[2] + program]
        rows.append(row)
        held.append(more)  # kept until the code has been launched
    numbers = []
    for job in jobs:
        found = [*map(float, job.options), *(m**-0.5 for m in job.pom.metrics(job.metric))]
        numbers.append(found + [0.0] * (NUMBERS - len(found)))
    whole = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    of_step = torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
    of_groups = out if shares is None else torch.cat(shares)
    kernel = _kernel(*key[:4])
    constants: dict[str, Any] = {"BLOCK": _LANES} if key[0][0] else {"TILE": _TILE, "PRECISION": _PRECISION}
    with torch.cuda.device_of(jobs[0].weight):
        kernel[(sum(programs),)](_owners(programs, device), whole, of_step, of_groups, out, **constants, num_warps=4)


@functools.lru_cache(maxsize=64)
def _owners(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the weight that each program works on, int32."""
    counts = torch.tensor(programs)
    return torch.arange(len(programs), dtype=torch.int32).repeat_interleave(counts).to(device)


def _row(job: Job) -> tuple[list[int], list[Tensor]]:
    """A weight's row of the table, and the tensors in it that are made for it."""
    pom, cutting = job.pom, job.pom.cutting
    radius = None if pom.all_ones else pom._radius if cutting.small else pom.radius
    tensors = (job.weight, job.grad, job.buffer, pom.upper, pom.inverse, radius, pom.sets.manifold, pom.sets.slot)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    first, second = (cutting.shape[0], cutting.shape[1]) if cutting.small else (1, 1)
    sizes = [cutting.count, cutting.n, first, second, max(first // cutting.conv_groups, 1), pom.sets.groups_in_pool]
    strides = [s for x in (job.weight, job.grad, job.buffer) for s in ((0,) * 4 if x is None else _strides(pom, x))]
    return [*addresses, 0, 0, 0, *sizes, *strides], [] if radius is None else [radius]


def _strides(pom: POM, x: Tensor) -> tuple[int, ...] | None:
    """Strides of the first and second axis that count the components, and of their rows and columns; None without a view."""
    key = ("gpu", x.stride())
    if key not in pom.layouts:
        view = pom.cutting.view(x)
        if view is None:
            pom.layouts[key] = None
        else:
            outer = view.stride()[:-2]
            pom.layouts[key] = (*(outer if len(outer) == 2 else (outer[0] * pom.cutting.shape[1], outer[0])),
                                view.stride(-2), view.stride(-1))  # fmt: skip
    found: tuple[int, ...] | None = pom.layouts[key]
    return found

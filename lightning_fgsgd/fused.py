"""The step of many weights in a single pass over memory: C++ made from :mod:`~lightning_fgsgd.step` itself.

The functions of the step are run once on symbols, which write down every operation that is done to them. That list of
operations is the body of a loop over the components of a weight, so there is no second version of the mathematics. Small
kernels are symbols entry by entry, a vector of components at a time (:mod:`~lightning_fgsgd.source`), contiguous or
channels_last; blocks of output neurons, and large kernels, are symbols row by row, one at a time
(:mod:`~lightning_fgsgd.source_blocks`).
One loop serves all weights whose components have the same size, whatever their shape: sizes, strides and the numbers of the
step stand in a table, and it is called once for all of them. torch's own code cache compiles it, in seconds, once a machine.

For float32 and float64 on a CPU. All else goes through :mod:`~lightning_fgsgd.eager`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import warnings
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.cpp import COLUMNS
from lightning_fgsgd.grouping import SCHEMES
from lightning_fgsgd.job import Job
from lightning_fgsgd.pom import POM
from lightning_fgsgd.source import Program, loop
from lightning_fgsgd.source_blocks import BlockProgram, Rows, block_loop
from lightning_fgsgd.symbolic import WORTH_COMPILING, planes, upper_of, variant_of, written

__all__ = ["Launches", "available", "suits"]

# Within a tenth as fast as with -O3, and compiled in a fraction of its time. Without traps a choice by a condition is one
# instruction: with AVX2 alone, a loop that has one is not vectorised else.
_FLAGS = (
    *("-O2", "-ftree-loop-vectorize", "-ftree-slp-vectorize", "-fvect-cost-model=dynamic"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_MOST_ROWS = 64  # output neurons in a block up to which its p x p matrices stay in the first cache


def suits(pom: POM, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether there is compiled code for a weight and the tensors that go with it."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return False
    tensors = [weight, *(x for x in others if x is not None)]
    key = ("compiled", *(x.stride() for x in tensors), *(x.dtype for x in tensors), *(x.device for x in tensors))
    if key not in pom.layouts:
        pom.layouts[key] = _suits(pom, tensors)
    return bool(pom.layouts[key])


def _suits(pom: POM, tensors: list[Tensor]) -> bool:
    weight = tensors[0]
    if any(x.dtype != weight.dtype or x.device != weight.device or pom.cutting.view(x) is None for x in tensors):
        return False
    if pom.cutting.small:
        return pom.cutting.n * pom.cutting.p <= 16 or pom.cutting.count >= WORTH_COMPILING
    # The rows of a block come in the order in which they lie in memory.
    alike = pom.cutting.kind == "kernel" or all(x.stride() == weight.stride() for x in tensors)
    return alike and pom.cutting.p <= _MOST_ROWS


@functools.cache
def available() -> str:
    """ "" where C++ can be compiled; else why not."""
    try:
        _compile('extern "C" int kernel() { return 7; }')
    except Exception as error:  # whatever the compiler, its cache or the loader may raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _compile(source: str) -> Any:
    from torch._inductor.codecache import CppCodeCache  # imports a second's worth of modules

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CppCodeCache.load_async(source, "cpu", extra_flags=_FLAGS)()


# From the step to C++ ------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(variant: tuple[Any, ...], kind: str) -> tuple[Any, Any]:
    """The compiled code of a variant; and of what is larger, how many numbers a thread needs as room, by the layout."""
    library = _compile((source if variant[0] else block_source)(variant, kind))
    library.kernel.argtypes = (ctypes.c_int64, ctypes.c_void_p)
    library.kernel.restype = None
    if variant[0]:
        return library.kernel, None
    library.room_for.argtypes = (ctypes.c_void_p,)
    library.room_for.restype = ctypes.c_int64
    return library.kernel, library.room_for


def source(variant: tuple[Any, ...], kind: str) -> str:
    """The C++ of one of the functions of a step, ``"squares"``, ``"move"``, ``"momentum"`` or ``"nesterov"``."""
    n, p, _, entries, has_radius, _, dtype = variant
    program = Program(dtype)
    size = range(n * p)
    found = written(
        program,
        variant,
        kind,
        lambda x: planes(program, x, n, p, "[t]"),
        upper_of(program, entries, p, "[t]"),
        at="[t]",
    )
    if kind == "squares":
        program.store("q[t]", found[0])
        return loop(program, size, entries, has_radius, reads=("w", "g"), writes=(), sums=True)
    weights, momentum, within = found
    for i in size:
        program.store(f"w{i}[t]", weights.entries[i])
        if momentum is not None:
            program.store(f"b{i}[t]", momentum.entries[i])
    program.store("o[t]", within)
    touched = ("w",) if momentum is None else ("w", "b")
    return loop(program, size, entries, has_radius, reads=("w", "g", *touched[1:]), writes=touched, sums=False)


def block_source(variant: tuple[Any, ...], kind: str) -> str:
    """As :func:`source`, for blocks of p output neurons, of any fan-in, and for large kernels."""
    _, p, names, entries, has_radius, _, dtype = variant
    programs = []
    for number, name in names:
        program = BlockProgram(dtype, p, name)
        upper, inverse = (program.stored(f"{x} + k * {entries}", entries) if entries else None for x in "UV")
        alone = (*variant[:2], ((number, name),), *variant[3:])
        found = written(program, alone, kind, functools.partial(Rows, program), upper, inverse)
        if kind == "squares":
            program.store("out[k]", found[0])
        else:
            program.finish(w_new=found[0], b_new=found[1])
        programs.append((number, program))
    return block_loop(programs, has_radius, buffer=kind not in ("squares", "move"))


# Calling it ----------------------------------------------------------------------------------------------------------


class Launches:
    """The compiled code of some weights, a call for each variant of it, over a table of its weights.

    Made once, and run every step for as long as the weights and their layouts stay: addresses and numbers may change.

    Args:
        jobs: of these weights.
        kind: ``"squares"`` for :meth:`squares`, None for :meth:`advance`.
    """

    def __init__(self, jobs: Sequence[Job], kind: str | None = None) -> None:
        self._squares = kind == "squares"
        told = [_told(job, kind or job.kind) for job in jobs]
        self._told = [(x.kernel, x.layout, x.addresses, x.room) for x in told]  # and not the tensors: R may be set anew
        self._sizes = [job.pom.num_groups if self._squares else job.pom.cutting.count for job in jobs]
        self._starts = [0, *itertools.accumulate(self._sizes)]
        self._threads = 0  # of the tables; 0: none are made
        self._tables: list[tuple[Any, list[int], array[int]]] = []
        self._room = 0

    def squares(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Sums of ‖gradL(ω)‖² over the groups of each weight, (G,) each, in double precision."""
        sums = torch.zeros(self._starts[-1], dtype=torch.float64, device="cpu")
        self._run(jobs, [0] * len(jobs), sums=sums)
        return list(sums.split(self._sizes))

    def advance(self, jobs: Sequence[Job], shares: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Move the weights and their momenta in place, given 1/𝔤 of their groups; see :func:`lightning_fgsgd.eager.advance`.

        Returns:
            Which components of each weight were moved, bool (k,); and whether all of them were, one answer for all weights.
        """
        moved = torch.empty(self._starts[-1], dtype=torch.bool, device="cpu")
        shares = [share.contiguous() for share in shares]
        self._run(jobs, [share.data_ptr() for share in shares], moved=moved)
        torch.autograd.graph.increment_version([x for job in jobs for x in (job.weight, job.buffer) if x is not None])
        # As bytes: of bools, torch's `all` takes thirty times as long.
        return list(moved.split(self._sizes)), [moved.view(torch.uint8).min().bool()]

    def _run(self, jobs: Sequence[Job], shares: list[int], **found: Tensor) -> None:
        threads = torch.get_num_threads()
        if threads != self._threads:
            # Whole or not at all, also where an interrupt comes in between.
            self._tables, self._room = self._lay_out(jobs, threads)
            self._threads = threads
        numbers = [_numbers(job) for job in jobs]
        space = torch.empty(self._room, dtype=torch.uint8, device="cpu")
        fresh = {
            "s": [x.buffer_info()[0] for x in numbers],
            "W": [job.weight.data_ptr() for job in jobs],
            "G": [job.grad.data_ptr() for job in jobs],
            "B": [0 if self._squares or job.buffer is None else job.buffer.data_ptr() for job in jobs],
            "F": shares,
            "room": [space.data_ptr()] * len(jobs),
        }
        for name, out in found.items():
            fresh[name] = [out.data_ptr() + out.element_size() * start for start in self._starts]
        for kernel, members, table in self._tables:
            for name, addresses in fresh.items():
                table[COLUMNS.index(name) :: len(COLUMNS)] = array("q", [addresses[i] for i in members])
            kernel(len(members), table.buffer_info()[0])

    def _lay_out(self, jobs: Sequence[Job], most_threads: int) -> tuple[list[tuple[Any, list[int], array[int]]], int]:
        """The tables, by code, and how many bytes of room it needs to work in."""
        tables: dict[int, tuple[Any, list[int], array[int]]] = {}  # by id: functions of a library have no hash
        most = 0
        for i, (job, (kernel, layout, addresses, room)) in enumerate(zip(jobs, self._told, strict=True)):
            threads = most_threads if job.weight.numel() >= 2**14 else 1
            of_pom = dict(zip("UVRMS", addresses, strict=True))
            known = {"threads": threads, "layout": layout.buffer_info()[0], **of_pom}
            _, members, table = tables.setdefault(id(kernel), (kernel, [], array("q")))
            members.append(i)
            table.extend(known.get(name, 0) for name in COLUMNS)
            most = max(most, threads * room[0] + room[1])
        return list(tables.values()), most


class _Told(NamedTuple):
    """What compiled code is told of a weight for as long as its layout stays."""

    kernel: Any
    layout: array[int]
    of_pom: tuple[Tensor | None, ...]  # U, its inverse, R, the manifolds and the groups
    addresses: tuple[int, ...]  # of these
    room: tuple[int, int]  # bytes to work in: for each thread, and once


def _told(job: Job, kind: str) -> _Told:
    pom, weight, cutting = job.pom, job.weight, job.pom.cutting
    moved_along = weight if job.buffer is None else job.buffer
    key = ("told", kind, job.metric, weight.dtype, weight.stride(), job.grad.stride(), moved_along.stride())
    if key not in pom.layouts:
        kernel, room_for = _kernel(variant_of(pom, weight, job.metric), kind)
        of_pom: tuple[Tensor | None, ...]
        if cutting.small:
            layout = _layout(pom, weight, job.grad, moved_along)
            of_pom = (pom.upper, None, pom._radius, pom.sets.manifold, pom.sets.slot)
            room = 8 * pom.num_groups if kind == "squares" else 0, 0
        else:
            second = 1 if cutting.kind == "filter" else cutting.shape[1]
            strides = (s for x in (weight, job.grad, moved_along) for s in cutting.strides(x) or ())
            layout = array("q", (cutting.count, cutting.n, second, *strides))
            of_pom = (pom.upper, pom.inverse, None if pom.all_ones else pom.radius, pom.sets.manifold, pom.group)
            room = room_for(layout.buffer_info()[0]) * weight.element_size(), cutting.count * weight.element_size()
        pom.layouts[key] = _Told(kernel, layout, of_pom, tuple(0 if x is None else x.data_ptr() for x in of_pom), room)
    found: _Told = pom.layouts[key]
    return found


def _numbers(job: Job) -> array[float]:
    numbers, layouts = job.numbers, job.pom.layouts
    if layouts.get("numbers as told", (None,))[0] is not numbers:
        layouts["numbers as told"] = numbers, array("d" if job.weight.dtype == torch.float64 else "f", numbers)
    found: array[float] = layouts["numbers as told"][1]
    return found


def _layout(pom: POM, *tensors: Tensor) -> array[int]:
    """Counts, sizes, strides and offsets for the code of small kernels."""
    views: list[Any] = [pom.cutting.view(x) for x in tensors]
    sizes, strides = _axes(pom, tuple((pom.cutting.strides(x) or ())[:2] for x in tensors))
    offsets = [
        i * v.stride(-2) + j * v.stride(-1) for v in views for i in range(v.shape[-2]) for j in range(v.shape[-1])
    ]
    wide = pom.sets.slot.dtype != torch.uint8
    counts = pom.cutting.count, pom.sets.groups_in_pool, wide, pom.num_groups
    return array("q", (*counts, *sizes, *strides, *offsets))


def _axes(pom: POM, strides: tuple[tuple[int, ...], ...]) -> tuple[list[int], list[int]]:
    """Sizes of four loops over the components, and the strides of each operand in them: the last loop is the inner one.

    Components are counted by expert, conv group, and the weight's first and second axis. Loops that can be one are.
    """
    cutting = pom.cutting
    experts, groups, second = cutting.experts or 1, cutting.conv_groups, cutting.shape[1]
    first = cutting.shape[0] // groups
    sizes = [experts, groups, first, second]
    by_first, by_second = (0, first, 1, 0), (0, second, 0, 1)
    reads = by_first if cutting.transposed else by_second
    scheme = pom.sets.scheme
    pool = {SCHEMES[0]: reads, SCHEMES[1]: by_second if cutting.transposed else by_first}.get(scheme, (0, 0, 0, 0))
    count = (groups * first * second, first * second, second, 1)
    radius = count if len(pom._radius) == cutting.count else reads
    rows = [(s[0] * groups * first, s[0] * first, s[0], s[1]) for s in strides] + [count, pool, radius]
    axes = [(n, tuple(row[i] for row in rows)) for i, n in enumerate(sizes) if n > 1]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, steps in axes:
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            n, steps = merged.pop()[0] * n, steps
        merged.append((n, steps))
    # The inner loop: over neighbours in memory; else over any that are many, and near.
    merged.sort(
        key=lambda axis: (axis[1][0] == 1 and axis[0] >= 8, axis[0] >= 64, -axis[1][0] if axis[0] >= 64 else axis[0])
    )
    merged = [(1, (0,) * len(rows))] * (4 - len(merged)) + merged
    return [n for n, _ in merged], [x for row in zip(*(steps for _, steps in merged), strict=True) for x in row]

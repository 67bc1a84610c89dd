"""The step of one weight in a single pass over memory: C++ made from :mod:`~lightning_fgsgd.step` itself.

The functions of the step are run once on symbols, which write down every operation that is done to them. That list of
operations is the body of a loop over the components of a weight, so there is no second version of the mathematics. Small
kernels are symbols entry by entry, a vector of components at a time (:mod:`~lightning_fgsgd.source`), contiguous or
channels_last; blocks of output neurons are symbols row by row, one block at a time (:mod:`~lightning_fgsgd.source_blocks`).
One loop serves all weights whose components have the same size, whatever their shape: sizes, strides and the numbers of the
step are its arguments. torch's own code cache compiles it, in seconds, once a machine.

For float32 and float64 on a CPU. All else, and large kernels, go through :mod:`~lightning_fgsgd.eager`.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.grouping import SCHEMES
from lightning_fgsgd.pom import POM
from lightning_fgsgd.source import Program, loop
from lightning_fgsgd.source_blocks import BlockProgram, Rows, Square, block_loop
from lightning_fgsgd.step import Options
from lightning_fgsgd.symbolic import WORTH_COMPILING, planes, upper_of, variant_of, written

__all__ = ["advance", "available", "group_squares", "suits"]

# Within a tenth as fast as with -O3, and compiled in a fraction of its time. Without traps a choice by a condition is one
# instruction: with AVX2 alone, a loop that has one is not vectorised else.
_FLAGS = (
    *("-O2", "-ftree-loop-vectorize", "-ftree-slp-vectorize", "-fvect-cost-model=dynamic"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_MOST_ROWS = 64  # output neurons in a block up to which its p x p matrices stay in the first cache
_MOST_SLOTS = 16  # groups in a pool up to which the loop finds a component's group by comparing


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
        few = pom.cutting.n * pom.cutting.p > 16 and pom.cutting.count < WORTH_COMPILING
        return not few and pom.sets.groups_in_pool <= _MOST_SLOTS and pom.sets.slot.dtype == torch.uint8
    return (
        pom.cutting.kind == "filter"
        and pom.cutting.p <= _MOST_ROWS
        and all(x.stride() == weight.stride() for x in tensors)
    )


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


def group_squares(pom: POM, weight: Tensor, grad: Tensor, metric: str, options: Options) -> Tensor:
    """Sums of ‖gradL(ω)‖² over the groups, (G,), in double precision."""
    if not pom.cutting.small:
        found = torch.empty(pom.cutting.count, dtype=weight.dtype)
        _call_blocks("squares", pom, weight, grad, None, None, metric, options, found, None)
        return pom.group_sums(found)
    kernel = _kernel(variant_of(pom, weight, metric), "squares")
    threads = _threads(weight)
    sums = torch.zeros(threads, pom.sets.groups_in_pool, pom.num_groups // pom.sets.groups_in_pool, dtype=torch.float64)
    _call(kernel, pom, weight, grad, None, None, metric, options, sums, None, threads)
    return sums.sum(0).T.flatten()


def advance(
    pom: POM,
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    share: Tensor,
    metric: str,
    options: Options,
    nesterov: bool,
) -> Tensor:
    """As :func:`lightning_fgsgd.eager.advance`."""
    kind = "move" if buffer is None else "nesterov" if nesterov else "momentum"
    moved = torch.empty(pom.cutting.count, dtype=torch.bool)
    if pom.cutting.small:
        kernel = _kernel(variant_of(pom, weight, metric), kind)
        table = share.view(-1, pom.sets.groups_in_pool).T.contiguous()
        _call(kernel, pom, weight, grad, buffer, table, metric, options, None, moved, _threads(weight))
    else:
        of_block = share.index_select(0, pom.group)
        _call_blocks(kind, pom, weight, grad, buffer, of_block, metric, options, None, moved)
    for x in (weight, buffer):
        if x is not None:
            torch.autograd.graph.increment_version(x)
    return moved


def _threads(weight: Tensor) -> int:
    return torch.get_num_threads() if weight.numel() >= 2**14 else 1


# From the step to C++ ------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(variant: tuple[Any, ...], kind: str) -> Any:
    """The compiled code of a variant; of blocks, and the number of rooms that it needs."""
    if variant[0]:
        return _compile(source(variant, kind)).kernel
    library = _compile(block_source(variant, kind))
    return library.kernel, library.rooms()


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
    """As :func:`source`, for blocks of p output neurons, of any fan-in."""
    _, p, _, entries, has_radius, _, dtype = variant
    program = BlockProgram(dtype, p)
    upper, *inverse = (Square(program, x, shape="upper") for x in ("u", "inverse", "excess")) if entries else (None,)
    found = written(program, variant, kind, lambda x: Rows(program, x), upper, inverse or None)
    if kind == "squares":
        program.store("out[k]", found[0])
        return block_loop(program, entries, has_radius, buffer=False)
    weights, momentum, _ = found
    program.finish(w_new=weights, b_new=momentum)
    return block_loop(program, entries, has_radius, buffer=momentum is not None)


# Calling it ----------------------------------------------------------------------------------------------------------


def _call_blocks(
    kind: str,
    pom: POM,
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    share: Tensor | None,
    metric: str,
    options: Options,
    out: Tensor | None,
    moved: Tensor | None,
) -> None:
    kernel, rooms = _kernel(variant_of(pom, weight, metric), kind)
    threads, size = _threads(weight), pom.cutting.n * pom.cutting.p
    room = torch.empty(threads * rooms * size, dtype=weight.dtype)
    radius = None if pom.all_ones else pom.radius
    numbers = [*map(float, options), *(m**-0.5 for m in pom.metrics(metric))]
    real = ctypes.c_double if weight.dtype == torch.float64 else ctypes.c_float
    tensors = (weight, grad, buffer, pom.upper, pom.inverse, radius, pom.sets.manifold, share, out, moved, room)
    layout = (threads, pom.cutting.count, pom.cutting.n)
    kernel(
        (ctypes.c_int64 * len(layout))(*layout),
        (real * len(numbers))(*numbers),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
    )


def _call(
    kernel: Any,
    pom: POM,
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    table: Tensor | None,
    metric: str,
    options: Options,
    sums: Tensor | None,
    moved: Tensor | None,
    threads: int,
) -> None:
    layout = _layout(pom, weight, grad, weight if buffer is None else buffer)
    layout[0] = threads
    inverse_roots = [m**-0.5 for m in pom.metrics(metric)]
    real = ctypes.c_double if weight.dtype == torch.float64 else ctypes.c_float
    numbers = [*map(float, options), *inverse_roots]
    tensors = (weight, grad, buffer, pom.upper, pom._radius, pom.sets.manifold, pom.sets.slot, table, sums, moved)
    kernel(
        layout,
        (real * len(numbers))(*numbers),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
    )


def _layout(pom: POM, *tensors: Tensor) -> Any:
    """Counts, sizes, strides and offsets for the code, the first of them for the number of threads."""
    key = (len(pom._radius), *(x.stride() for x in tensors))
    if key not in pom.layouts:
        views: list[Any] = [pom.cutting.view(x) for x in tensors]
        second = pom.cutting.shape[1]
        outer = [v.stride()[:-2] for v in views]
        sizes, strides = _axes(pom, tuple(s if len(s) == 2 else (s[0] * second, s[0]) for s in outer))
        offsets = [
            i * v.stride(-2) + j * v.stride(-1) for v in views for i in range(v.shape[-2]) for j in range(v.shape[-1])
        ]
        slots = pom.sets.groups_in_pool
        numbers = [0, pom.cutting.count, slots, pom.num_groups // slots, *sizes, *strides, *offsets]
        pom.layouts[key] = (ctypes.c_int64 * len(numbers))(*numbers)
    return pom.layouts[key]


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

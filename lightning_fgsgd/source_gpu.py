"""The step in Triton's language: a kernel a lane. :mod:`~lightning_fgsgd.source_tiles` has what is larger.

The same symbols as in :mod:`~lightning_fgsgd.source` write down what a step does. One launch serves all weights of a model
whose components have the same size: each program looks up in a table which weight it works on, and where that lies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_fgsgd.matrices import Value
from lightning_fgsgd.source import Program, Symbol

__all__ = ["COUNTED", "NUMBERS", "STARTS", "TOTAL", "WHOLE", "Pools", "TritonProgram", "lane_kernel", "wrapped"]

# What the table of whole numbers has of each weight: addresses, sizes, and where its results and strides are.
WHOLE = (
    "W", "G", "B", "U", "V", "R", "M", "S",
    "count", "programs", "n", "first", "second", "per_group", "slots",
    "w_first", "w_second", "w_n", "w_p", "g_first", "g_second", "g_n", "g_p", "b_first", "b_second", "b_n", "b_p",
)  # fmt: skip
STARTS = (
    "first_share",
    "first_out",
    "first_program",
)  # in another table: where the launch has what belongs to the weight
NUMBERS = 16  # a row of the other table: the options of the step, and 1/√m of each manifold


class Pools(NamedTuple):
    """How a component's group is found.

    Attributes:
        counted: how its pool is counted, ``"0"``, ``"by_first"`` or ``"by_second"``.
        slot: type of the number of a group within its pool, ``"uint8"`` or ``"int32"``.
        summed: whether a program sums up squared norms for each group; else it writes them down by component.
    """

    counted: str
    slot: str
    summed: bool


class TritonProgram(Program):
    """Code in Triton's language. Quotients and roots are rounded to the last bit, as on a CPU."""

    over = "tl.div_rn({}, {})"
    one_over_root = "tl.div_rn(1.0, tl.sqrt_rn({}))"
    choice = "tl.where({}, {}, {})"
    definition = "{} = {}"

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def text(self, x: Any) -> str:
        """A symbol or a number, in Python."""
        return x.name if isinstance(x, Symbol) else repr(x)


def lane_kernel(
    program: TritonProgram,
    n: int,
    p: int,
    factors: int,
    radius: bool,
    *,
    reads: Sequence[str],
    results: dict[str, Value],
    pool: Pools,
    reads_by: str,
) -> str:
    """The Triton function ``kernel`` that runs ``program`` for every kernel of some weights, one to a lane.

    Args:
        program: reads the entries ``w0``, ``w1``, ... (weight), ``g`` (gradient), ``b`` (momentum) and ``u`` (U), and ``r``
            (R), ``m`` (number of the manifold), ``f`` (1/𝔤) and ``s`` (numbers of the step).
        n, p: shape of a kernel.
        factors: number of entries of U.
        radius: whether there is an R.
        reads: tensors to read.
        results: what is written: entries of the weight and the momentum, by their names; ``"q"`` (squared norm) or ``"o"``
            (whether the component was moved).
        pool: how a component's group is found.
        reads_by: how R is counted, ``"k"``, ``"by_first"`` or ``"by_second"``.
    """
    lines = [
        "k = (tl.program_id(0) - first_program).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)",
        "here = k < count",
        *COUNTED,
        "m = tl.load(M + k, mask=here, other=0)",
        "slot = tl.load(S + k, mask=here, other=0).to(tl.int32)",
        f"pool = {pool.counted}",
    ]
    for name in reads:
        lines.append(f"{name}_here = {name.upper()} + x.to(tl.int64) * {name}_first + z.to(tl.int64) * {name}_second")
        for e in range(n * p):
            lines.append(f"{name}{e} = tl.load({_entry(name, e, p)}, mask=here, other=0.0)")
    lines += [f"u{e} = tl.load(U + {e} * count + k, mask=here, other=0.0)" for e in range(factors)]
    if radius:
        lines.append(f"r = tl.load(R + {reads_by}, mask=here, other=1.0)")
    if "q" not in results:
        lines.append("f = tl.load(F + first_share + pool * slots + slot, mask=here, other=1.0)")
    lines += program.lines
    for name, value in results.items():
        text = program.text(value)
        if name == "o":
            lines.append(f"tl.store(OUT + first_out + k, ({text}).to(tl.uint8), mask=here)")
        elif name != "q":
            lines.append(f"tl.store({_entry(name[0], int(name[1:]), p)}, {text}, mask=here)")
        elif pool.summed:  # summed up over the program's lanes, in their order
            lines += [
                "sums = OUT + first_out + (tl.program_id(0) - first_program) * slots",
                "for i in range(0, slots):",
                f"    tl.store(sums + i, tl.sum(tl.where(here & (slot == i), {text}, 0.0)))",
            ]
        else:
            lines.append(f"tl.store(OUT + first_out + k, {text}, mask=here)")
    return wrapped(program, lines, "BLOCK: tl.constexpr", pool.slot)


# Where component k lies along the axes that count components, and its channel by either.
COUNTED = (
    "x = k // second.to(tl.int32)",
    "z = k % second.to(tl.int32)",
    "by_first = x % first.to(tl.int32)",
    "by_second = by_first // per_group.to(tl.int32) * second + z",
)


def _entry(name: str, e: int, p: int) -> str:
    return f"{name}_here + ({e // p} * {name}_n + {e % p} * {name}_p)"


def wrapped(program: Program, lines: Sequence[str], constants: str, slot: str) -> str:
    """The function around some lines: what it finds of its weight in the tables, and the numbers of the step."""
    given, types = [], {"M": "uint8", "S": slot}
    text = "\n".join(lines)
    for i, name in enumerate(WHOLE):
        if not re.search(rf"\b{name}\b", text):
            continue
        cast = f".to(tl.pointer_type(tl.{types.get(name, 'float32')}))" if name.isupper() else ""
        given.append(f"{name} = tl.load(whole + {i}){cast}")
    given += [f"{name} = tl.load(starts + {i})" for i, name in enumerate(STARTS) if re.search(rf"\b{name}\b", text)]
    given += [f"s{i} = tl.load(numbers + {i})" for i in sorted(program.numbers)]
    body = "\n    ".join(line.replace("\n", "\n    ") for line in [*given, *lines])
    return f"""import triton
import triton.language as tl


@triton.jit
def kernel(of, whole, starts, numbers, F, OUT, {constants}):
    weight = tl.load(of + tl.program_id(0))
    whole += weight * {len(WHOLE)}
    starts += weight * {len(STARTS)}
    numbers += weight * {NUMBERS}
    {body}
"""


# Sums of what the programs of each weight found for its groups: in double precision, and always in the same order.
TOTAL = f"""import triton
import triton.language as tl


@triton.jit
def kernel(whole, starts, OUT, sums, PART: tl.constexpr):
    weight = tl.program_id(0)
    programs = tl.load(whole + weight * {len(WHOLE)} + {WHOLE.index("programs")})
    slots = tl.load(whole + weight * {len(WHOLE)} + {WHOLE.index("slots")})
    first_share = tl.load(starts + weight * {len(STARTS)})
    first_out = tl.load(starts + weight * {len(STARTS)} + 1)
    slot = tl.program_id(1)
    total = tl.zeros((PART,), tl.float64)
    for j in range(0, programs, PART):
        i = j + tl.arange(0, PART)
        there = (i < programs) & (slot < slots)
        total += tl.load(OUT + first_out + i * slots + slot, mask=there, other=0.0).to(tl.float64)
    tl.store(sums + first_share + slot, tl.sum(total), mask=slot < slots)
"""

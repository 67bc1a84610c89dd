"""Symbols for whole blocks of output neurons, and the C++ loop around what is done to them.

A block is p rows of n numbers, as it lies in memory. All that a step does to it is sums of rows with p x p coefficients, and
inner products of rows; a block stays in the cache meanwhile, and is read from memory once and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_fgsgd.cpp import BLOCKS, VECTORS, each_weight
from lightning_fgsgd.matrices import Value, times
from lightning_fgsgd.source import Program, Symbol

__all__ = ["BlockProgram", "Rows", "Square"]


class BlockProgram(Program):
    """Code for one block at a time, with rooms of n · p numbers for what comes in between."""

    def __init__(self, dtype: Any, p: int) -> None:
        super().__init__(dtype)
        self.p = p
        self.rooms = 0
        self.within: Symbol | None = None
        self._squares = 0
        self.uses: list[tuple[int, str, tuple[str, ...]]] = []

    def rows(self, call: str, *read: Rows, write: bool = True) -> Rows:
        """The rows that a call computes from others, and ``{out}``, where they go."""
        name = f"x{len(self.lines)}"
        self.uses.append((len(self.lines), name, tuple(r.name for r in read)))
        self.lines.append(call.replace("{out}", name))
        return Rows(self, name)

    def square(self, code: str, *read: Rows) -> Square:
        """The p x p numbers that some code writes to ``{out}``."""
        name = f"z{self._squares}"
        self._squares += 1
        if read:
            self.uses.append((len(self.lines), "", tuple(r.name for r in read)))
        self.lines.append(f"real {name}[P][P]; " + code.replace("{out}", name))
        return Square(self, name)

    def value(self, call: str, *read: Rows) -> Symbol:
        """The number that a call computes from rows."""
        self.uses.append((len(self.lines), "", tuple(r.name for r in read)))
        return self.line(call)

    def settled(self, condition: Symbol) -> bool:
        """The condition decides at the end whether the block is written; until then all is as if it held."""
        self.within = condition
        return True

    def finish(self, **results: Rows | None) -> None:
        """Name the rows that the code is for."""
        for name, rows in results.items():
            if rows is not None:
                rows = rows.stored()
                self.uses.append((len(self.lines), "", (rows.name,)))
                self.lines.append(f"const real* const {name} = {rows.name};")

    def allocated(self, *ahead: str) -> list[str]:
        """The lines, with a room for all rows: one that is not read any more is used again.

        The first products fetch the rows ``ahead``, of the next block, while they compute.
        """
        last = {name: at for at, _, read in self.uses for name in read}
        lines = list(self.lines)
        wanted = iter(ahead)
        for i, line in enumerate(lines):
            if "{ahead}" in line:
                lines[i] = line.replace("{ahead}", next(wanted, "nullptr"))
        free: list[int] = []
        room_of: dict[str, int] = {}
        for at, name, read in self.uses:
            if name:
                if not free:
                    free.append(self.rooms)
                    self.rooms += 1
                room_of[name] = free.pop()
                lines[at] = f"real* const {name} = rooms + {room_of[name]} * size; " + lines[at]
            free += [room_of[r] for r in dict.fromkeys(read) if last[r] == at and r in room_of]
        return lines


class Rows:
    """An n x p matrix of symbols, stored as p rows, times a number that is kept apart: scaling costs no pass over the rows.

    Args:
        program: the code.
        name: of the rows in it.
        factor: the number.
    """

    rows: Any = ()

    def __init__(self, program: BlockProgram, name: str, factor: Value = 1.0) -> None:
        self._program = program
        self.name = name
        self.factor = factor

    @property
    def mT(self) -> _Transposed:
        """For inner products."""
        return _Transposed(self)

    def __matmul__(self, square: Square) -> Rows:
        call = f"apply<{square.shape}>(n, {{out}}, nullptr, 0, 1, {self.name}, {square.name}, {{ahead}});"
        return Rows(self._program, self._program.rows(call, self).name, self.factor)

    def subtract_product(self, a: Rows, square: Square) -> Rows:
        """This less a · square."""
        x, y = map(self._program.text, (self.factor, times(a.factor, -1.0)))
        call = f"apply<{square.shape}>(n, {{out}}, {self.name}, {x}, {y}, {a.name}, {square.name}, {{ahead}});"
        return self._program.rows(call, self, a)

    def combine(self, x: Value, other: Rows, y: Value) -> Rows:
        """x times this, and y times the other."""
        x, y = map(self._program.text, (times(self.factor, x), times(other.factor, y)))
        return self._program.rows(f"combine(size, {{out}}, {self.name}, {x}, {other.name}, {y});", self, other)

    def __add__(self, other: Rows) -> Rows:
        return self.combine(1.0, other, 1.0)

    def __sub__(self, other: Rows) -> Rows:
        return self.combine(1.0, other, -1.0)

    def __mul__(self, value: Value) -> Rows:
        return Rows(self._program, self.name, times(self.factor, value))

    def squares(self) -> Value:
        """Squared Frobenius norm."""
        return times(self._program.value(f"squares(size, {self.name})", self), times(self.factor, self.factor))

    def stored(self) -> Rows:
        """The same, with a factor of 1."""
        if isinstance(self.factor, float) and self.factor == 1.0:
            return self
        factor = self._program.text(self.factor)
        return self._program.rows(f"scale(size, {{out}}, {self.name}, {factor});", self)

    def where(self, mask: Symbol, other: Rows) -> Rows:
        """This where ``mask`` holds, the other elsewhere."""
        a, b = self.stored(), other.stored()
        return self._program.rows(f"choose(size, {{out}}, {mask.name}, {a.name}, {b.name});", a, b)


class _Transposed:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __matmul__(self, other: Rows) -> Square:
        return self._inner("gram", other)

    def symmetric_matmul(self, other: Rows) -> Square:
        """The inner products, which are known to be symmetric."""
        return self._inner("symmetric_gram", other)

    def _inner(self, call: str, other: Rows) -> Square:
        mine, factor = self._rows, times(self._rows.factor, other.factor)
        found = mine._program.square(f"{call}(n, {mine.name}, {other.name}, {{out}}, {{ahead}});", mine, other)
        return found if isinstance(factor, float) and factor == 1.0 else found * factor


class Square:
    """A p x p matrix of symbols.

    Args:
        program: the code.
        name: of the matrix in it.
        shape: ``"upper"`` or ``"lower"`` if it is triangular; else ``"full"``.
    """

    def __init__(self, program: BlockProgram, name: str, shape: str = "full") -> None:
        self._program = program
        self.name = name
        self.shape = shape
        self.rows = range(program.p)

    @property
    def is_double(self) -> bool:
        """Whether the numbers are in double precision."""
        return self._program.real == "double"

    def _entries(self, code: str) -> Square:
        return self._program.square(f"for (int i = 0; i < P; ++i) for (int j = 0; j < P; ++j) {{out}}[i][j] = {code};")

    @property
    def mT(self) -> Square:
        """The transposed matrix."""
        other = {"upper": "lower", "lower": "upper"}.get(self.shape, self.shape)
        return Square(self._program, self._entries(f"{self.name}[j][i]").name, other)

    def __add__(self, other: Square) -> Square:
        return self._entries(f"{self.name}[i][j] + {other.name}[i][j]")

    def combine(self, x: Value, other: Square, y: Value) -> Square:
        """x times this, and y times the other."""
        text = self._program.text
        return self._entries(f"{self.name}[i][j] * {text(x)} + {other.name}[i][j] * {text(y)}")

    def __mul__(self, value: Value) -> Square:
        return self._entries(f"{self.name}[i][j] * {self._program.text(value)}")

    def __matmul__(self, other: Square) -> Square:
        return self._program.square(f"multiply({self.name}, {other.name}, {{out}});")

    symmetric_matmul = __matmul__

    def symmetric_part(self) -> Square:
        """Half the sum with the transposed."""
        return self._entries(f"({self.name}[i][j] + {self.name}[j][i]) * real(0.5)")

    def trace(self) -> Symbol:
        """Sum of the diagonal."""
        return self._program.line(" + ".join(f"{self.name}[{i}][{i}]" for i in self.rows))

    def diagonal(self, f: Callable[[Value], Value]) -> Square:
        """The diagonal matrix of ``f`` of the diagonal."""
        found = [f(self._program.symbol(f"{self.name}[{i}][{i}]")) for i in self.rows]
        entries = " ".join(f"{{out}}[{i}][{i}] = {self._program.text(x)};" for i, x in enumerate(found))
        return self._program.square(f"clear({{out}}); {entries}")

    def add_identity(self, value: float, factor: float) -> Square:
        """factor times this, and value times the identity."""
        return self._entries(f"{self.name}[i][j] * real({factor!r}) + (i == j ? real({value!r}) : real(0))")

    def where(self, mask: Symbol, other: Square) -> Square:
        """This where ``mask`` holds, the other elsewhere."""
        return self._entries(f"{mask.name} ? {self.name}[i][j] : {other.name}[i][j]")


def block_loop(program: BlockProgram, entries: int, radius: bool, *, buffer: bool) -> str:
    """The C++ function ``kernel`` that runs ``program`` for every block of a weight, and ``rooms``: how many it needs.

    Args:
        program: reads the rows ``w`` (weight), ``g`` (gradient), ``b`` (momentum), the squares ``u`` (U),
            ``inverse`` and ``excess``, the numbers ``r`` (R), ``m`` (number of the manifold), ``f`` (1/𝔤) and ``s0``, ...;
            writes ``out[k]`` (squared norm), or ``w_new`` and ``b_new``, which are the block's if its condition holds.
        entries: number of entries of U that are stored, 0 if there is none.
        radius: whether there is an R.
        buffer: whether there is a momentum.
    """
    body = "\n        ".join(program.allocated("w_ahead", "g_ahead", "b_ahead"))
    filled = "".join(
        f" real {name}[P][P]; fill<{entries}>({name}, {at} * {entries});"
        for name, at in (("u", "U + k"), ("inverse", "V + k"), ("excess", "V + (count + k)"))
        if entries
    )
    numbers = " ".join(f"const real s{i} = s[{i}];" for i in sorted(program.numbers))
    ending = ""
    if program.within is not None:
        stores = "copy(size, W + k * size, w_new);" + (" copy(size, B + k * size, b_new);" if buffer else "")
        ending = f"moved[k] = {program.within.name}; if (moved[k]) {{ {stores} }}"
    return (
        f"typedef {program.real} real;\nconstexpr int P = {program.p};\n"
        + VECTORS
        + BLOCKS
        + f"""
{each_weight("int32_t", "real")} {{
  const int64_t count = layout[0], n = layout[1], size = n * P;
  real* const out = room + threads * {program.rooms} * size;
  {numbers}
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < count; ++k) {{
    real* const rooms = room + omp_get_thread_num() * {program.rooms} * size;
    real *w = W + k * size, *g = G + k * size, *b = B ? B + k * size : nullptr;
    const int64_t on = k + 1 < count ? size : 0;
    const real *w_ahead = w + on, *g_ahead = g + on, *b_ahead = b ? b + on : nullptr;
    const int m = M[k]; const real f = F ? F[S[k]] : real(1); {"const real r = R[k];" if radius else ""}
    {filled}
        {body}
    {ending}
  }}
  if (sums) for (int64_t k = 0; k < count; ++k) sums[S[k]] += out[k];
}}
extern "C" int rooms() {{ return {program.rooms}; }}
"""
    )

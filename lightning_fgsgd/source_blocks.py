"""Symbols for whole blocks of output neurons, and large kernels, and the C++ loop around what is done to them.

A block is p rows of n numbers, as it lies in memory; a large kernel is p columns of n, which are copied into rows first. All
that a step does to it is sums of rows with p x p coefficients, and inner products of rows; it stays in the cache meanwhile,
and is read from memory once and written once.

A block lives on one manifold, so there is a piece of code for each, and the loop chooses by the block. On Stiefel p x p
matrices are what they are (:class:`Square`); the other manifolds only ever ask for the diagonal of one (:class:`Diagonal`),
or for a multiple of the identity (:class:`Multiple`), and nothing else of it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_fgsgd.cpp import BLOCKS, VECTORS, each_weight
from lightning_fgsgd.matrices import Value, times, total
from lightning_fgsgd.source import Program, Symbol

__all__ = ["BlockProgram", "Rows", "block_loop"]


class BlockProgram(Program):
    """Code for one block at a time, with rooms of n · p numbers for what comes in between.

    Args:
        dtype: of the numbers.
        p: rows of a block.
        manifold: on which the block lives.
    """

    def __init__(self, dtype: Any, p: int, manifold: str) -> None:
        super().__init__(dtype)
        self.p = p
        self.manifold = manifold
        self.rooms = 0
        self.within: Symbol | None = None
        self._squares = 0
        self.uses: list[tuple[int, str, tuple[str, ...]]] = []

    def rows(self, call: str, *read: Rows) -> Rows:
        """The rows that a call computes from others, and ``{out}``, where they go."""
        name = f"x{len(self.lines)}"
        self.uses.append((len(self.lines), name, tuple(r.name for r in read)))
        self.lines.append(call.replace("{out}", name))
        return Rows(self, name)

    def small(self, code: str, *read: Rows, size: str = "[P][P]") -> str:
        """The name of the p x p numbers, or p of them, that some code writes to ``{out}``."""
        name = f"z{self._squares}"
        self._squares += 1
        if read:
            self.uses.append((len(self.lines), "", tuple(r.name for r in read)))
        self.lines.append(f"real {name}{size}; " + code.replace("{out}", name))
        return name

    def square(self, code: str, *read: Rows) -> Square:
        """The p x p numbers that some code writes to ``{out}``."""
        return Square(self, self.small(code, *read))

    def stored(self, place: str, entries: int) -> Square | Diagonal | Multiple:
        """U of the block, or its inverse, of which ``entries`` numbers are stored from ``place`` on."""
        if self.manifold == "stiefel":
            return Square(self, self.small(f"fill<{entries}>({{out}}, {place});"), "upper")
        if self.manifold != "oblique":
            return Multiple(self, self.line(f"*({place})"))
        step = {1: 0, self.p: 1}.get(entries, self.p + 1)
        code = f"for (int i = 0; i < P; ++i) {{out}}[i] = ({place})[i * {step}];"
        return Diagonal(self, self.small(code, size="[P]"))

    def value(self, call: str, *read: Rows) -> Symbol:
        """The number that a call computes from rows."""
        self.uses.append((len(self.lines), "", tuple(r.name for r in read)))
        return self.line(call.replace("{ahead}", "{{ahead}}"))  # that is found later

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
                self.lines.append(f"const matrix {name} = {rows.name};")

    def allocated(self, *ahead: str) -> list[str]:
        """The lines, with a room for all rows: one that is not read any more is used again.

        The first products fetch the rows ``ahead``, of the next block, while they compute.
        """
        last = {name: at for at, _, read in self.uses for name in read}
        lines = list(self.lines)
        wanted = iter(ahead)
        for i, line in enumerate(lines):
            if "{ahead}" in line:
                lines[i] = line.replace("{ahead}", next(wanted, "matrix{}"))
        free: list[int] = []
        room_of: dict[str, int] = {}
        for at, name, read in self.uses:
            if name:
                if not free:
                    free.append(self.rooms)
                    self.rooms += 1
                room_of[name] = free.pop()
                lines[at] = f"const matrix {name} = {{rooms + {room_of[name]} * P * pitch, pitch}}; " + lines[at]
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

    def __matmul__(self, square: Square | Diagonal | Multiple) -> Rows:
        if isinstance(square, Multiple):
            return self * square.value
        call = f"{square.apply}(n, {{out}}, {{}}, 0, 1, {self.name}, {square.name}, {{ahead}});"
        return Rows(self._program, self._program.rows(call, self).name, self.factor)

    def subtract_product(self, a: Rows, square: Square | Diagonal | Multiple) -> Rows:
        """This less a · square."""
        if isinstance(square, Multiple):
            return self.combine(1.0, a, times(square.value, -1.0))
        x, y = map(self._program.text, (self.factor, times(a.factor, -1.0)))
        call = f"{square.apply}(n, {{out}}, {self.name}, {x}, {y}, {a.name}, {square.name}, {{ahead}});"
        return self._program.rows(call, self, a)

    def combine(self, x: Value, other: Rows, y: Value) -> Rows:
        """x times this, and y times the other."""
        x, y = times(self.factor, x), times(other.factor, y)
        if isinstance(y, float) and y == 0.0:
            return Rows(self._program, self.name, x)
        if other.name == self.name:
            return Rows(self._program, self.name, total((x, y)))
        x, y = map(self._program.text, (x, y))
        return self._program.rows(f"combine(n, {{out}}, {self.name}, {x}, {other.name}, {y}, {{ahead}});", self, other)

    def __add__(self, other: Rows) -> Rows:
        return self.combine(1.0, other, 1.0)

    def __sub__(self, other: Rows) -> Rows:
        return self.combine(1.0, other, -1.0)

    def __mul__(self, value: Value) -> Rows:
        return Rows(self._program, self.name, times(self.factor, value))

    def squares(self) -> Value:
        """Squared Frobenius norm."""
        found = self._program.value(f"inner_product(n, {self.name}, {self.name}, {{ahead}})", self)
        return times(found, times(self.factor, self.factor))

    def stored(self) -> Rows:
        """The same, with a factor of 1."""
        if isinstance(self.factor, float) and self.factor == 1.0:
            return self
        factor = self._program.text(self.factor)
        return self._program.rows(f"scale(n, {{out}}, {self.name}, {factor});", self)


class _Transposed:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __matmul__(self, other: Rows) -> Square | Products:
        return self._inner("gram<false>", other)

    def symmetric_matmul(self, other: Rows) -> Square | Products:
        """The inner products, which are known to be symmetric."""
        return self._inner("gram<true>", other)

    def _inner(self, call: str, other: Rows) -> Square | Products:
        mine, factor = self._rows, times(self._rows.factor, other.factor)
        if mine._program.manifold != "stiefel":
            return Products(mine._program, mine, other)
        found = mine._program.square(f"{call}(n, {mine.name}, {other.name}, {{out}}, {{ahead}});", mine, other)
        return found if isinstance(factor, float) and factor == 1.0 else found * factor


class Products:
    """The inner products of the rows of two n x p matrices, of which no more is computed than is asked for."""

    def __init__(self, program: BlockProgram, a: Rows, b: Rows) -> None:
        self._program = program
        self._a = a
        self._b = b
        self._factor = times(a.factor, b.factor)
        self.rows = range(program.p)

    def trace(self) -> Value:
        """Sum of the diagonal."""
        code = f"inner_product(n, {self._a.name}, {self._b.name}, {{ahead}})"
        return times(self._program.value(code, self._a, self._b), self._factor)

    def diagonal(self, f: Callable[[Value], Value]) -> Diagonal:
        """The diagonal matrix of ``f`` of the diagonal."""
        code = f"inner_products(n, {self._a.name}, {self._b.name}, {{out}}, {{ahead}});"
        name, text = self._program.small(code, self._a, self._b, size="[P]"), self._program.text
        found = [f(times(self._program.symbol(f"{name}[{i}]"), self._factor)) for i in self.rows]
        return Diagonal(
            self._program,
            self._program.small(" ".join(f"{{out}}[{i}] = {text(x)};" for i, x in enumerate(found)), size="[P]"),
        )

    def multiple(self, value: Value) -> Multiple:
        """``value`` times the identity."""
        return Multiple(self._program, value)


class Diagonal:
    """A diagonal p x p matrix of symbols: an array of p numbers."""

    apply = "apply_diagonal"

    def __init__(self, program: BlockProgram, name: str) -> None:
        self._program = program
        self.name = name

    @property
    def mT(self) -> Diagonal:
        """The same."""
        return self


class Multiple:
    """A symbol times the identity."""

    def __init__(self, program: BlockProgram, value: Value) -> None:
        self._program = program
        self.value = value

    @property
    def mT(self) -> Multiple:
        """The same."""
        return self


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
    def apply(self) -> str:
        """The function that multiplies rows by it."""
        return f"apply<{self.shape}>"

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
        found = self._entries(f"{self.name}[i][j] * {self._program.text(value)}")
        return Square(self._program, found.name, self.shape)

    def squares(self) -> Symbol:
        """Squared Frobenius norm."""
        return self._program.line(f"sum_of_squares({self.name})")

    def __matmul__(self, other: Square) -> Square:
        return self._program.square(f"multiply({self.name}, {other.name}, {{out}});")

    symmetric_matmul = __matmul__

    def symmetric_part(self) -> Square:
        """Half the sum with the transposed."""
        return self._entries(f"({self.name}[i][j] + {self.name}[j][i]) * real(0.5)")

    def strictly_upper(self) -> Square:
        """What is above the diagonal."""
        return Square(self._program, self._entries(f"j > i ? {self.name}[i][j] : real(0)").name, "upper")

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


def block_loop(programs: Sequence[tuple[int, BlockProgram]], radius: bool, *, buffer: bool) -> str:
    """The C++ function ``kernel`` that runs, for every block of a weight, the program of its manifold; and ``room_for``:
    how many numbers a thread keeps meanwhile.

    Args:
        programs: each with the number of its manifold. It reads the rows ``w`` (weight), ``g`` (gradient), ``b`` (momentum),
            U and its inverse where they are stored, the numbers ``r`` (R), ``f`` (1/𝔤) and ``s0``, ...; and writes
            ``out[k]`` (squared norm), or ``w_new`` and ``b_new``, which are the block's if its condition holds.
        radius: whether there is an R.
        buffer: whether there is a momentum.
    """
    pieces = []
    for number, program in programs:
        lines = program.allocated("w_ahead", "g_ahead", "b_ahead")
        lines.insert(0, f"const int64_t pitch = {'pitch_of(n)' if program.manifold == 'stiefel' else 'n'};")
        if program.within is not None:
            stores = "of_w.write(n, k, w_new);" + (" of_b.write(n, k, b_new);" if buffer else "")
            lines.append(f"moved[k] = {program.within.name}; if (moved[k]) {{ {stores} }}")
        pieces.append(f"if (M[k] == {number}) {{\n      " + "\n      ".join(lines) + "\n    }")
    _, program = programs[0]
    rooms = max(program.rooms for _, program in programs)
    used = set().union(*(program.numbers for _, program in programs))
    return (
        f"typedef {program.real} real;\nconstexpr int P = {program.p};\n"
        + VECTORS
        + BLOCKS
        + f"""
extern "C" int64_t room_for(const int64_t* layout) {{
  const int64_t n = layout[1];
  const bool spread = layout[5] != 1 || layout[9] != 1 || layout[13] != 1;
  return {rooms} * P * pitch_of(n) + (spread ? 3 * P * n : 0);
}}
{each_weight("int32_t", "real")} {{
  const int64_t count = layout[0], n = layout[1], second = layout[2], each = room_for(layout);
  const components of_w = {{W, second, layout + 3}}, of_g = {{G, second, layout + 7}}, of_b = {{B, second, layout + 11}};
  real* const out = room + threads * each;
  {" ".join(f"const real s{i} = s[{i}];" for i in sorted(used))}
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < count; ++k) {{
    real *const rooms = room + omp_get_thread_num() * each, *const last = rooms + each;
    const matrix w = of_w.rows(n, k, last - P * n), g = of_g.rows(n, k, last - 2 * P * n);
    const matrix b = of_b.rows(n, k, last - 3 * P * n);
    const int64_t next = k + 1 < count ? k + 1 : k;
    const matrix w_ahead = of_w.ahead(next), g_ahead = of_g.ahead(next), b_ahead = of_b.ahead(next);
    const real f = F ? F[S[k]] : real(1); {"const real r = R[k];" if radius else ""}
    {" else ".join(pieces)}
  }}
  if (sums) for (int64_t k = 0; k < count; ++k) sums[S[k]] += out[k];
}}
"""
    )

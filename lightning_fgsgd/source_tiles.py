"""The step of blocks and large kernels in Triton's language: symbols for rows of numbers, worked out tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_fgsgd.matrices import Value, times
from lightning_fgsgd.source import Symbol
from lightning_fgsgd.source_gpu import COUNTED, Pools, TritonProgram, wrapped

__all__ = ["BlockTiles", "Matrix", "Tiles", "block_kernel"]

_LEAST = 16  # rows that a product of tiles takes at least


def _padded(p: int) -> int:
    """Rows of the tiles for blocks of p rows: a power of two, and enough for a product."""
    return max(_LEAST, 1 << (p - 1).bit_length())


class BlockTiles(TritonProgram):
    """Code for one block of p rows. Rows are worked out a tile at a time, wherever they are asked for: a block is read from
    memory once, and after that from a cache, and nothing of its size is kept in between.

    Args:
        p: number of rows.
        dense: whether the numbers of a row lie side by side in memory.
    """

    def __init__(self, p: int, dense: bool) -> None:
        super().__init__()
        self.p = p
        self.dense = dense
        self.padded = _padded(p)
        self.within: Symbol | None = None

    def matrix(self, form: str, *operands: Any) -> Matrix:
        """The p x p numbers that an expression of others gives."""
        return Matrix(self, self.line(form, *operands).name)

    def settled(self, condition: Symbol) -> bool:
        """The condition decides at the end whether the block is written; until then all is as if it held."""
        self.within = condition
        return True

    def at(self, name: str) -> str:
        """Where a tile lies in memory."""
        return f"{name.upper()} + row * {name}_p + column{'' if self.dense else f' * {name}_n'}"

    def over_tiles(self, before: str, inside: Callable[[dict[str, str], list[str]], None]) -> None:
        """A loop over the tiles of a block; ``inside`` adds its lines, and finds tiles that are computed already."""
        known: dict[str, str] = {}
        lines: list[str] = ["column = j + tl.arange(0, TILE)[None, :]", "there = (row < P) & (column < n)"]
        inside(known, lines)
        self.lines.append(before + "\n" if before else "")
        self.lines[-1] += "for j in range(0, n, TILE):\n    " + "\n    ".join(lines)


class Tiles:
    """An n x p matrix of symbols: how to compute a tile of its rows, times a number that is kept apart.

    Args:
        program: the code.
        form: an expression of the tiles of other rows, or "" for rows that are read.
        name: of those in memory.
        parts: the other rows.
        operands: symbols and matrices in the expression, after the rows.
        factor: the number.
    """

    rows: Any = ()

    def __init__(
        self,
        program: BlockTiles,
        form: str = "",
        name: str = "",
        parts: Sequence[Tiles] = (),
        operands: Sequence[str] = (),
        factor: Value = 1.0,
    ) -> None:
        self._program = program
        self._told = form, name, tuple(parts), tuple(operands)
        self.factor = factor

    def _from(self, form: str, parts: Sequence[Tiles], *operands: Any) -> Tiles:
        return Tiles(self._program, form, "", parts, [self._program.text(x) for x in operands])

    def tile(self, known: dict[str, str], lines: list[str]) -> str:
        """The name of the tile that is worked on, without the factor; its lines are added where they are missing."""
        form, name, parts, operands = self._told
        if not form:
            code = f"tl.load({self._program.at(name)}, mask=there, other=0.0)"
        else:
            code = form.format(*(part.tile(known, lines) for part in parts), *operands)
        if code not in known:
            known[code] = f"t{len(self._program.lines)}_{len(known)}"
            lines.append(f"{known[code]} = {code}")
        return known[code]

    @property
    def mT(self) -> _Transposed:
        """For inner products."""
        return _Transposed(self)

    def __matmul__(self, square: Matrix) -> Tiles:
        out = self._from("tl.dot({1}, {0}, input_precision=PRECISION)", [self], square.mT)
        return out * self.factor

    def subtract_product(self, a: Tiles, square: Matrix) -> Tiles:
        """This less a · square."""
        return self - a @ square

    def combine(self, x: Value, other: Tiles, y: Value) -> Tiles:
        """x times this, and y times the other."""
        x, y = times(self.factor, x), times(other.factor, y)
        return self._from("{0} * {2} + {1} * {3}", [self, other], x, y)

    def __add__(self, other: Tiles) -> Tiles:
        return self.combine(1.0, other, 1.0)

    def __sub__(self, other: Tiles) -> Tiles:
        return self.combine(1.0, other, -1.0)

    def __mul__(self, value: Value) -> Tiles:
        form, name, parts, operands = self._told
        return Tiles(self._program, form, name, parts, operands, times(self.factor, value))

    def squares(self) -> Value:
        """Squared Frobenius norm."""
        name = f"q{len(self._program.lines)}"

        def inside(known: dict[str, str], lines: list[str]) -> None:
            tile = self.tile(known, lines)
            lines.append(f"{name} += tl.sum({tile} * {tile}, 1)")

        self._program.over_tiles(f"{name} = tl.zeros(({self._program.padded},), tl.float32)", inside)
        return times(self._program.line("tl.sum({})", self._program.symbol(name)), times(self.factor, self.factor))

    def where(self, mask: Symbol, other: Tiles) -> Tiles:
        """This where ``mask`` holds, the other elsewhere."""
        choice = "tl.where({2}, {0} * {3}, {1} * {4})"
        return self._from(choice, [self, other], mask, self.factor, other.factor)


class _Transposed:
    def __init__(self, rows: Tiles) -> None:
        self._rows = rows

    def __matmul__(self, other: Tiles) -> Matrix:
        mine = self._rows
        program = mine._program
        name = f"z{len(program.lines)}"

        def inside(known: dict[str, str], lines: list[str]) -> None:
            a, b = mine.tile(known, lines), other.tile(known, lines)
            lines.append(f"{name} += tl.dot({a}, tl.trans({b}), input_precision=PRECISION)")

        size = program.padded
        program.over_tiles(f"{name} = tl.zeros(({size}, {size}), tl.float32)", inside)
        found, factor = Matrix(program, name), times(mine.factor, other.factor)
        return found if isinstance(factor, float) and factor == 1.0 else found * factor

    symmetric_matmul = __matmul__


class Matrix(Symbol):
    """A p x p matrix of symbols, one tensor to Triton."""

    def __init__(self, program: BlockTiles, name: str) -> None:
        super().__init__(program, name)
        self._block = program
        self.rows = range(program.padded)

    is_double = False

    @property
    def mT(self) -> Matrix:
        """The transposed matrix."""
        return self._block.matrix("tl.trans({})", self)

    def __add__(self, other: Any) -> Matrix:
        return self._block.matrix("{} + {}", self, other)

    def combine(self, x: Value, other: Matrix, y: Value) -> Matrix:
        """x times this, and y times the other."""
        return self._block.matrix("{} * {} + {} * {}", self, x, other, y)

    def __mul__(self, value: Any) -> Matrix:
        return self._block.matrix("{} * {}", self, value)

    def __matmul__(self, other: Matrix) -> Matrix:
        return self._block.matrix("tl.dot({}, {}, input_precision=PRECISION)", self, other)

    symmetric_matmul = __matmul__

    def symmetric_part(self) -> Matrix:
        """Half the sum with the transposed."""
        return self._block.matrix("({} + {}) * 0.5", self, self.mT)

    def squares(self) -> Symbol:
        """Squared Frobenius norm."""
        return self._block.line("tl.sum(tl.sum({} * {}, 1))", self, self)

    def strictly_upper(self) -> Matrix:
        """What is above the diagonal."""
        return self._block.matrix("tl.where(row < other_row, {}, 0.0)", self)

    def trace(self) -> Symbol:
        """Sum of the diagonal."""
        return self._block.line("tl.sum(tl.sum(tl.where(eye, {}, 0.0), 1))", self)

    def diagonal(self, f: Callable[[Value], Value]) -> Matrix:
        """The diagonal matrix of ``f`` of the diagonal."""
        entries = self._block.line("tl.sum(tl.where(eye, {}, 0.0), 1)[:, None]", self)
        return self._block.matrix("tl.where(eye, {}, 0.0)", f(entries))

    def multiple(self, value: Value) -> Matrix:
        """``value`` times the identity."""
        return self.diagonal(lambda _: value)

    def add_identity(self, value: float, factor: float) -> Matrix:
        """factor times this, and value times the identity."""
        return self._block.matrix("{} * {} + tl.where(eye, {}, 0.0)", self, factor, value)

    def where(self, mask: Symbol, other: Any) -> Matrix:
        """This where ``mask`` holds, the other elsewhere."""
        return self._block.matrix("tl.where({}, {}, {})", mask, self, other)


def block_kernel(
    program: BlockTiles,
    entries: int,
    radius: bool,
    *,
    weights: Tiles | None,
    momentum: Tiles | None,
    square: Value,
    pool: Pools,
    reads_by: str,
) -> str:
    """The Triton function ``kernel`` that runs ``program`` for every block of some weights, one to a program.

    Args:
        program: reads the rows ``w`` (weight), ``g`` (gradient), ``b`` (momentum), the matrices ``u`` (U) and ``inverse``,
            the numbers ``r`` (R), ``m`` (number of the manifold), ``f`` (1/𝔤) and ``s`` (numbers of the step).
        entries: number of entries of U that are stored, 0 if there is none.
        radius: whether there is an R.
        weights, momentum: what the block's rows become, if the program's condition holds.
        square: the squared norm that is asked for instead.
        pool, reads_by: as of :func:`lane_kernel`.
    """
    p, size = program.p, program.padded
    lines = [
        f"P: tl.constexpr = {p}",
        "k = (tl.program_id(0) - first_program).to(tl.int32)",
        *COUNTED,
        f"row = tl.arange(0, {size})[:, None]",
        f"other_row = tl.arange(0, {size})[None, :]",
        "eye = row == other_row",
        "m = tl.load(M + k).to(tl.int32)",
        "slot = tl.load(S + k).to(tl.int32)",
        f"pool = {pool.counted}",
    ]
    lines += [
        f"{x.upper()} += x.to(tl.int64) * {x}_first + z.to(tl.int64) * {x}_second"
        for x in ("w", "g", *(["b"] if momentum is not None else []))
    ]
    for name, at in (("u", "U + k"), ("inverse", "V + k")):
        if entries == 1:
            code = f"tl.where(eye & (row < P), tl.load({at}), 0.0)"
        elif entries == p:
            code = f"tl.where(eye, tl.load({at} * P + row, mask=row < P, other=0.0), 0.0)"
        else:
            code = f"tl.load({at} * (P * P) + row * P + other_row, mask=(row < P) & (other_row < P), other=0.0)"
        if entries:
            lines.append(f"{name} = {code}")
    if radius:
        lines.append(f"r = tl.load(R + {reads_by})")
    if weights is None:
        lines += program.lines
        of_groups = [
            "sums = OUT + first_out + k * slots",
            "for i in range(0, slots):",
            f"    tl.store(sums + i, tl.where(slot == i, {program.text(square)}, 0.0))",
        ]
        lines += of_groups if pool.summed else [f"tl.store(OUT + first_out + k, {program.text(square)})"]
        return wrapped(program, lines, "TILE: tl.constexpr, PRECISION: tl.constexpr", pool.slot)
    lines.append("f = tl.load(F + first_share + pool * slots + slot)")

    assert program.within is not None
    condition = program.within.name

    def inside_of_all(known: dict[str, str], body: list[str]) -> None:
        tiles = [(to, rows.tile(known, body), rows.factor) for to, rows in (("w", weights), ("b", momentum)) if rows]
        for to, tile, factor in tiles:
            body.append(f"tl.store({program.at(to)}, {tile} * {program.text(factor)}, mask=there & (column < end))")

    program.over_tiles(f"end = tl.where({condition}, n, 0)", inside_of_all)
    lines += [*program.lines, f"tl.store(OUT + first_out + k, ({condition}).to(tl.uint8))"]
    return wrapped(program, lines, "TILE: tl.constexpr, PRECISION: tl.constexpr", pool.slot)

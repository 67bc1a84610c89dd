"""Symbols that write down what is done to them, and the C++ loop around what they wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lightning_fgsgd.cpp import PACKING, VECTORS, each_weight

__all__ = ["Program", "Symbol", "loop"]

_MOST_SLOTS = 16  # groups in a pool up to which a component's group is found by comparing
_TILE = 64  # components that are worked on together: a few of the widest vectors; their entries fit the first cache


class Symbol:
    """A number in generated code: an operation on it adds a line to its program, and gives the result's symbol."""

    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self.name = name

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for."""
        return self._program.dtype

    def __add__(self, other: Any) -> Symbol:
        return self._program.line("{} + {}", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return self._program.line("{} + {}", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return self._program.line("{} - {}", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self._program.line("{} - {}", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return self._program.line("{} * {}", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return self._program.line("{} * {}", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return self._program.line(self._program.over, self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self._program.line(self._program.over, other, self)

    def __neg__(self) -> Symbol:
        return self._program.line("-{}", self)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self._program.line("{} == {}", self, other)

    def __le__(self, other: Any) -> Symbol:
        return self._program.line("{} <= {}", self, other)

    __hash__ = object.__hash__

    def rsqrt(self) -> Symbol:
        """1 / √x."""
        return self._program.line(self._program.one_over_root, self)

    def settled(self) -> Any:
        """This condition, or ``True`` where the program sees to it by itself."""
        return self._program.settled(self)

    def where(self, a: Any, b: Any) -> Symbol:
        """``a`` where this condition holds, else ``b``."""
        return self._program.line(self._program.choice, self, a, b)


class Program:
    """Straight-line code on numbers of one type. An operation that was done before is not done again.

    Attributes:
        over, one_over_root, choice, definition: how the language writes a quotient, 1 / √x, a choice by a condition, and a
            name for a result; the rest is the same in C++ and Python.
    """

    over = "{} / {}"
    one_over_root = "1 / root({})"
    choice = "{} ? {} : {}"
    definition = "const auto {} = {};"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lines: list[str] = []
        self.numbers: set[int] = set()
        self._known: dict[str, Symbol] = {}

    @property
    def real(self) -> str:
        """The type in C++."""
        return "double" if self.dtype == torch.float64 else "float"

    def symbol(self, name: str) -> Symbol:
        """The symbol of something that the code is given."""
        return Symbol(self, name)

    def number(self, i: int) -> Symbol:
        """The symbol of one of the numbers of the step."""
        self.numbers.add(i)
        return Symbol(self, f"s{i}")

    def line(self, form: str, *operands: Any) -> Symbol:
        """The symbol of the result of an operation."""
        code = form.format(*map(self.text, operands))
        if code not in self._known:
            name = f"v{len(self._known)}"
            self._known[code] = Symbol(self, name)
            self.lines.append(self.definition.format(name, code))
        return self._known[code]

    def settled(self, condition: Symbol) -> Any:
        """What a condition is to the code after it."""
        return condition

    def text(self, x: Any) -> str:
        """A symbol or a number, as the language writes it."""
        return x.name if isinstance(x, Symbol) else f"real({x!r})" if isinstance(x, float) else str(x)

    def store(self, place: str, value: Symbol) -> None:
        """Write a value to where the code's result is expected."""
        self.lines.append(f"{place} = {value.name};")


def loop(
    program: Program,
    entries: Sequence[int],
    factors: int,
    radius: bool,
    *,
    reads: Iterable[str],
    writes: Iterable[str],
    sums: bool,
) -> str:
    """The C++ function ``kernel`` that runs ``program`` for every component of a weight.

    The entries of a tile of components lie in planes: in place where neighbours in memory are neighbours in the loop (as in
    channels_last), else gathered into the first cache.

    Args:
        program: reads and writes ``w0[t]``, ``w1[t]``, ... (weight), ``g`` (gradient), ``b`` (momentum); reads ``u`` (U),
            ``r[t]`` (R), ``m[t]`` (number of the manifold), ``f[t]`` (1/𝔤), ``s`` (numbers of the step); writes ``q[t]``
            (squared norm) or ``o[t]`` (whether the component was moved).
        entries: numbers of the entries of a component.
        factors: number of entries of U.
        radius: whether there is an R.
        reads: tensors to read.
        writes: tensors to write.
        sums: whether squared norms are summed up over groups, or 1/𝔤 looked up for them.
    """
    size, order = len(entries), {"w": 0, "g": 1, "b": 2}

    def operand(name: str) -> str:
        row, at = order[name], order[name] * size
        return f"""
      alignas(64) real {name}_tile[{size}][T];
      real {", ".join(f"*{name}{e} = {name}_tile[{e}]" for e in entries)};
      real* const {name}_here = {name.upper()} + {_position(row)};
      const int64_t {name}_step = strides[{4 * row + 3}];
      const bool {name}_direct = {name}_step == 1 && l == T;
      const bool {name}_packed = {name}_dense && {name}_step == {size} && l == T;
      if ({name}_direct) {{ {" ".join(f"{name}{e} = {name}_here + offsets[{at + e}];" for e in entries)} }}
      else if ({name}_packed) unpack({name}_here, {name}_tile);
      else {{ {" ".join(f"gather({name}{e}, {name}_here + offsets[{at + e}], {name}_step, l);" for e in entries)} }}
      if ({name}_direct) for (int e = 0; e < {size}; ++e) for (int t = 0; t < T; t += 64 / sizeof(real))
        __builtin_prefetch({name.upper()} + {_position(row, "_next")} + offsets[{at} + e] + t, 0, 2);
      if ({name}_packed) for (int t = 0; t < {size} * T; t += 64 / sizeof(real))
        __builtin_prefetch({name.upper()} + {_position(row, "_next")} + t, 0, 2);"""

    def result(name: str) -> str:
        at = order[name] * size
        stores = " ".join(f"scatter({name}{e}, {name}_here + offsets[{at + e}], {name}_step, l);" for e in entries)
        return f"""
      if ({name}_packed) pack({name}_here, {name}_tile);
      else if (!{name}_direct) {{ {stores} }}"""

    slots = """
      int32_t slot[T];
      if (wide) gather(slot, (const int32_t*)S + k, k_step, l); else gather(slot, S + k, k_step, l);
      for (int t = l; t < T; ++t) slot[t] = -1;"""
    lookup = (
        slots
        + """
      real f[T];
      for (int t = 0; t < T; ++t) f[t] = 1;
      if (few) for (int i = 0; i < slots; ++i) {
        const real x = F[pool * slots + i];
        for (int t = 0; t < T; ++t) f[t] = slot[t] == i ? x : f[t];
      }
      else for (int t = 0; t < l; ++t) f[t] = F[(pool + t * pool_step) * slots + slot[t]];"""
    )
    adding = (
        slots
        + """
      if (few) for (int i = 0; i < slots; ++i) {
        real x = 0;
        _Pragma("omp simd reduction(+:x)")
        for (int t = 0; t < T; ++t) x += slot[t] == i ? q[t] : real(0);
        mine[pool * slots + i] += x;
      }
      else for (int t = 0; t < l; ++t) mine[(pool + t * pool_step) * slots + slot[t]] += q[t];"""
    )
    upper = "".join(
        f"\n      real u{i}_tile[T]; const real* const u{i} = in_place(u{i}_tile, U + {i} * count + k, k_step, l);"
        for i in range(factors)
    ) + (f"\n      real r[T]; gather(r, R + {_position(5)}, strides[23], l);" if radius else "")
    dense = " ".join(
        f"const bool {x} = dense<{size}>(offsets + {order[x[0]] * size});" for x in (f"{n}_dense" for n in reads)
    )
    body = "\n        ".join(program.lines)
    # Read here, for a number that is read in a branch keeps the loop from being vectorised.
    numbers = " ".join(f"const real s{i} = s[{i}];" for i in sorted(program.numbers))
    return f"""
typedef {program.real} real;
constexpr int T = {_TILE};
{VECTORS}{PACKING}

template <typename To, typename From>
static inline void gather(To* to, const From* from, int64_t step, int l) {{
  if (step == 1 && l == T) for (int t = 0; t < T; ++t) to[t] = from[t];
  else {{ for (int t = 0; t < l; ++t) to[t] = from[t * step]; for (int t = l; t < T; ++t) to[t] = from[0]; }}
}}

static inline const real* in_place(real* to, const real* from, int64_t step, int l) {{
  if (step == 1 && l == T) return from;
  gather(to, from, step, l);
  return to;
}}

static inline void scatter(const real* from, real* to, int64_t step, int l) {{
  for (int t = 0; t < l; ++t) to[t * step] = from[t];
}}

{each_weight("uint8_t", "double")} {{
  const int64_t count = layout[0], slots = layout[1], wide = layout[2], groups = layout[3];
  const int64_t *sizes = layout + 4, *strides = layout + 8, *offsets = layout + 32;
  const int64_t tiles = (sizes[3] + T - 1) / T, all = sizes[0] * sizes[1] * sizes[2] * tiles;
  const int64_t k_step = strides[15], pool_step = strides[19];
  const bool few = pool_step == 0 && slots <= {_MOST_SLOTS};
  {numbers}
  {dense}
  {"memset(room, 0, threads * groups * sizeof(double));" if sums else ""}
  #pragma omp parallel num_threads(threads)
  {{
    {"double* const mine = room + omp_get_thread_num() * groups;" if sums else ""}
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < all; ++i) {{
      {_place("i", "")}
      {_place("(i + 1 < all ? i + 1 : i)", "_next")}
      const int l = sizes[3] - c < T ? sizes[3] - c : T;
      const int64_t k = {_position(3)}, pool = {_position(4)};
      int32_t m[T];
      gather(m, M + k, k_step, l);{"".join(map(operand, reads))}{upper}
      {"real q[T];" if sums else "int32_t o[T];" + lookup}
      #pragma omp simd
      for (int t = 0; t < T; ++t) {{
        {body}
      }}{
        adding
        if sums
        else "".join(map(result, writes))
        + '''
      for (int t = 0; t < l; ++t) moved[k + t * k_step] = o[t] != 0;'''
    }
    }}
  }}
  {
        "for (int64_t g = 0; g < groups; ++g) for (int i = 0; i < threads; ++i) sums[g] += room[i * groups + g];"
        if sums
        else ""
    }
}}
"""


def _place(i: str, suffix: str) -> str:
    """The four numbers of a tile."""
    return (
        f"const int64_t c{suffix} = {i} % tiles * T, z{suffix} = {i} / tiles % sizes[2];"
        f" const int64_t y{suffix} = {i} / tiles / sizes[2] % sizes[1], x{suffix} = {i} / tiles / sizes[2] / sizes[1];"
    )


def _position(operand: int, suffix: str = "") -> str:
    """Where the tile begins in a tensor."""
    return " + ".join(f"{axis}{suffix} * strides[{4 * operand + i}]" for i, axis in enumerate("xyzc"))

"""Batches of small matrices in two forms, for mathematics that is written once.

A batch of n x p matrices is a tensor (..., n, p), or :class:`Planes`: its n · p entries, each a value of its own for the
whole batch. Tensors are multiplied by ``torch.matmul``, which suits blocks of output neurons. A 3x3 kernel is too small for
that; entry by entry, a step on a million of them is a few hundred multiplications of vectors, and a compiler makes one pass
over memory of it. The functions here take either form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Planes"]

Value = Any  # one number for each matrix: a tensor, a symbol, or a float that holds for all; 0.0 is known to be zero


class Planes:
    """A batch of n x p matrices, entry by entry.

    Args:
        rows: n rows of p values.
    """

    def __init__(self, rows: Iterable[Iterable[Value]]) -> None:
        self.rows = tuple(tuple(row) for row in rows)

    @property
    def mT(self) -> Planes:
        """The transposed matrices."""
        return Planes(zip(*self.rows, strict=True))

    @property
    def entries(self) -> list[Value]:
        """All entries, row by row."""
        return [x for row in self.rows for x in row]

    @property
    def is_double(self) -> bool:
        """Whether the numbers are in double precision."""
        return next(x for x in self.entries if not isinstance(x, float)).dtype == torch.float64

    def map(self, f: Callable[..., Value], *others: Planes) -> Planes:
        """``f`` of every entry, and of those of ``others`` in the same place."""
        lines = zip(self.rows, *(m.rows for m in others), strict=True)
        return Planes([[f(*entries) for entries in zip(*line, strict=True)] for line in lines])

    def __add__(self, other: Planes) -> Planes:
        return self.map(_add, other)

    def __sub__(self, other: Planes) -> Planes:
        return self.map(subtract, other)

    def __mul__(self, value: Value) -> Planes:
        return self.map(lambda x: times(x, value))

    def __matmul__(self, other: Planes) -> Planes:
        columns = other.mT.rows
        return Planes([[dot(row, column) for column in columns] for row in self.rows])

    def symmetric_matmul(self, other: Planes) -> Planes:
        """The product, which is known to be symmetric: half of it is computed."""
        columns, p = other.mT.rows, range(len(self.rows))
        upper = {(i, j): dot(self.rows[i], columns[j]) for i in p for j in p if i <= j}
        return Planes([[upper[min(i, j), max(i, j)] for j in p] for i in p])

    def subtract_product(self, a: Planes, b: Planes) -> Planes:
        """This less a · b."""
        return self - a @ b

    def combine(self, x: Value, other: Planes, y: Value) -> Planes:
        """x times this, and y times the other."""
        return self * x + other * y

    def trace(self) -> Value:
        """Sum of the diagonal."""
        return total(row[i] for i, row in enumerate(self.rows))

    def squares(self) -> Value:
        """Squared Frobenius norm."""
        return total(x * x for x in self.entries)

    def symmetric_part(self) -> Planes:
        """Half the sum with the transposed."""
        p = range(len(self.rows))
        return Planes(
            [[self.rows[i][i] if i == j else (self.rows[i][j] + self.rows[j][i]) * 0.5 for j in p] for i in p]
        )

    def diagonal(self, f: Callable[[Value], Value]) -> Planes:
        """The diagonal matrix of ``f`` of the diagonal."""
        return Planes([[f(x) if i == j else 0.0 for j, x in enumerate(row)] for i, row in enumerate(self.rows)])

    def multiple(self, value: Value) -> Planes:
        """``value`` times the identity, of this size."""
        return self.diagonal(lambda _: value)

    def add_identity(self, value: float, factor: float) -> Planes:
        """factor times this, and value times the identity."""
        return self * factor + self.multiple(value)

    def where(self, mask: Value, other: Planes) -> Planes:
        """This where ``mask`` holds, the other elsewhere."""
        return self.map(lambda x, y: where(mask, x, y), other)


def matmul(a: Any, b: Any) -> Any:
    """The products a · b. A tensor b may be compact: (..., 1, 1) is a multiple of the identity, (..., 1, p) a diagonal."""
    if not isinstance(a, Tensor):
        return a @ b
    if b.shape[-2] < a.shape[-1]:
        return a * b
    # Rows of a block lie in memory one after the other: a result that does so too is added to it as a vector is to a vector.
    return (b.mT @ a.mT).mT if a.stride(-2) < a.stride(-1) else a @ b


def subtract_product(c: Any, a: Any, b: Any) -> Any:
    """c − a · b, with b as in :func:`matmul`."""
    if not isinstance(a, Tensor):
        return c.subtract_product(a, b)
    if a.ndim != 3 or b.shape[-2] < a.shape[-1]:
        return c - matmul(a, b)
    if a.stride(-2) < a.stride(-1):
        return torch.baddbmm(c.mT, b.mT, a.mT, alpha=-1).mT
    return torch.baddbmm(c, a, b, alpha=-1)


def combine(a: Any, x: Value, b: Any, y: Value) -> Any:
    """x · a + y · b."""
    if not isinstance(a, Tensor):
        return a.combine(x, b, y)
    if isinstance(x, float):
        a = scaled(a, x)
        return a.add(b, alpha=y) if isinstance(y, float) else torch.addcmul(a, b, y)
    return a * x + b * y


def scaled(m: Any, value: Value) -> Any:
    """m · value; nothing is computed for 1."""
    return m if _is(value, 1.0) else m * value


def gram(a: Any, b: Any) -> Any:
    """aᵀb, (..., p, p)."""
    return a.mT @ b


def symmetric_matmul(a: Any, b: Any) -> Any:
    """a · b where that is known to be symmetric: half of it is computed where that saves something."""
    return a @ b if isinstance(a, Tensor) else a.symmetric_matmul(b)


def settled(mask: Any) -> Any:
    """``True`` in place of a mask that holds everywhere, where the answer costs no wait for a device."""
    if not isinstance(mask, Tensor):
        return mask.settled()
    return True if mask.device.type == "cpu" and bool(mask.all()) else mask


def trace(m: Any) -> Value:
    """Sum of the diagonal, one value for each matrix: (..., 1, 1) of a tensor."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] if isinstance(m, Tensor) else m.trace()


def squares(m: Any) -> Value:
    """Squared Frobenius norm, one value for each matrix: (..., 1, 1) of a tensor."""
    return m.square().sum((-2, -1), keepdim=True) if isinstance(m, Tensor) else m.squares()


def symmetric_part(m: Any) -> Any:
    """(m + mᵀ) / 2."""
    return (m + m.mT) / 2 if isinstance(m, Tensor) else m.symmetric_part()


def diagonal(m: Any, f: Callable[[Value], Value] = lambda x: x) -> Any:
    """The diagonal matrix of ``f`` of the diagonal of ``m``; compact, (..., 1, p), for a tensor."""
    return f(m.diagonal(dim1=-2, dim2=-1))[..., None, :] if isinstance(m, Tensor) else m.diagonal(f)


def multiple(value: Value, like: Any) -> Any:
    """``value`` times the identity; compact, (..., 1, 1), for a tensor."""
    return value if isinstance(like, Tensor) else like.multiple(value)


def add_identity(m: Any, value: float, factor: float = 1.0) -> Any:
    """factor · m + value · I; of a compact tensor a compact one."""
    if not isinstance(m, Tensor):
        return m.add_identity(value, factor)
    if m.shape[-2] == 1:
        return m * factor + value
    m = m * factor
    m.diagonal(dim1=-2, dim2=-1).add_(value)
    return m


def strictly_upper(m: Any) -> Any:
    """What is above the diagonal of ``m``; zero elsewhere."""
    return m.triu(1) if isinstance(m, Tensor) else m.strictly_upper()


def diagonal_where_zero(m: Any) -> Any:
    """The diagonal matrix with a 1 where the diagonal of ``m`` is zero."""
    if isinstance(m, Tensor):
        return torch.diag_embed((m.diagonal(dim1=-2, dim2=-1) == 0).to(m.dtype))
    return m.diagonal(lambda x: where(x == 0, 1.0, 0.0))


def size(m: Any) -> int:
    """p of p x p matrices."""
    return m.shape[-1] if isinstance(m, Tensor) else len(m.rows)


def is_double(m: Any) -> bool:
    """Whether the numbers are in double precision."""
    return m.dtype == torch.float64 if isinstance(m, Tensor) else m.is_double


def expand(m: Tensor, p: int) -> Tensor:
    """The full matrix (..., p, p) of a compact one."""
    return m if m.shape[-2] == p else m * torch.eye(p, dtype=m.dtype, device=m.device)


def where(mask: Any, a: Any, b: Any) -> Any:
    """``a`` where ``mask`` holds and ``b`` elsewhere, for values or matrices."""
    if isinstance(mask, bool):
        return a if mask else b
    if a is b or (isinstance(a, float) and isinstance(b, float) and a == b):
        return a
    if isinstance(mask, Tensor):
        return a.where(mask, b) if isinstance(a, Planes) else torch.where(mask, a, b)
    return a.where(mask, b) if hasattr(a, "rows") else mask.where(a, b)


def total(values: Iterable[Value]) -> Value:
    """The sum of some values."""
    out: Value = 0.0
    for value in values:
        out = _add(out, value)
    return out


def _is(x: Value, number: float) -> bool:
    return isinstance(x, float) and x == number


def _add(a: Value, b: Value) -> Value:
    return b if _is(a, 0.0) else a if _is(b, 0.0) else a + b


def subtract(a: Value, b: Value) -> Value:
    return a if _is(b, 0.0) else -b if _is(a, 0.0) else a - b


def times(a: Value, b: Value) -> Value:
    """a · b, where nothing is computed for 0 and 1."""
    return 0.0 if _is(a, 0.0) or _is(b, 0.0) else b if _is(a, 1.0) else a if _is(b, 1.0) else a * b


def dot(a: Iterable[Value], b: Iterable[Value]) -> Value:
    return total(times(x, y) for x, y in zip(a, b, strict=True))

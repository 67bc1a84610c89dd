"""The factor U of the Gram information that a component keeps, ωᵀω = R² UᵀU: how it is found, inverted and stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting
from lightning_fgsgd.grouping import IndexSets
from lightning_fgsgd.manifolds import Manifold, wide
from lightning_fgsgd.matrices import expand

__all__ = [
    "factor",
    "factor_of",
    "inverse_factor",
    "pack_upper",
    "rounded_inverse",
    "unpack_upper",
    "upper_entries",
]


def factor_of(manifold: Manifold, omega: Tensor) -> Tensor:
    """The compact U of components that all live on one manifold, in double precision."""
    v = wide(omega)
    if manifold.name != "stiefel":
        return manifold.root(v)
    # A pivot of relative size t that counts as zero leaves entries of size √t out of P: these are to be rounding errors too.
    return factor(v.mT @ v, max(torch.finfo(omega.dtype).eps ** 1.5, 1e-14))


def factor(inner: Tensor, eps: float) -> Tensor:
    """Upper triangular U with UᵀU = P for Gram matrices P (k, p, p), singular ones too: Cholesky's algorithm.

    A pivot below ``eps`` of the largest diagonal entry counts as zero: P is singular in that precision. The row of U is zero
    then, as the rows of a positive semidefinite matrix are where its diagonal is zero.
    """
    rest, upper = inner.clone(), torch.zeros_like(inner)
    smallest = eps * inner.diagonal(dim1=-2, dim2=-1).amax(-1)
    for j in range(inner.shape[-1]):
        pivot = rest[:, j, j]
        root = torch.where(pivot > smallest, pivot, torch.zeros_like(pivot)).sqrt()
        row = torch.where(root[:, None] > 0, rest[:, j] / torch.where(root > 0, root, 1.0)[:, None], 0.0)
        upper[:, j, j:] = row[:, j:]
        rest = rest - row[:, :, None] * row[:, None, :]
    return upper


def inverse_factor(upper: Tensor) -> Tensor:
    """Inverse of a compact factor; columns whose diagonal entry is zero are zero."""
    if upper.shape[-2] == 1:
        return torch.where(upper == 0, 0.0, 1 / torch.where(upper == 0, 1.0, upper))
    dead = (upper.diagonal(dim1=-2, dim2=-1) == 0).to(upper.dtype)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper + torch.diag_embed(dead), identity, upper=True)
    return inverse * (1 - dead)[:, None, :]


def rounded_inverse(upper: Tensor) -> Tensor:
    """The inverse of U, found in double precision and rounded to U's; contiguous, as compiled code reads it."""
    return inverse_factor(wide(upper)).to(upper).contiguous()


def upper_entries(p: int) -> list[tuple[int, int]]:
    """Row and column of the entries of an upper triangular matrix, in the order in which they are packed."""
    return [(i, j) for i in range(p) for j in range(i, p)]


def pack_upper(factors: Mapping[int, Tensor], sets: IndexSets, cutting: Cutting, like: Tensor) -> Tensor:
    """U of all components in the least room that fits every manifold of the weight.

    Of blocks and large kernels (k, 1, 1), (k, 1, p) or (k, p, p). Of small kernels one row of numbers for each entry,
    (1, k), (p, k) or (p(p+1)/2, k): they are read entry by entry.
    """
    k, p = cutting.count, cutting.p
    rows, columns = max(f.shape[-2] for f in factors.values()), max(f.shape[-1] for f in factors.values())
    upper = like.new_ones(k, 1, 1).expand(k, rows, columns).clone()
    if rows > 1:
        upper = torch.eye(p, dtype=like.dtype, device=like.device).repeat(k, 1, 1)
    for i, f in factors.items():
        full = expand(f, p) if rows > 1 else f.expand(-1, 1, columns)
        upper[sets.manifold == i] = full.to(upper)
    if not cutting.small:
        return upper
    if rows == 1:
        return upper[:, 0].T.contiguous()
    return torch.stack([upper[:, i, j] for i, j in upper_entries(p)])


def unpack_upper(upper: Tensor, cutting: Cutting, batch: tuple[int, ...], part: slice | Tensor) -> Tensor:
    """U of some components as a compact tensor, (..., 1, 1), (..., 1, p) or (..., p, p).

    Args:
        upper: as :func:`pack_upper` gives it.
        cutting: the components.
        batch: shape in which they are counted.
        part: which of them, along the first axis.
    """
    if not cutting.small:
        return upper.view(*batch, *upper.shape[1:])[part]
    rows, p = [row.view(batch)[part] for row in upper], cutting.p
    if len(rows) in (1, p):
        return torch.stack(rows, -1)[..., None, :]
    full = rows[0].new_zeros(*rows[0].shape, p, p)
    for row, (i, j) in zip(rows, upper_entries(p), strict=True):
        full[..., i, j] = row
    return full

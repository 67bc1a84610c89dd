"""Spectral, Frobenius and ℓ2→1 norms of components ω_ι and of the groups ω_g that they form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fgsgd.manifolds.base import by_lapack, divide, wide
from lightning_fgsgd.precision import exact

__all__ = ["Norms", "component_norms", "geometric_means", "group_norms"]

# Up to this n, or up to this n or number of columns of every group, Gram matrices' eigenvalues are computed. The second is
# about where Lanczos' method begins to be faster.
_EXACT, _EXACT_SIDE_BY_SIDE = 64, 384
_LANCZOS_STEPS = 32


class Norms(NamedTuple):
    """Spectral norm, Frobenius norm and ℓ2→1 norm (the sum of the columns' norms), each of one shape.

    A column of a block holds what one output neuron reads, so on blocks this is the sum over the *rows* of the layer's
    weight as torch stores it, as in the paper and in Bartlett et al. (2017).
    """

    spectral: Tensor
    frobenius: Tensor
    l21: Tensor


@exact
def component_norms(components: Tensor) -> Norms:
    """Norms of every component, each (k,), of ``components`` (k, n, p)."""
    # The largest eigenvalue of the small Gram matrix instead of singular values of the tall component.
    gram = components.mT @ components
    spectral = _largest_root(gram)
    columns = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return Norms(spectral, columns.norm(dim=-1), columns.sum(-1))


@exact
def group_norms(components: Tensor, group: Tensor, norms: Norms | None = None) -> Norms:
    """Norms of every concatenated group ω_g = [ω_1, ω_2, ...], n x p|g|, each (G,).

    Exact; where both n and the columns of a group are many, above 384, the spectral norm is the value that 32 Lanczos steps
    give, which is not above the true one (but for rounding) and for weights found to be within 1 % of it. A group with a
    value that is not finite has NaN.

    Args:
        components: (k, n, p).
        group: the group of each component, (k,).
        norms: their norms, where they are at hand.
    """
    single, frobenius, l21 = component_norms(components) if norms is None else norms
    groups, (_, n, p) = int(group.max()) + 1, components.shape
    most = int(group.bincount().max())  # components of a group
    if n <= _EXACT:
        spectral = _gram_spectral(components, group, groups)
    elif min(n, most * p) <= _EXACT_SIDE_BY_SIDE and groups * most <= 2 * len(group):
        spectral = _side_by_side_spectral(components, group, groups, most)
    else:
        spectral = _lanczos_spectral(components, group, groups)
    # A group's is at least that of each of its components, also where it is found from below, or rounded.
    largest = single.new_zeros(groups).scatter_reduce_(0, group.long(), single, "amax")
    return Norms(
        torch.maximum(spectral, largest),
        _sums(frobenius.square(), group, groups).sqrt(),
        _sums(l21, group, groups),
    )


def geometric_means(norms: Norms, group: Tensor) -> Norms:
    """(Π_ι ‖ω_ι‖)^(1/|g|) of every group, each (G,): the paper's lower bounds of the norms of ω_g (Remark 1).

    A group with a component that is zero has 0.
    """
    sizes = group.bincount()
    return Norms(*(_sums(norm.log(), group, len(sizes)).div(sizes).exp() for norm in norms))


def _sums(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of ``x`` (k,) over the groups, in double precision: a group may have a hundred thousand components."""
    return wide(x).new_zeros(groups).index_add_(0, group, wide(x)).to(x)


def _gram_spectral(components: Tensor, group: Tensor, groups: int) -> Tensor:
    """Spectral norms of the groups from the eigenvalues of ω_g ω_gᵀ = Σ ω_ι ω_ιᵀ."""
    n = components.shape[-2]
    gram = components.new_zeros(groups, n, n).index_add_(0, group, components @ components.mT)
    return _largest_root(gram)


def _side_by_side_spectral(components: Tensor, group: Tensor, groups: int, most: int) -> Tensor:
    """The same from the smaller one of ω_g ω_gᵀ and ω_gᵀ ω_g, of groups that are filled up to the size of the largest."""
    _, n, p = components.shape
    order = group.argsort(stable=True)
    group, sizes = group[order], group.bincount()
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
    filled = components.new_zeros(groups, most, n, p)
    filled[group, place] = components[order]
    matrices = filled.transpose(1, 2).reshape(groups, n, most * p)
    return _largest_root(matrices @ matrices.mT if n <= most * p else matrices.mT @ matrices)


def _lanczos_spectral(components: Tensor, group: Tensor, groups: int) -> Tensor:
    """The same by Lanczos' method, all groups at once: each step costs one look at the weight."""
    n = components.shape[-2]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(groups, n, generator=generator, device="cpu", dtype=torch.float32).to(components)
    v = v / v.norm(dim=-1, keepdim=True)
    basis = v.new_zeros(groups, 0, n)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(_LANCZOS_STEPS, n)):
        basis = torch.cat([basis, v[:, None]], 1)
        image = (components @ (components.mT @ v[group][..., None]))[..., 0]
        w = torch.zeros_like(v).index_add_(0, group, image)
        diagonal.append((w * v).sum(-1))
        for _ in range(2):  # Gram-Schmidt, twice: rounding would bring back the directions that are found already
            w = w - (basis.mT @ (basis @ w[..., None]))[..., 0]
        length = w.norm(dim=-1)
        # What is left when the whole range has been seen is rounding.
        length = torch.where(length > 1e-5 * diagonal[0].abs(), length, torch.zeros_like(length))
        v = divide(w, length[..., None]) * (length > 0)[..., None]
        beside.append(length)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    if len(beside) > 1:
        off = torch.diag_embed(torch.stack(beside[:-1], -1), offset=1)
        tridiagonal = tridiagonal + off + off.mT
    return _largest_root(tridiagonal)


def _largest_root(gram: Tensor) -> Tensor:
    """Root of the largest eigenvalue; NaN for matrices that are not finite, on which LAPACK gives up."""
    good = torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all(-1)[..., None, None]  # the others are no larger
    gram = torch.where(good, gram, torch.zeros_like(gram))
    if gram.shape[-1] <= 3:  # millions of kernels, which LAPACK would take one by one
        largest = _largest_in_closed_form(wide(gram)).to(gram)
    else:
        (eigenvalues,) = by_lapack(torch.linalg.eigvalsh, gram)
        largest = eigenvalues[..., -1]
    return torch.where(good[..., 0, 0], largest.clamp_min(0).sqrt(), torch.nan)


def _largest_in_closed_form(gram: Tensor) -> Tensor:
    """The largest eigenvalue of symmetric matrices of at most 3 x 3, by the roots of their characteristic polynomial.

    q + 2s cos(φ/3), with q the mean of the diagonal, 6s² = ‖A − qI‖² and cos φ = det(A − qI) / 2s³. Where the two largest
    are the same, rounding of ε makes an error of √ε s there; hence double precision.
    """
    p = gram.shape[-1]
    if p == 1:
        return gram[..., 0, 0]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    a, b, c = (gram[..., i, i] - mean for i in (0, 1, p - 1))
    d = gram[..., 0, 1]
    if p == 2:
        return mean + (a.square() + d.square()).sqrt()
    e, f = gram[..., 0, 2], gram[..., 1, 2]
    s = ((a.square() + b.square() + c.square()) / 6 + (d.square() + e.square() + f.square()) / 3).sqrt()
    determinant = a * (b * c - f.square()) - d * (d * c - e * f) + e * (d * f - b * e)
    cosine = divide(determinant, 2 * s * s * s).clamp(-1, 1)  # one factor after the other: s³ is 0 before s is
    return mean + 2 * s * (cosine.acos() / 3).cos()

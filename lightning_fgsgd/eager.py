"""The step of one weight by torch's own operations: on any device, in any precision, for any cutting.

A weight is worked through a few components at a time, so that what is held in between is small, and stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_fgsgd import matrices
from lightning_fgsgd.manifolds import working
from lightning_fgsgd.pom import POM
from lightning_fgsgd.step import Options, move, riemannian_gradient

__all__ = ["advance", "advance_far", "squares"]


def squares(pom: POM, weight: Tensor, grad: Tensor, metric: str, options: Options, chunk: int) -> Tensor:
    """‖gradL(ω)‖² of every component, (k,): what Theorem 1 sums."""
    omega, grads = _components(pom, weight), _components(pom, _laid_out(grad, weight))
    found = []
    for part in _parts(omega, chunk):
        geometry = pom.geometry(metric, omega.shape[:-2], part)
        w, g = working(omega[part]), working(grads[part])
        gradient = riemannian_gradient(geometry, geometry.unit(w), w, g, options)
        found.append(matrices.squares(gradient).flatten())
    return torch.cat(found)


def advance(
    pom: POM,
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    share: Tensor,
    metric: str,
    options: Options,
    nesterov: bool,
    chunk: int,
) -> Tensor:
    """Move ``weight`` and its momentum ``buffer`` in place; see :func:`~lightning_fgsgd.step.move`.

    Args:
        share: 1/𝔤 of every group, (G,).
        chunk: numbers to work on at a time.

    Returns:
        Which components were moved, bool (k,); the others wait for :func:`advance_far`.
    """
    omega, grads = _components(pom, weight), _components(pom, _laid_out(grad, weight))
    own = None if buffer is None else _laid_out(buffer, weight)
    momenta = None if own is None else _components(pom, own)
    batch = omega.shape[:-2]
    group, moved = pom.sets.group.view(batch), []
    for part in _parts(omega, chunk):
        geometry = pom.geometry(metric, batch, part)
        w, g = working(omega[part]), working(grads[part])
        b = None if momenta is None else momenta[part]
        w_new, b_new, within = move(
            geometry, w, g, b, share[group[part].long()][..., None, None], options, nesterov=nesterov
        )
        omega[part] = w_new
        if momenta is not None:
            momenta[part] = b_new
        moved.append(
            omega.new_ones(omega[part].shape[:-2].numel(), dtype=torch.bool) if within is True else within.flatten()
        )
    _write(pom, weight, omega)
    if buffer is not None and own is not None and momenta is not None:
        _write(pom, own, momenta)
        if own is not buffer:
            buffer.copy_(own)
    return torch.cat(moved)


def advance_far(
    pom: POM,
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    share: Tensor,
    metric: str,
    options: Options,
    nesterov: bool,
    index: Tensor,
) -> None:
    """Move the components ``index`` (j,), whose steps are too long for :func:`advance`."""
    cut, join = pom.cutting.cut, pom.cutting.join
    geometry = pom.geometry(metric, (pom.cutting.count,), index)
    omega, momenta = cut(working(weight)).clone(), None if buffer is None else cut(buffer).clone()
    b = None if momenta is None else momenta[index]
    share = share[pom.sets.group[index].long()][:, None, None]
    w_new, b_new, _ = move(
        geometry, omega[index], working(cut(grad)[index]), b, share, options, nesterov=nesterov, far=True
    )
    omega[index] = w_new
    weight.copy_(join(omega))
    if buffer is not None and momenta is not None:
        momenta[index] = b_new
        buffer.copy_(join(momenta))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A gradient or a buffer in the layout of its weight, in which components have the same order: itself where it is."""
    if x.stride() == like.stride():
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _components(pom: POM, x: Tensor) -> Tensor:
    """The components of a weight, or of what has its layout: a view where there can be one."""
    view = pom.cutting.view(x)
    return pom.cutting.cut(x).clone() if view is None else view


def _parts(omega: Tensor, chunk: int) -> Iterator[slice]:
    """Slices along the first axis, of about ``chunk`` numbers each."""
    count = max(1, chunk // omega[0].numel())
    for start in range(0, len(omega), count):
        yield slice(start, start + count)


def _write(pom: POM, x: Tensor, components: Tensor) -> None:
    """Write back components that are a copy."""
    if pom.cutting.view(x) is None:
        x.copy_(pom.cutting.join(components))

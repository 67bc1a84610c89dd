"""The step of FG-SGD for some components of a weight: Algorithm 1, written once.

:func:`riemannian_gradient` and :func:`move` take tensors (..., n, p), and :class:`~lightning_fgsgd.matrices.Planes` of
whatever can be added and multiplied; from planes of symbols :mod:`~lightning_fgsgd.fused` makes compiled code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_fgsgd.geometry import Geometry
from lightning_fgsgd.matrices import combine, scaled, where

__all__ = ["Options", "move", "riemannian_gradient"]


class Options(NamedTuple):
    """The numbers of a step.

    Attributes:
        sign: −1 to maximise, else 1.
        decay: weight decay, of Euclidean components.
        lr: learning rate r(t).
        momentum: of the buffer.
        fresh: share of the new gradient in the buffer, 1 − dampening; 1 in the first step.
    """

    sign: Any
    decay: Any
    lr: Any
    momentum: Any
    fresh: Any


def riemannian_gradient(geometry: Geometry, q: Any, omega: Any, grad: Any, options: Options, share: Any = None) -> Any:
    """gradL(ω) from the Euclidean gradient (line 5), in the coordinates √m · q, in which its norm is the Riemannian norm.

    Components on the Euclidean manifold keep their gradient, with weight decay. ``share`` is 1/𝔤, to divide by it (Eq. 3).
    """
    g = geometry.decayed(scaled(grad, options.sign), omega, options.decay)
    factor = geometry.inverse_root_metric if share is None else geometry.inverse_root_metric * share
    return geometry.tangent(q, geometry.pull(g)) * factor


def move(
    geometry: Geometry,
    omega: Any,
    grad: Any,
    buffer: Any,
    share: Any,
    options: Options,
    *,
    nesterov: bool = False,
    far: bool = False,
) -> tuple[Any, Any, Any]:
    """New weights and momentum, and which components are within reach of the retraction (the others stay as they were).

    Args:
        geometry: of these components.
        omega: the components.
        grad: their Euclidean gradient.
        buffer: their momentum, a tangent vector in the coordinates √m · q; None without momentum.
        share: 1/𝔤 of each component's group (Eq. 5).
        options: the numbers of the step.
        nesterov: whether the momentum is Nesterov's.
        far: for steps that are out of reach of the fast retraction.
    """
    q = geometry.unit(omega)
    direction = riemannian_gradient(geometry, q, omega, grad, options, share)
    moved = direction
    if buffer is not None:
        moved = combine(direction, options.fresh, buffer, options.momentum)
        direction = combine(direction, 1.0, moved, options.momentum) if nesterov else moved

    rate = options.lr * -1.0 * geometry.inverse_root_metric  # h = rate · direction, Eq. 3
    if far:
        within, new = True, geometry.retract_far(q, direction * rate)
    else:
        within, new = geometry.retract(combine(q, 1.0, direction, rate))  # lines 7 and 8
    weights = where(within, geometry.follow(omega, q, new), omega)
    if buffer is None:
        return weights, None, within
    return weights, where(within, geometry.tangent(new, moved), buffer), within

"""The step of one weight on symbols: what compiled code for a CPU and for a GPU is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_fgsgd import matrices
from lightning_fgsgd.factors import upper_entries
from lightning_fgsgd.geometry import Geometry
from lightning_fgsgd.manifolds import get_manifold
from lightning_fgsgd.matrices import Planes, where
from lightning_fgsgd.pom import POM
from lightning_fgsgd.source import Program, Symbol
from lightning_fgsgd.step import Options, move, riemannian_gradient

__all__ = ["WORTH_COMPILING", "planes", "upper_of", "variant_of", "written"]

WORTH_COMPILING = 128  # kernels from which on it pays to compile for 10 s (5x5) to half a minute (7x7)


def variant_of(pom: POM, weight: Tensor, metric: str) -> tuple[Any, ...]:
    """What the code depends on."""
    names = tuple((i, m.name) for i, m in pom.manifolds.items())
    n = pom.cutting.n if pom.cutting.small else 0
    # Of U: packed in small kernels, a number, a diagonal or all of it in what is larger.
    entries = 0 if pom.upper is None else len(pom.upper) if pom.cutting.small else pom.upper[0].numel()
    radius = not pom.all_ones
    return n, pom.cutting.p, names, entries, radius, metric == "embedded" and radius, weight.dtype


def written(
    program: Program,
    variant: tuple[Any, ...],
    kind: str,
    matrix: Callable[[str], Any],
    upper: Any,
    inverse: Any = None,
    at: str = "",
) -> tuple[Any, Any, Any]:
    """Run a step on symbols of ``program``: the new weights, the momentum, and the condition under which they hold.

    Args:
        program: writes down what is done.
        variant: of :func:`variant_of`.
        kind: ``"move"``, ``"momentum"``, ``"nesterov"``; or ``"squares"``, for the squared norm alone, in the first place.
        matrix: the components of the weight ``"w"``, the gradient ``"g"`` and the momentum ``"b"``.
        upper, inverse: U and its inverse, as :class:`~lightning_fgsgd.geometry.Geometry` takes them.
        at: follows the names of numbers that each component has.
    """
    _, _, names, _, has_radius, embedded, _ = variant
    masks, inverse_root, radius = _given(program, names, has_radius, embedded, at)
    geometry = Geometry(masks, inverse_root, radius, upper, inverse)
    options = Options(*(program.number(i) for i in range(len(Options._fields))))
    omega, grad = matrix("w"), matrix("g")
    if kind == "squares":
        gradient = riemannian_gradient(geometry, geometry.unit(omega), omega, grad, options)
        return matrices.squares(gradient), None, None
    buffer = None if kind == "move" else matrix("b")
    return move(geometry, omega, grad, buffer, program.symbol("f" + at), options, nesterov=kind == "nesterov")


def planes(program: Program, name: str, n: int, p: int, at: str = "") -> Planes:
    """The n · p entries of a small component, each a symbol."""
    return Planes([[program.symbol(f"{name}{i * p + j}{at}") for j in range(p)] for i in range(n)])


def upper_of(program: Program, entries: int, p: int, at: str) -> Planes | None:
    """U of the component that the code is about, small, from the entries that are stored of it."""
    symbols: list[Symbol] = [program.symbol(f"u{i}{at}") for i in range(entries)]
    if not symbols:
        return None
    if entries in (1, p):
        return Planes([[symbols[j % entries] if i == j else 0.0 for j in range(p)] for i in range(p)])
    found = dict(zip(upper_entries(p), symbols, strict=True))
    return Planes([[found.get((i, j), 0.0) for j in range(p)] for i in range(p)])


def _given(program: Program, names: Any, has_radius: bool, embedded: bool, at: str) -> tuple[Any, Any, Any]:
    """The manifolds with their masks, 1/√m and R, of the component that the code is about."""
    which = program.symbol("m" + at)
    masks = [(get_manifold(name), True if len(names) == 1 else which == number) for number, name in names]
    first = len(Options._fields)
    inverse_root: Any = program.number(first + names[0][0])
    for (_, mask), (number, _) in zip(masks[1:], names[1:], strict=True):
        inverse_root = where(mask, program.number(first + number), inverse_root)
    radius: Any = program.symbol("r" + at) if has_radius else None
    for manifold, mask in masks:
        if has_radius and manifold.name == "euclidean":
            radius = where(mask, 1.0, radius)  # R is kept by channel, for all components of it
    return masks, inverse_root / radius if embedded else inverse_root, radius

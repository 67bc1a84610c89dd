"""What may be asked of a plan: the choices for a weight, their defaults, and the errors that name what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fgsgd.components import CUTTINGS
from lightning_fgsgd.grouping import SCHEMES
from lightning_fgsgd.manifolds import get_manifold

__all__ = ["DEFAULTS", "DEFAULT_MANIFOLDS", "STARTS", "check_choices", "check_override", "check_splits"]

STARTS = ("preserve", "project", "random")
DEFAULT_MANIFOLDS = ("sphere", "oblique", "stiefel")
DEFAULTS: dict[str, Any] = {
    "scheme": "pio",
    "manifolds": DEFAULT_MANIFOLDS,
    "start": "preserve",
    "cutting": "kernel",
    "block_size": 16,
    "groups": None,
}


def check_splits(layer_decay: Any, euclidean_lr_factor: Any) -> None:
    """Refuse factors of the learning rate that are none."""
    numbers = (int, float)
    if layer_decay is not None and not (isinstance(layer_decay, numbers) and 0 < layer_decay <= 1):
        raise ValueError(f"layer_decay: {layer_decay!r} is not in (0, 1]")
    if euclidean_lr_factor is not None and not (
        isinstance(euclidean_lr_factor, numbers) and 0 < euclidean_lr_factor < math.inf
    ):
        raise ValueError(f"euclidean_lr_factor: {euclidean_lr_factor!r} is not a positive number")


def check_override(pattern: str, change: Any, settings: dict[str, Any], seed: int) -> None:
    """Refuse what ``overrides`` has for a pattern, if it or what it makes of the ``settings`` cannot be."""
    if not isinstance(change, Mapping) or not set(change) <= set(DEFAULTS):
        raise ValueError(
            f"overrides: {pattern!r} has {change!r}; give a mapping of some of {', '.join(DEFAULTS)} to their values"
        )
    try:
        check_choices(**(settings | dict(change)), seed=seed)
    except ValueError as error:
        raise ValueError(f"overrides: {pattern!r}: {error}") from error


def check_choices(
    scheme: str,
    manifolds: Sequence[str],
    start: str,
    cutting: str,
    block_size: int,
    groups: int | str | None,
    seed: int,
) -> None:
    """Refuse what is not among the choices, by its argument's name."""
    for argument, value, choices in (
        ("scheme", scheme, SCHEMES),
        ("start", start, STARTS),
        ("cutting", cutting, CUTTINGS),
    ):
        if value not in choices:
            raise ValueError(f"{argument}: unknown {argument} {value!r}; choose from {', '.join(map(repr, choices))}")
    if isinstance(manifolds, str):
        raise ValueError(f"manifolds: {manifolds!r} is one string; give a list of names, [{manifolds!r}]")
    if len(manifolds) == 0:
        raise ValueError("manifolds: none given; give at least one of 'sphere', 'oblique', 'stiefel', 'euclidean'")
    for manifold in manifolds:
        get_manifold(manifold)
    if len(set(manifolds)) != len(manifolds):
        raise ValueError(f"manifolds: {tuple(manifolds)} names one twice; give each manifold once")
    counts: list[tuple[str, Any, str]] = [("block_size", block_size, ""), ("groups", groups, ", 'each' or None")]
    for argument, count, other in counts:
        if other and count in ("each", None):
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{argument}: {count!r} is not a whole number of at least 1{other}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: {seed!r} is not a whole number")

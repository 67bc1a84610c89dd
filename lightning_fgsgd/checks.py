"""What FGSGD refuses, or warns of, before anything moves."""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.pom import METRICS
from lightning_fgsgd.sharding import Shard, anywhere

__all__ = [
    "LARGEST_GRADIENT",
    "gradients",
    "lost_plans",
    "named_apart",
    "options",
    "parameter",
    "stray_weights",
    "too_large",
    "weights",
]

LARGEST_GRADIENT = 1e18  # the square of a larger one overflows in float32
_STRAY = {torch.float16: 0.05, torch.bfloat16: 0.05}  # relative distance from which a weight has left; else 1e-3


def options(given: Mapping[str, Any]) -> None:
    """Refuse options that are out of range, with what would be right."""
    lr = given["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    for name in ("lr", "momentum", "weight_decay", "dampening"):
        if not isinstance(given[name], numbers.Real | Tensor):
            raise ValueError(f"{name}: {given[name]!r} is not a number")
    for name in ("lr", "momentum", "weight_decay"):
        if not (0.0 <= given[name] < math.inf):
            raise ValueError(f"{name}: {given[name]} is not a finite number of at least 0")
    if not math.isfinite(given["dampening"]):
        raise ValueError(f"dampening: {given['dampening']} is not a finite number")
    if given["nesterov"] and (given["momentum"] == 0 or given["dampening"] != 0):
        raise ValueError(
            "nesterov: it needs a momentum above 0 and no dampening, got "
            f"momentum={given['momentum']}, dampening={given['dampening']}"
        )
    rho = given["rho"]
    if rho not in (None, "average") and (
        not isinstance(rho, numbers.Real | Tensor) or not 0.0 <= float(rho) < math.inf
    ):
        raise ValueError(
            f"rho: {rho!r} is not a finite number of at least 0; 'average' estimates it, None turns the normalisation off"
        )
    metric = given["metric"]
    if not isinstance(metric, str) or metric not in METRICS:  # a torchmetrics Metric equals anything
        raise ValueError(f"metric: unknown metric {metric!r}; choose from {', '.join(map(repr, METRICS))}")


def parameter(param: object) -> None:
    """Refuse a layer in the place of its weight: the distance of what is not constrained is 0, which would mislead."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param: a {type(param).__name__} is no parameter; give the weight itself, as layer.weight")


def lost_plans(groups: Sequence[Mapping[str, Any]], planned: Container[Tensor]) -> None:
    """Say so where dicts of ``pom_param_groups`` were copied without their plan, so that nothing would be constrained."""
    for group in groups:
        kind = str(group.get("name", "")).split(",")[0]
        if kind == "pom" and not any(p in planned for p in group["params"]):
            warnings.warn(
                f"FGSGD: the parameter group {group['name']!r} has lost the plan that pom_param_groups gave it, as a copy "
                "of a dict does, so its weights are not constrained; change the groups in place, or call "
                "constrain(groups.plan)",
                stacklevel=4,
            )
            return


def named_apart(group: dict[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A group of ``pom_param_groups`` under a name of its own: ``LearningRateMonitor`` of Lightning takes no name twice."""
    name, taken = group.get("name"), {other.get("name") for other in others}
    if not isinstance(name, str) or name not in taken or name.split(",")[0] not in ("pom", "euclidean"):
        return group
    number = next(n for n in itertools.count(2) if f"{name}, {n}" not in taken)
    return {**group, "name": f"{name}, {number}"}


def gradients(grads: Sequence[tuple[str, Tensor]], shards: Sequence[Shard | None] = ()) -> None:
    """Refuse gradients of constrained weights that are not finite or too large: one look at all, one answer to the host.

    Each comes with its weight's name, which weights of several models may share.

    Of sharded weights, all processes refuse them together.
    """
    # The norm of float16 values can overflow where none of them has.
    read = [g.float() if g.dtype == torch.float16 else g for _, g in grads]
    bad_here = bool(read) and not float(torch.nn.utils.get_total_norm(read)) <= LARGEST_GRADIENT
    if read and any(shards):
        bad_here = any(anywhere([bad_here] * len(shards), shards, read[0].device))
    if not bad_here:
        return
    norms = [(name, float(g.double().norm())) for name, g in grads]
    bad = [(name, norm) for name, norm in norms if not norm <= LARGEST_GRADIENT] or norms  # all: in other processes
    some = ", ".join(f"{name} ({norm:.3g})" for name, norm in bad[:3])
    raise FloatingPointError(
        f"FGSGD: the gradients of {len(bad)} of {len(norms)} constrained weights are not finite, or their norm exceeds "
        f"{LARGEST_GRADIENT:g} (norms of the first: {some}); no weight was moved. Look for a learning rate that is "
        "too high, a loss that is not finite, or NaN in the input"
    )


def weights(values: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse constrained weights, each with its name, that hold values that are not finite."""
    bad = [name for name, x in values if not bool(torch.isfinite(x).all())]
    if bad:
        raise FloatingPointError(
            f"FGSGD: constrained weights hold values that are not finite: {', '.join(bad[:3])}; no weight was moved. Load "
            "them anew, and look for what wrote to them"
        )


def too_large(sums: Sequence[tuple[str, Tensor]]) -> FloatingPointError:
    """What to raise where gradients are too large in the metric alone, given R_g² of the groups of each weight."""
    norm, name = max((float(x.max()) ** 0.5, name) for name, x in sums)
    return FloatingPointError(
        f"FGSGD: the Riemannian norm of a gradient exceeds {LARGEST_GRADIENT:g} ({name}: {norm:.3g}), and not its "
        "Euclidean norm; no weight was moved. Components of it stood at next to 0 when they were placed: start from larger "
        'weights, pass metric="unit", or leave the weight out'
    )


def stray_weights(distances: Mapping[Tensor, tuple[str, float]]) -> list[Tensor]:
    """Those weights that left their manifolds, after a warning; refuses weights that are not finite.

    Not all that were written to are astray: a checkpoint may have been loaded, or an average swapped in and out.

    Args:
        distances: name and relative distance from its manifolds of each weight that others have written to.
    """
    stray = {p: found for p, found in distances.items() if not found[1] <= _STRAY.get(p.dtype, 1e-3)}
    if not stray:
        return []
    names = ", ".join(f"{name} ({distance:.2g})" for name, distance in list(stray.values())[:3])
    if not all(math.isfinite(distance) for _, distance in stray.values()):
        raise FloatingPointError(f"FGSGD: constrained weights hold values that are not finite: {names}")
    warnings.warn(
        f"FGSGD: {len(stray)} constrained weights were changed by others and left their manifolds (relative distance of "
        f"the first: {names}); this step starts from the nearest points on them. To take the changed weights as a new "
        "start, make a new optimizer",
        stacklevel=5,
    )
    return list(stray)

"""What a checkpoint holds of the products of manifolds of a weight, and how it is read again.

Plain tensors, strings and numbers, so that ``torch.load(..., weights_only=True)`` reads them. Of a sharded weight it is what
one process alone would hold, so that a fit can go on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd.components import Cutting
from lightning_fgsgd.grouping import pack, unpack
from lightning_fgsgd.manifolds import working
from lightning_fgsgd.plan import PlannedWeight, POMPlan
from lightning_fgsgd.pom import POM
from lightning_fgsgd.sharding import collect, local, shard_of, split_like, whole_of

__all__ = ["frozen", "match", "restore_momentum", "save", "take_apart", "whole"]

_FORMAT = 3


def save(poms: Sequence[POM | None]) -> list[dict[str, Any] | None]:
    """The states of the products of manifolds of some weights; None stays None. Called by all processes."""
    return [None if pom is None else _state(pom) for pom in whole(poms)]


def frozen(planned: PlannedWeight) -> dict[str, Any]:
    """What stands for a weight that waits to be placed, as it is frozen."""
    return {"format": _FORMAT, "name": planned.name, "frozen": True}


def _state(pom: POM) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "name": pom.name,
        "cutting": pom.cutting.kind,
        "n": pom.cutting.n,
        "p": pom.cutting.p,
        "start": pom.start,
        **pack(pom.sets),
        "radius": pom._radius,
        "upper": pom.upper,
        "origins": pom.origins,
        "sizes": pom.sizes,
    }


def take_apart(
    state_dict: Mapping[str, Any], param_groups: Sequence[dict[str, Any]], constrained: bool
) -> tuple[list[dict[str, Any]], list[tuple[Tensor, dict[str, Any] | None]]]:
    """The parameter groups of a state without what :func:`save` put in, and that for each of an optimizer's parameters.

    Raises:
        ValueError: the state has other groups than the optimizer, or nothing of :func:`save` for a ``constrained`` one.
    """
    saved = [dict(group) for group in state_dict["param_groups"]]
    described = [group.pop("pom", None) for group in saved]
    there, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in param_groups]
    if there != here:
        raise ValueError(
            f"state_dict: its parameter groups hold {there} parameters, this optimizer's {here}; group the same model with "
            "the same settings"
        )
    if constrained and all(states is None for states in described):
        raise ValueError(
            "state_dict: it holds no products of manifolds, so another optimizer saved it (or torch's "
            "flatten_optimizer_state_dict=True, which drops them: leave that out); "
            "load it into FGSGD(model.parameters()), then call constrain(pom_param_groups(model).plan)"
        )
    return saved, [
        (p, state)
        for group, states in zip(param_groups, described, strict=True)
        for p, state in zip(group["params"], states or [None] * len(group["params"]), strict=True)
    ]


def match(
    states: Iterable[tuple[Tensor, dict[str, Any] | None]], poms: Mapping[Tensor, POM], plan: POMPlan
) -> dict[Tensor, POM]:
    """The POMs of some parameters from what :func:`save` gave for each of them, to take the place of ``poms``.

    Weights that are frozen here, and were not when they were saved, have none yet, but a place in ``plan``. Those that were
    frozen then have none in what is returned: they are placed by the next step in which they are not frozen.

    Raises:
        ValueError: a state belongs to another weight or cutting, or another version of this package wrote it; or a
            parameter is constrained in one of the two only.
    """
    found, names = {}, {pom.name for pom in poms.values()}
    for p, state in states:
        mine = poms.get(p)
        if state is not None and "frozen" in state:
            continue
        if state is not None and mine is None and p in plan.weights:
            planned = plan.weights[p]
            shard = shard_of(p, planned.cutting, planned.scheme)
            mine = POM.place(planned, whole_of(p).clone()).part(shard)
        if state is None:
            if mine is not None:
                raise ValueError(
                    f"state_dict: {mine.name} is constrained here but was not when it was saved; choose the same weights by "
                    "include and exclude, or load the model's weights only, and start a new optimizer from them"
                )
            continue
        if mine is None:
            raise ValueError(
                f"state_dict: {state['name']} was constrained when it was saved but is not here; "
                "make the optimizer with pom_param_groups and the same settings"
            )
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict: the products of manifolds of {state['name']} are in format {state.get('format', 1)}, and this "
                f"version reads format {_FORMAT}; load the model's weights only, and start a new optimizer from them"
            )
        # A name that is not known here was changed, by a wrapper or by hand; one that is known belongs to another weight.
        if state["name"] != mine.name and state["name"] in names:
            raise ValueError(
                f"state_dict: where {mine.name} is here, {state['name']} was when it was saved; "
                "the model must have its parameters in the same order"
            )
        layer = mine.layer
        here = (layer.kind, layer.n, layer.p, layer.count)
        there = (state["cutting"], state["n"], state["p"], state["manifold"].numel())
        if here != there:
            raise ValueError(
                f"state_dict: {mine.name} was cut into {there[3]} {there[0]} components of {there[1]} x {there[2]}, "
                f"here into {here[3]} {here[0]} components of {here[1]} x {here[2]}; "
                "use the cutting and block_size with which it was saved"
            )
        found[p] = _load(state, layer, local(p)).part(mine.shard)
    return found


def _load(state: dict[str, Any], cutting: Cutting, weight: Tensor) -> POM:
    like = working(weight)
    upper = None if state["upper"] is None else state["upper"].to(like, copy=True)
    radius = state["radius"].to(like)
    if len(radius) != cutting.count:
        radius = radius[cutting.reads().to(radius.device)]
    sets = unpack(state, cutting)
    return POM(state["name"], cutting, sets, state["start"], upper, radius, state["origins"], state["sizes"])


def whole(poms: Sequence[POM | None]) -> list[POM | None]:
    """The products of manifolds of whole weights, where these hold a part of them. Called by all processes."""
    parts = {
        i: (pom.shard, (pom.sets.manifold, pom.sets.slot, pom.radius, pom.upper))
        for i, pom in enumerate(poms)
        if pom is not None and pom.shard is not None and not pom.shard.gathered
    }
    found = list(poms)
    for i, tensors in collect(parts).items():
        pom = poms[i]
        assert pom is not None
        manifold, slot, radius, upper = zip(*tensors, strict=True)
        sets = replace(pom.sets, manifold=torch.cat(manifold), slot=torch.cat(slot), cutting=pom.layer)
        joined = None if pom.upper is None else torch.cat(upper, -1 if pom.cutting.small else 0).to(pom.upper)
        scales = (pom.origins, pom.sizes)
        found[i] = POM(pom.name, pom.layer, sets, pom.start, joined, torch.cat(radius).to(pom.radius), *scales)
    return found


def restore_momentum(
    state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer, poms: Mapping[Tensor, POM]
) -> None:
    """Give the state of half-precision weights its own precision back, which torch casts to theirs, and spread it alike.

    That of weights that are stepped as by ``torch.optim.SGD`` has their precision, as there.
    """
    for packed, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(packed["params"], group["params"], strict=True):
            state = optimizer.state.get(p, {})
            own = p in poms and (poms[p].constrains or group["rho"] is not None)
            for key, value in state_dict["state"].get(index, {}).items():
                if own and isinstance(value, Tensor) and value.dtype != state[key].dtype:
                    state[key] = value.to(p.device, copy=True)
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[key] = split_like(state[key], p)

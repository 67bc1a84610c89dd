"""From a model to a plan: which of its weights are constrained, how, and why the others are not."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fgsgd.components import CUTTINGS, Cutting, cutting_of
from lightning_fgsgd.grouping import SCHEMES, IndexSets, draw_index_sets, pool_size
from lightning_fgsgd.manifolds import get_manifold

__all__ = ["STARTS", "POMPlan", "PlannedWeight", "pom_param_groups"]

STARTS = ("preserve", "project", "random")
DEFAULT_MANIFOLDS = ("sphere", "oblique", "stiefel")

# timm's weight-standardised convolutions: their forward divides the weight by its own norm, which voids a constraint
# on that norm.
_STANDARDIZED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


@dataclass(frozen=True)
class PlannedWeight:
    """What is to become of one constrained weight: its cutting, its index sets, and how it gets onto its manifolds."""

    name: str
    cutting: Cutting
    index_sets: IndexSets
    scheme: str
    start: str
    seed: int


@dataclass
class POMPlan:
    """The products of manifolds of a whole model. Drawing it moves nothing; an :class:`FGSGD` that is given it does.

    Attributes:
        weights: the constrained weights, frozen ones too, by parameter.
        euclidean: the name of every other parameter, and the reason why it stays Euclidean.
        names: the name of every parameter of the model.
    """

    weights: dict[Tensor, PlannedWeight] = field(default_factory=dict)
    euclidean: dict[str, str] = field(default_factory=dict)
    names: dict[Tensor, str] = field(default_factory=dict)


class POMParamGroups(list[dict[str, Any]]):
    """Parameter groups for :class:`FGSGD`, a plain list of dicts that also carries the plan they come from."""

    def __init__(self, groups: Sequence[dict[str, Any]], plan: POMPlan) -> None:
        super().__init__(groups)
        self.plan = plan


def pom_param_groups(
    model: nn.Module,
    *,
    scheme: str = "pio",
    manifolds: Sequence[str] = DEFAULT_MANIFOLDS,
    start: str = "preserve",
    cutting: str = "kernel",
    block_size: int = 16,
    groups: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
) -> POMParamGroups:
    r"""Parameter groups that put a model's weights on products of manifolds, for :class:`FGSGD`.

    Linear layers and convolutions are constrained; biases, norms, embeddings and everything else stay Euclidean. Nothing
    is moved here: the optimizer places the weights when it is made.

    Args:
        model: any module; a timm model, or a LightningModule that holds one.
        scheme: pools from which groups are drawn, ``"pi"`` (kernels that share an input channel), ``"po"`` (an output
            channel) or ``"pio"`` (a whole layer). On blocks, that is on Linear layers and 1x1 convolutions, all three
            draw over the layer.
        manifolds: names out of ``"sphere"``, ``"oblique"``, ``"stiefel"``, ``"euclidean"``.
        start: ``"preserve"`` keeps the weights where they are and their own Gram information as the constraint;
            ``"project"`` moves them to the nearest point of the unit manifolds; ``"random"`` draws uniform points.
        cutting: ``"kernel"`` (each k x k kernel is a component) or ``"filter"`` (blocks of output neurons).
        block_size: largest number p of output neurons in a block.
        groups: number of groups in each pool; by default one per manifold.
        include: glob patterns of the parameter names to constrain; all by default.
        exclude: glob patterns of the parameter names to leave Euclidean. A classifier head (``get_classifier`` of a timm
            model) is left Euclidean too, because it is usually new: there is no pretrained geometry to keep and its
            norm carries the confidence. ``exclude=()`` lifts that rule.
        seed: of the index sets and of ``"random"``. Each layer draws from the seed and its own name, so that leaving
            out a layer does not change the others.

    Returns:
        A list of two parameter groups, ``"pom"`` and ``"euclidean"`` (the latter only where there are any), holding the
        parameters that require a gradient. Frozen weights are in the plan, so ``optimizer.add_param_group`` constrains
        them when they are unfrozen.

    Raises:
        ValueError: an argument that is not one of its choices, a pattern that matches no parameter, more ``groups``
            than any pool of the model has components, or a model with nothing to constrain.
    """
    check_choices(scheme, manifolds, start, cutting, block_size, groups, seed)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    _check_patterns("include", include, names.values())
    _check_patterns("exclude", exclude, names.values())
    head = set() if exclude is not None and len(exclude) == 0 else _head_parameters(model)

    plan = POMPlan(names=names)
    owners: dict[Tensor, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for attr, p in module._parameters.items():
            if p is not None:
                owners.setdefault(p, (module, attr))
    for weight, name in names.items():
        module, attr = owners[weight]
        cut = cutting_of(module, cutting, block_size) if attr == "weight" else None
        reason = _reason(weight, name, module, cut, include, exclude, weight in head)
        if reason or cut is None:
            plan.euclidean[name] = reason
            continue
        generator = torch.Generator().manual_seed(layer_seed(seed, name))
        sets = draw_index_sets(cut, scheme, manifolds, groups, generator=generator)
        plan.weights[weight] = PlannedWeight(name, cut, sets, scheme, start, seed)

    if not plan.weights:
        reasons = "; ".join(sorted(set(plan.euclidean.values())))
        raise ValueError(
            f"model: {type(model).__name__} has no weight to constrain ({reasons or 'it has no parameters'}). "
            "Linear layers and convolutions can be constrained; exclude=() includes the classifier head."
        )
    if groups is not None:
        largest = max(pool_size(w.cutting, scheme) for w in plan.weights.values())
        if groups > largest:
            raise ValueError(
                f"groups: {groups} groups were asked for, but the largest pool of scheme={scheme!r} has only {largest} "
                f"components; choose groups between 1 and {largest}, or None for one group per manifold"
            )

    trainable = [p for p in names if p.requires_grad]
    named = [
        {"params": [p for p in trainable if p in plan.weights], "name": "pom"},
        {"params": [p for p in trainable if p not in plan.weights], "name": "euclidean"},
    ]
    return POMParamGroups([group for group in named if group["params"]], plan)


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer's draws."""
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63


def _reason(
    p: Tensor,
    name: str,
    module: nn.Module,
    cut: Cutting | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    is_head: bool,
) -> str:
    """Why a parameter stays Euclidean; "" where it does not."""
    if cut is None:
        return "not the weight of a Linear layer or a convolution"
    if include is not None and not _matches(name, include):
        return "not in include"
    if exclude is not None and _matches(name, exclude):
        return "in exclude"
    if is_head:
        return "classifier head"
    if normalizes_weight(module):
        return "its layer normalises the weight itself"
    if not p.is_floating_point():
        return f"dtype {p.dtype}"
    if cut.n * cut.p < 2:
        return "components of a single number"
    return ""


def normalizes_weight(module: nn.Module) -> bool:
    """Whether the forward of a layer divides its weight by the weight's own norm."""
    return type(module).__name__ in _STANDARDIZED


def _head_parameters(model: nn.Module) -> set[Tensor]:
    with_head: Iterator[Any] = (m for m in model.modules() if callable(getattr(m, "get_classifier", None)))
    heads = [m.get_classifier() for m in with_head]
    flat: Iterator[Any] = (m for head in heads for m in (head if isinstance(head, (tuple, list)) else (head,)))
    return {p for m in flat if isinstance(m, nn.Module) for p in m.parameters()}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(argument: str, patterns: Sequence[str] | None, names: Any) -> None:
    if isinstance(patterns, str):
        raise ValueError(f"{argument}: {patterns!r} is one string; give a list of patterns, [{patterns!r}]")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(repr(name) for name in list(names)[:3])
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no parameter; it is a glob on names such as {some}"
            )


def check_choices(
    scheme: str, manifolds: Sequence[str], start: str, cutting: str, block_size: int, groups: int | None, seed: int
) -> None:
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
    for argument, count in (("block_size", block_size), ("groups", groups)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{argument}: {count!r} is not a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: {seed!r} is not a whole number")

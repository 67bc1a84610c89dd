"""From a model to a plan: which of its weights are constrained, how, and why the others are not."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_fgsgd.choices import DEFAULT_MANIFOLDS, DEFAULTS, check_choices, check_override, check_splits
from lightning_fgsgd.components import Cutting, cutting_of
from lightning_fgsgd.grouping import IndexSets, draw_index_sets, pool_size
from lightning_fgsgd.reasons import normalizes_weight, why_euclidean
from lightning_fgsgd.selection import Selector, head_parameters, layer_decay_factors
from lightning_fgsgd.sharding import whole_of

__all__ = ["POMPlan", "PlannedWeight", "draw_plan", "pom_param_groups"]


@dataclass(frozen=True)
class PlannedWeight:
    """What is to become of one constrained weight: its cutting, its index sets, and how it gets onto its manifolds."""

    name: str
    cutting: Cutting
    index_sets: IndexSets
    scheme: str
    start: str
    seed: int

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that no manifold has a place for."""
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{self.name}: the weight holds NaN or infinite values, so it has no place on a manifold")


@dataclass
class POMPlan:
    """The products of manifolds of a whole model. Drawing it moves nothing; an :class:`FGSGD` that is given it does.

    Attributes:
        weights: the constrained weights, frozen ones too, by parameter.
        reasons: why every other parameter stays Euclidean, by parameter.
        names: the name of every parameter of the model.
    """

    weights: dict[Tensor, PlannedWeight] = field(default_factory=dict)
    reasons: dict[Tensor, str] = field(default_factory=dict)
    names: dict[Tensor, str] = field(default_factory=dict)

    @property
    def euclidean(self) -> dict[str, str]:
        """The name of every other parameter, and the reason why it stays Euclidean."""
        return {self.names[p]: reason for p, reason in self.reasons.items()}

    def __or__(self, other: POMPlan) -> POMPlan:
        return POMPlan(self.weights | other.weights, self.reasons | other.reasons, self.names | other.names)


class POMParamGroup(dict[str, Any]):
    """A parameter group for :class:`FGSGD`, a dict that also carries the plan it comes from."""

    def __init__(self, group: Mapping[str, Any], plan: POMPlan) -> None:
        super().__init__(group)
        self.plan = plan


class POMParamGroups(list[dict[str, Any]]):
    """Parameter groups for :class:`FGSGD`, a list of them with the plan that they come from.

    Each carries it too, so that groups of several models, and groups of one's own, can be put together in a list.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], plan: POMPlan) -> None:
        super().__init__(POMParamGroup(group, plan) for group in groups)
        self.plan = plan


def pom_param_groups(
    model: nn.Module,
    *,
    scheme: str = "pio",
    manifolds: Sequence[str] = DEFAULT_MANIFOLDS,
    start: str = "preserve",
    cutting: str = "kernel",
    block_size: int = 16,
    groups: int | str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    normalized: bool = False,
    layer_decay: float | None = None,
    euclidean_lr_factor: float | None = None,
    no_weight_decay: bool | Sequence[str] = False,
    seed: int = 0,
) -> POMParamGroups:
    r"""Parameter groups that put a model's weights on products of manifolds, for :class:`FGSGD`.

    The weights of Linear layers, convolutions, recurrent layers, attention and expert layers are constrained
    (:func:`~lightning_fgsgd.components.cutting_of`); biases, norms, embeddings, tables, tokens and gains stay Euclidean.
    Nothing is moved here: the optimizer places the weights when it is made.

    ``include``, ``exclude`` and ``overrides`` take patterns: globs on parameter names (``"*.attn.*"``), layer types
    (``"type:Linear"``), or timm's ``"timm:head"``, ``"timm:stem"``, ``"timm:stage1"``, ...; see
    :class:`~lightning_fgsgd.selection.Selector`.

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
        groups: number of groups in each pool; by default one per manifold. ``"each"`` component can be a group of its own,
            with a step size (Eq. 5) of its own.
        include: patterns of the parameters to constrain; all by default. A pattern that names a weight also lifts the head
            rule below for it, if it is ``"timm:head"`` or the parameter's very name.
        exclude: patterns of the parameters to leave Euclidean. A classifier head (``get_classifier`` of a timm
            model) is left Euclidean too, because it is usually new: there is no pretrained geometry to keep and its
            norm carries the confidence. ``exclude=()`` lifts that rule.
        overrides: other settings for some weights, by pattern: ``{"type:Linear": {"manifolds": ["stiefel"]}}``. The settings
            are ``scheme``, ``manifolds``, ``start``, ``cutting``, ``block_size`` and ``groups``; where two patterns match,
            the later one holds.
        normalized: constrain also weights that their layer standardises in its forward (timm's StdConv2d, ScaledStdConv2d):
            the constraint then has no effect on what the layer computes, but for the size of its steps.
        layer_decay: multiply the learning rate by this factor for each layer from the output to the input, as numbered by
            timm's ``group_matcher``; as ``timm.optim.param_groups_layer_decay``.
        euclidean_lr_factor: multiply the learning rate of what stays Euclidean by this. With a large ρ the learning rate of
            the constrained weights is that of an angle, while the rest still needs SGD's.
        no_weight_decay: parameters whose ``weight_decay`` is 0: true for biases, norms, gains and all that the timm model's
            ``no_weight_decay()`` names; or patterns. Weight decay never acts on constrained components.
        seed: of the index sets and of ``"random"``. Each layer draws from the seed and its own name, so that leaving
            out a layer does not change the others.

    Returns:
        A list of parameter groups, ``"pom"`` and ``"euclidean"`` (the latter only where there are any; split further by
        ``layer_decay`` and ``no_weight_decay``), holding the parameters that require a gradient. Frozen weights are in the
        plan, so ``optimizer.add_param_group`` constrains them when they are unfrozen.

    Raises:
        ValueError: an argument that is not one of its choices, a pattern that matches no parameter, more ``groups``
            than any pool of the model has components, or a model with nothing to constrain.
    """
    plan = draw_plan(
        model,
        scheme=scheme,
        manifolds=manifolds,
        start=start,
        cutting=cutting,
        block_size=block_size,
        groups=groups,
        include=include,
        exclude=exclude,
        overrides=overrides,
        normalized=normalized,
        seed=seed,
    )
    if not plan.weights:
        reasons = "; ".join(sorted(set(plan.reasons.values())))
        raise ValueError(
            f"model: {type(model).__name__} has no weight to constrain ({reasons or 'it has no parameters'}). "
            "Linear layers and convolutions can be constrained; exclude=() includes the classifier head, "
            "normalized=True the weights that their layers standardise."
        )
    return POMParamGroups(
        _parameter_groups(unwrapped(model), plan, layer_decay, euclidean_lr_factor, no_weight_decay), plan
    )


def draw_plan(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    normalized: bool = False,
    seed: int = 0,
    **settings: Any,
) -> POMPlan:
    """The plan of :func:`pom_param_groups`, with the same arguments; it may be one that constrains nothing."""
    model = unwrapped(model)
    settings = {**DEFAULTS, **settings}
    check_choices(**settings, seed=seed)
    names, owners = _parameters(model)
    selector = Selector(model, names, owners)
    included, excluded = selector.find("include", include), selector.find("exclude", exclude)
    head = set() if exclude is not None and len(exclude) == 0 else head_parameters(model)
    for pattern in include or ():
        head -= (
            selector.find("include", [pattern]) if pattern == "timm:head" else {p for p in head if names[p] == pattern}
        )
    changes = [
        (pattern, selector.find("overrides", [pattern]), change) for pattern, change in (overrides or {}).items()
    ]
    for pattern, change in (overrides or {}).items():
        check_override(pattern, change, settings, seed)

    plan = POMPlan(names=names)
    pools: dict[
        tuple[str, int], tuple[int, str]
    ] = {}  # the largest of the weights that a number of groups was given for
    for weight, name in names.items():
        mine, asked = dict(settings), "groups"
        for pattern, matched, change in changes:
            if weight in matched:
                mine |= change
                asked = f"overrides: {pattern!r}: groups" if "groups" in change else asked
        module, attr = _owner(weight, name, owners[weight])
        cut = cutting_of(module, mine["cutting"], mine["block_size"], attr)
        if cut is None:
            reason = why_euclidean(name, weight, owners[weight])
        elif include is not None and weight not in included:
            reason = "not in include"
        elif weight in excluded:
            reason = "in exclude"
        elif weight in head:
            reason = "classifier head"
        elif normalizes_weight(module) and not normalized:
            reason = "its layer normalises the weight itself"
        else:
            reason = _unfit(weight, name, cut, mine["start"], model)
        if reason or cut is None:
            plan.reasons[weight] = reason
            continue
        generator = torch.Generator().manual_seed(layer_seed(seed, name))
        sets = draw_index_sets(cut, mine["scheme"], mine["manifolds"], mine["groups"], generator=generator)
        plan.weights[weight] = PlannedWeight(name, cut, sets, mine["scheme"], mine["start"], seed)
        if isinstance(mine["groups"], int):
            key = asked, mine["groups"]
            pools[key] = max(pools.get(key, (0, "")), (pool_size(cut, mine["scheme"]), mine["scheme"]))
    for (asked, wanted), (largest, scheme) in pools.items():
        if wanted > largest:
            raise ValueError(
                f"{asked}: {wanted} groups were asked for, but the largest pool of scheme={scheme!r} has only "
                f"{largest} components; choose groups between 1 and {largest}, 'each', or None for one per manifold"
            )
    return plan


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a ``DistributedDataParallel`` or ``DataParallel``: names, and so draws, are those without it."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return inner
    return model


def _parameters(model: nn.Module) -> tuple[dict[Tensor, str], dict[Tensor, list[nn.Module]]]:
    """The name of every parameter, once where it is tied, and all the modules that hold it."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "model: FullyShardedDataParallel flattens the weights, so there are no layers' weights to constrain; shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2), in Lightning with ModelParallelStrategy"
        )
    # torch.compile(module) is a module around the module: its names, and so its draws, are those without it.
    names: dict[Tensor, str] = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
    lazy = [name for p, name in names.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"model: {lazy[0]} has no shape yet (a lazy module); run one batch through the model first")
    owners: dict[Tensor, list[nn.Module]] = {p: [] for p in names}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[p].append(module)
    return names, owners


def _owner(weight: Tensor, name: str, owners: list[nn.Module]) -> tuple[nn.Module, str]:
    """The module that says how a weight is used, and the weight's name in it.

    A table of embeddings that is tied is one. A layer's weight that another registers too, under a name of its own, is the
    layer's.
    """
    attrs = {m: next(attr for attr, p in m._parameters.items() if p is weight) for m in owners}
    tables = [m for m in owners if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    layers = [m for m in owners if cutting_of(m, attr=attrs[m]) is not None]
    module = (*tables, *layers, *owners)[0]
    return module, attrs[module]


def _unfit(weight: Tensor, name: str, cut: Cutting, start: str, model: nn.Module) -> str:
    """Why a weight that could be cut is not to be constrained; "" where it is."""
    if not weight.is_floating_point():
        return f"dtype {weight.dtype}"
    if cut.n * cut.p < 2:
        return "components of a single number"
    if _is_adapter(name, model):
        return "adapter"
    if start == "preserve" and not weight.is_meta and not bool(whole_of(weight).any()):
        return "zero at the start, so there is nothing to preserve"
    return ""


def _is_adapter(name: str, model: nn.Module) -> bool:
    """Whether a parameter belongs to an adapter, as PEFT's layers name them, or is called ``lora_...``.

    Adapters start at zero on purpose: on a manifold they would never leave it.
    """
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return True
    for i in range(len(parts)):
        module: Any = model.get_submodule(".".join(parts[:i]))
        if parts[i] in getattr(module, "adapter_layer_names", ()):
            return True
    return False


def _parameter_groups(
    model: nn.Module,
    plan: POMPlan,
    layer_decay: float | None,
    euclidean_lr_factor: float | None,
    no_weight_decay: bool | Sequence[str],
) -> list[dict[str, Any]]:
    """The trainable parameters, split by what their groups must say of them."""
    check_splits(layer_decay, euclidean_lr_factor)
    factors = {} if layer_decay is None else layer_decay_factors(model, layer_decay)
    free = _free_of_weight_decay(model, plan, no_weight_decay)
    found: dict[tuple[str, bool, float], list[Tensor]] = {}
    trainable = [p for p in plan.names if p.requires_grad]
    for kind, own, params in (
        ("pom", 1.0, [p for p in trainable if p in plan.weights]),
        ("euclidean", euclidean_lr_factor or 1.0, [p for p in trainable if p not in plan.weights]),
    ):
        for p in params:
            found.setdefault((kind, p in free, own * factors.get(p, 1.0)), []).append(p)
    groups = []
    for (kind, is_free, factor), params in found.items():
        group: dict[str, Any] = {"params": params, "name": kind}
        if is_free:
            group |= {"weight_decay": 0.0, "name": f"{kind}, no weight decay"}
        if factor != 1.0:
            group |= {"lr_factor": factor, "name": f"{group['name']}, lr x {factor:.3g}"}
        groups.append(group)
    return groups


def _free_of_weight_decay(model: nn.Module, plan: POMPlan, which: bool | Sequence[str]) -> set[Tensor]:
    if which is False:
        return set()
    if which is not True:
        return Selector(model, *_parameters(model)).find("no_weight_decay", which)
    free = {p for p in plan.names if p.ndim <= 1 or plan.reasons.get(p) in ("bias", "norm", "gain")}
    for module in model.modules():
        exempt: Any = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            listed = exempt()
            free |= {p for name, p in module.named_parameters() if name in listed}
    return free


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer's draws."""
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63

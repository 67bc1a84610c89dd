"""The methods that the experiments compare: FG-SGD, and what it is measured against.

Each baseline is a function of the network and its options that returns a torch optimizer, or, where the method changes the
network's parameters (weight normalisation, geoopt), changes them first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import Optimizer

from lightning_fgsgd import FGSGD, pom_param_groups

CONSTRAINABLE = (nn.Conv2d, nn.Linear)


def sgd(
    net: nn.Module,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    decay_kernels: bool = True,
    decay: str = "all",
    head_alone: bool = False,
    unit_rows: bool = False,
) -> Optimizer:
    """torch's SGD; with ``layer_decay``, timm's rates that fall from the head to the input.

    Args:
        net: the network.
        lr, momentum, nesterov, weight_decay: of ``torch.optim.SGD``.
        layer_decay: factor of the rate from each layer to the one before it; timm's groups decay no 1-d parameter.
        decay_kernels: whether weight decay acts on the kernels and matrices of all layers but the head.
        decay: ``"all"``, or ``"head"``: weight decay acts on the classifier alone.
        head_alone: train the classifier on the features as they are.
        unit_rows: start with each output channel's weights of norm 1, as ``start="project"`` does on spheres: tells what a
            start is worth from what the manifolds are.
    """
    if unit_rows:
        for layer in constrainable(net):
            with torch.no_grad():
                layer.weight.div_(layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.ndim - 1)))
    if decay not in ("all", "head"):
        raise ValueError(f"decay: unknown choice {decay!r}; choose from 'all', 'head'")
    groups: Any = net.parameters()
    if decay == "head":
        if not decay_kernels or head_alone:
            raise ValueError("decay: head goes with no decay_kernels or head_alone; it has one rule")
        return torch.optim.SGD(_head_alone_decayed(net, lr, weight_decay, layer_decay), lr, momentum, nesterov=nesterov)
    if head_alone:
        if layer_decay is not None or not decay_kernels:
            raise ValueError(
                "head_alone: true goes with no layer_decay and no decay_kernels: false; there is one layer"
            )
        net.requires_grad_(False)
        groups = list(head_of(net).requires_grad_(True).parameters())
    if not decay_kernels:
        if layer_decay is not None:
            raise ValueError("decay_kernels: false goes with no layer_decay")
        kernels = [layer.weight for layer in constrainable(net)]
        rest = [p for p in net.parameters() if not any(p is w for w in kernels)]
        groups = [{"params": kernels, "weight_decay": 0.0}, {"params": rest}]
    if layer_decay is not None:
        groups = param_groups_layer_decay(net, weight_decay, layer_decay=layer_decay)
        groups = [{"params": g["params"], "lr": lr * g["lr_scale"], "weight_decay": g["weight_decay"]} for g in groups]
    return torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)


class L2SP(torch.optim.SGD):
    """SGD that decays each weight towards where it started (L2-SP, Li et al. 2018), and new ones towards 0.

    Args:
        params: as of ``torch.optim.SGD``.
        alpha: strength of the pull towards the start: alpha * (w − w⁰) is added to the gradient.
        new: parameters with no start to keep; ``weight_decay`` acts on them alone.
        options: of ``torch.optim.SGD``.
    """

    def __init__(self, params: Any, *, alpha: float, new: Collection[Tensor], **options: Any) -> None:
        super().__init__(params, **options)
        self.alpha = alpha
        self._starts = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"] if p not in new]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's gradients are those that the pull is added to."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for p, start in self._starts:
                if p.grad is not None:
                    p.grad.add_(p - start, alpha=self.alpha)
        super().step()
        return loss


def l2sp(
    net: nn.Module,
    lr: float,
    alpha: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
) -> Optimizer:
    """SGD with a pull of strength ``alpha`` towards the pretrained weights; ``weight_decay`` is of the new head alone."""
    head = set(head_of(net).parameters())
    groups = _head_alone_decayed(net, lr, weight_decay, layer_decay)
    return L2SP(groups, alpha=alpha, new=head, lr=lr, momentum=momentum, nesterov=nesterov)


def _head_alone_decayed(
    net: nn.Module, lr: float, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Groups in which weight decay is the classifier's alone, with timm's rates by layer where ``layer_decay`` is given."""
    head = set(head_of(net).parameters())
    scales: dict[Tensor, float] = {}
    if layer_decay is not None:
        by_layer = param_groups_layer_decay(net, layer_decay=layer_decay)
        scales = {p: group["lr_scale"] for group in by_layer for p in group["params"]}
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for p in net.parameters():
        groups.setdefault((scales.get(p, 1.0), p in head), []).append(p)
    return [
        {"params": params, "lr": lr * scale, "weight_decay": weight_decay if new else 0.0}
        for (scale, new), params in groups.items()
    ]


def weight_norm(net: nn.Module, **options: Any) -> Optimizer:
    """torch's SGD on weights written as w = g v/‖v‖ by output channel (Salimans & Kingma 2016); not the head's."""
    for layer in constrainable(net):
        parametrizations.weight_norm(layer)
    return sgd(net, **options)


def adamw(net: nn.Module, lr: float, weight_decay: float = 0.01) -> Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW(net.parameters(), lr, weight_decay=weight_decay)


def muon(
    net: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    adamw_lr: float = 1e-3,
    held: int | None = None,
) -> Optimizer:
    """timm's Muon on the kernels and matrices of all layers but the head, its AdamW on the rest.

    Args:
        net: the network.
        lr, weight_decay, momentum: of ``timm.optim.Muon``.
        adamw_lr: of the rest.
        held: hold blocks of so many filters on Stiefel manifolds with R = 1, at the nearest point after each step: tells
            what of Muon is its step, and what the weights' freedom. Weight decay is the rest's alone then.
    """
    try:
        from timm.optim import Muon  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        raise ImportError("method: muon needs a timm that has timm.optim.Muon, 1.0.20 or newer") from error
    weights = [layer.weight for layer in constrainable(net)]
    rest = [p for p in net.parameters() if not any(p is w for w in weights)]
    groups: list[dict[str, Any]] = [
        # Said outright: left to judge by the shape, it hands weights of one input channel (a stem on grey images) to AdamW.
        {"params": weights, "use_muon": True, "weight_decay": 0.0 if held else weight_decay},
        {"params": rest, "use_muon": False, "lr": adamw_lr},
    ]
    optimizer: Optimizer = Muon(groups, lr=lr, weight_decay=weight_decay, momentum=momentum)
    if held:
        blocks = pom_param_groups(net, cutting="filter", block_size=held, manifolds=["stiefel"], start="project")
        manifolds = FGSGD(blocks)
        optimizer.register_step_post_hook(lambda *_: manifolds.project())
    return optimizer


class _Reshaped(nn.Module):
    """The weight of a layer from an n x p matrix with orthonormal columns: (D, fan-in), turned where D <= fan-in."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.turned = weight[0].numel() >= len(weight)

    def forward(self, matrix: Tensor) -> Tensor:
        return (matrix.mT if self.turned else matrix).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        matrix = weight.reshape(len(weight), -1)
        return matrix.mT if self.turned else matrix


def geoopt_stiefel(net: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """geoopt's RiemannianSGD with the whole weight of each layer but the head on a Stiefel manifold."""
    import geoopt

    manifold = geoopt.EuclideanStiefel()
    weights: list[Tensor] = []
    for layer in constrainable(net):
        parametrize.register_parametrization(layer, "weight", _Reshaped(layer.weight))
        held: Any = layer.parametrizations
        matrix = manifold.projx(held.weight.original.detach().clone().contiguous())
        held.weight.original = geoopt.ManifoldParameter(matrix, manifold=manifold)
        weights.append(held.weight.original)
    rest = [p for p in net.parameters() if not any(p is w for w in weights)]
    groups = [{"params": weights}, {"params": rest, "weight_decay": weight_decay}]
    optimizer: Optimizer = geoopt.optim.RiemannianSGD(groups, lr=lr, momentum=momentum, stabilize=10)
    return optimizer


BASELINES: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "l2sp": l2sp,
    "weight_norm": weight_norm,
    "adamw": adamw,
    "muon": muon,
    "geoopt_stiefel": geoopt_stiefel,
}


def split_off_the_rest(net: nn.Module, optimizer: Optimizer) -> None:
    """Put what FG-SGD leaves unconstrained (head, norms, biases) into groups of its own, named as FG-SGD's are.

    A baseline can then have two learning rates where FG-SGD has: ``lr_factor`` of such a group says by what ``layer_decay``
    multiplies its rate. All that a weight is computed from (weight normalisation's g and v) counts as the weight.

    Raises:
        ValueError: nothing but the rest is trained, and its rate would be the only one.
    """
    weights = {p for layer in constrainable(net) for p in weights_of(layer)}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        factor = group["lr"] / optimizer.defaults["lr"]
        rest = {"name": f"euclidean {len(groups)}", "lr_factor": factor}
        for held, more in ((True, {}), (False, rest)):
            params = [p for p in group["params"] if (p in weights) == held]
            if params:
                groups.append({**group, "params": params, **more})
    if all("lr_factor" in group for group in groups):
        raise ValueError("euclidean_lr: nothing is trained but what it is for; give lr alone")
    optimizer.param_groups[:] = groups


def weights_of(layer: Any) -> list[Tensor]:
    """The parameters that a layer's weight is: itself, or what it is computed from where it is parametrized."""
    if parametrize.is_parametrized(layer, "weight"):
        return list(layer.parametrizations.weight.parameters())
    return [layer.weight]


def head_of(net: nn.Module) -> nn.Module:
    """The classifier of a timm model."""
    return net.get_classifier()  # type: ignore[operator]


def constrainable(net: nn.Module) -> list[Any]:
    """The layers whose weights FG-SGD constrains by default: convolutions and Linear layers but the classifier."""
    head = set(head_of(net).modules())
    return [m for m in net.modules() if isinstance(m, CONSTRAINABLE) and m not in head]

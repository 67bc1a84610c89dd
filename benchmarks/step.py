"""``python -m benchmarks.step``: a step of FGSGD beside torch.optim.SGD, Muon, geoopt and an orthogonal parametrization.

All arms are timed in turn, round by round, in one process; every ratio is to SGD with momentum in the same round. The
roofline is what the bytes that a step must move (five tensors of the weights' size for SGD, seven for FGSGD) take at the
bandwidth of a plain copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks import harness
from lightning_fgsgd import FGSGD, pom_param_groups

MODELS = (
    "resnet18",
    "resnet50",
    "tf_efficientnet_lite0",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
)
MIX = ("sphere", "oblique", "stiefel")


def with_gradients(model: nn.Module, scale: float = 1e-3) -> nn.Module:
    """A copy of a model, with gradients."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)
    return model


def fgsgd(model: nn.Module, fused: bool, **settings: Any) -> Callable[[], Any]:
    """A step of FGSGD with momentum on a copy of a model."""
    mine = with_gradients(model)
    return FGSGD(pom_param_groups(mine, **settings), lr=1e-3, momentum=0.9, fused=fused).step


def peers(model: nn.Module, muon: bool = True) -> dict[str, Callable[[], Any]]:
    """Steps of torch's SGD, and of Muon on the weights of Linear layers."""
    mine = with_gradients(model)
    arms: dict[str, Callable[[], Any]] = {
        "torch SGD": torch.optim.SGD(mine.parameters(), lr=1e-3, momentum=0.9, foreach=True).step
    }
    linear = [m.weight for m in with_gradients(model).modules() if isinstance(m, nn.Linear)]
    if muon and len(linear) > 1 and hasattr(torch.optim, "Muon"):
        arms["torch Muon, Linear weights only"] = torch.optim.Muon(linear, lr=1e-3).step
    return arms


def ours(model: nn.Module, eager: bool) -> dict[str, Callable[[], Any]]:
    """Steps of FGSGD: each manifold, the mix, its starts."""
    arms = {
        "FGSGD mix, project": fgsgd(model, True, manifolds=MIX, start="project"),
        "FGSGD mix, preserve": fgsgd(model, True, manifolds=MIX, start="preserve"),
    }
    for manifold in MIX:
        arms[f"FGSGD {manifold}, project"] = fgsgd(model, True, manifolds=(manifold,), start="project")
    if eager:
        arms["FGSGD mix, project, fused=False"] = fgsgd(model, False, manifolds=MIX, start="project")
    return arms


def kernels(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Steps on the 3x3 kernels of a model alone: ours, geoopt's, and torch's orthogonal parametrization with its passes."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    weights: list[Tensor] = [m.weight.detach() for m in convolutions]
    layers = nn.ModuleList([nn.Conv2d(w.shape[1], w.shape[0], 3, bias=False) for w in weights])
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    arms = {
        "torch SGD": torch.optim.SGD(with_gradients(layers).parameters(), lr=1e-3, momentum=0.9, foreach=True).step,
        "FGSGD stiefel": fgsgd(layers, True, manifolds=("stiefel",), start="project"),
    }
    try:
        import geoopt
    except ModuleNotFoundError:
        print("geoopt is not installed; its row is left out")
    else:
        manifold = geoopt.EuclideanStiefel()
        params = [geoopt.ManifoldParameter(manifold.projx(w.clone()), manifold=manifold) for w in weights]
        for p in params:
            p.grad = 1e-3 * torch.randn_like(p)
        arms["geoopt RiemannianSGD, Stiefel"] = geoopt.optim.RiemannianSGD(params, lr=1e-3, momentum=0.9).step
    for orthogonal_map in ("matrix_exp", "cayley"):  # torch's default for square matrices, and the fastest of the three
        arms[f"parametrizations.orthogonal ({orthogonal_map}) and SGD"] = _parametrized(weights, orthogonal_map)
    return arms


def _parametrized(weights: list[Tensor], orthogonal_map: str) -> Callable[[], Any]:
    """Forward and backward of torch's orthogonal parametrization, and a step of SGD."""

    class Holder(nn.Module):
        def __init__(self, w: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(w.clone())

    holders = [nn.utils.parametrizations.orthogonal(Holder(w), orthogonal_map=orthogonal_map) for w in weights]
    grads = [1e-3 * torch.randn_like(w) for w in weights]
    params = [p for h in holders for p in h.parameters()]
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        for holder, grad in zip(holders, grads, strict=True):
            weight: Any = holder.weight  # computed here, from the parameter behind it
            weight.backward(grad)
        optimizer.step()

    return step


def roofline(model: nn.Module, arm: str, bandwidth: float) -> float | None:
    """Milliseconds that the bytes of a step take."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    passes = 5 if arm == "torch SGD" else 7 if arm.startswith("FGSGD") else None
    return None if passes is None else 1000 * passes * size / bandwidth


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--models", nargs="+", default=list(MODELS))
    options.add_argument("--no-eager", action="store_true", help="leave out fused=False")
    options.add_argument(
        "--no-muon", action="store_true", help="leave out Muon, which is very slow where products in bfloat16 are"
    )
    options.add_argument(
        "--no-kernels", action="store_true", help="leave out the 3x3 kernels of ResNet-18 on their own"
    )
    args = options.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    bandwidth = harness.copy_bandwidth(device)
    print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s")
    found: list[dict[str, Any]] = []
    where = harness.environment(device) | {"copy_bandwidth_GBps": bandwidth / 1e9}
    for name in args.models:
        for layout in ("channels_last", "contiguous"):
            model = timm.create_model(name).to(device)
            convolutional = any(isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3 for m in model.modules())
            if layout == "channels_last":
                if not convolutional:
                    continue
                model.to(memory_format=torch.channels_last)
            arms = {**peers(model, not args.no_muon), **ours(model, not args.no_eager and device.type == "cpu")}
            rows = harness.rows(harness.interleaved(arms, args.rounds, device), "torch SGD", model=name, layout=layout)
            for row in rows:
                row["roofline_ms"] = roofline(model, row["arm"], bandwidth)
            found += rows
            print(harness.table(rows, COLUMNS), flush=True)
            harness.write(args.out, "step", found, where)
    if not args.no_kernels:
        arms = kernels(timm.create_model("resnet18").to(device))
        rows = harness.rows(
            harness.interleaved(arms, args.rounds, device),
            "torch SGD",
            model="3x3 kernels of resnet18",
            layout="channels_last",
        )
        found += rows
        print(harness.table(rows, COLUMNS))
    harness.write(args.out, "step", found, where)
    _figure(found, args.out / "step.png")


COLUMNS = {"model": "", "layout": "", "arm": "", "ms": ".1f", "ratio": ".2f", "roofline_ms": ".1f"}


def _figure(found: list[dict[str, Any]], path: Any) -> None:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return
    labels = [f"{r['model']}, {r['layout']}: {r['arm']}" for r in found if r["arm"] != "torch SGD"]
    ratios = [r["ratio"] for r in found if r["arm"] != "torch SGD"]
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(labels) + 1), layout="constrained")
    axes.barh(labels[::-1], ratios[::-1])
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of a step over torch.optim.SGD's, same run")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""How even the curvature of each layer is while a network is trained: the same for every method.

By its Kronecker factors (K-FAC, Martens & Grosse 2015) the curvature of the weights of a layer is A ⊗ G, with A the second
moments of what the layer reads and G those of the loss's gradients with respect to what it gives. Where both are multiples
of the identity one rate suits all directions; where few of their eigenvalues are large, one that suits these is too small
for the others.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any, cast

from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import unfold

from recipes.experiments.methods import constrainable

CONDITIONING = ("inputs", "gradients", "curvature")


class Conditioning(Callback):
    """Keeps, for every epoch, how even the eigenvalues of the layers' A and G are, means over the layers but the head.

    Even is the share of the dimensions that a spectrum uses, (Σλ)² / (d Σλ²): 1 where all d eigenvalues are the same, 1/d
    where all but one are 0. It does not depend on the scale of weights, features or gradients. ``epochs`` holds a dict an
    epoch, of ``inputs``, that of A; ``gradients``, that of G, with the labels that are trained on; and ``curvature``, that
    of A ⊗ G, which is their product.

    Args:
        batches: how many of the last ones of each epoch are read, in the forward and backward passes of training.
    """

    def __init__(self, batches: int = 4) -> None:
        self.batches = batches
        self.epochs: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        self._layers = [layer for layer in constrainable(pl_module.net) if layer.weight.requires_grad]
        for layer in self._layers:
            if getattr(layer, "groups", 1) > 1:
                raise ValueError(
                    f"conditioning: for layers that read all channels, got {type(layer).__name__} with groups"
                )
            if type(layer) not in (nn.Linear, nn.Conv2d) or isinstance(getattr(layer, "padding", 0), str):
                raise ValueError(f"conditioning: for nn.Linear and nn.Conv2d with a padding in numbers, got {layer}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        first = max(int(trainer.num_training_batches) - self.batches, 0)
        if batch_idx < first:
            return
        if batch_idx == first:
            self._moments: dict[tuple[nn.Module, str], Tensor] = {}
        self._hooks = [layer.register_forward_hook(self._read, prepend=True) for layer in self._layers]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        for hook in getattr(self, "_hooks", []):
            hook.remove()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        even = {key: evenness(moments) for key, moments in self._moments.items()}
        called = [layer for layer in self._layers if (layer, "gradients") in even]
        by_layer = [(even[layer, "inputs"], even[layer, "gradients"]) for layer in called]
        inputs, gradients = (fmean(side) for side in zip(*by_layer, strict=True))
        curvature = fmean(a * g for a, g in by_layer)
        self.epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                "inputs": inputs,
                "gradients": gradients,
                "curvature": curvature,
            }
        )

    def _read(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._add((layer, "inputs"), rows_read(layer, args[0].detach()))
        output.register_hook(lambda grad: self._add((layer, "gradients"), rows_given(layer, grad)))

    def _add(self, key: tuple[nn.Module, str], rows: Tensor) -> None:
        rows = rows.double()
        self._moments[key] = self._moments.get(key, 0) + rows.mT @ rows


def rows_read(layer: nn.Module, features: Tensor) -> Tensor:
    """What the weights of a Linear layer or a convolution are multiplied by, (places, fan-in)."""
    if not isinstance(layer, nn.Conv2d):
        return features.flatten(0, -2)
    kernel, dilation, padding, stride = (
        cast("tuple[int, int]", x) for x in (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    )
    patches = unfold(features, kernel, dilation, padding, stride)
    return patches.mT.flatten(0, 1)


def rows_given(layer: nn.Module, features: Tensor) -> Tensor:
    """What a layer gives, or its gradients, (places, out channels)."""
    return features.flatten(2).mT.flatten(0, 1) if isinstance(layer, nn.Conv2d) else features.flatten(0, -2)


def evenness(moments: Tensor) -> float:
    """(Σλ)² / (d Σλ²) of the eigenvalues of a symmetric matrix (d, d); 0 where it is 0."""
    return float(moments.trace().square() / (len(moments) * moments.square().sum()).clamp_min(1e-300))

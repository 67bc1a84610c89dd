"""How the filters of a network turn while it is trained, and what becomes of them: the same for every method.

A filter is what one output channel reads, a vector of the layer's fan-in. Where a norm follows the layer its length does not
matter to the output, and what a step does is to turn it: the angle is the effective learning rate, of which weight decay is
one means (van Laarhoven 2017, Kosson et al. 2024) and a sphere another.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from recipes.experiments.methods import constrainable

TURNING = ("turn", "unsteady", "filters", "layers", "travel", "channels", "rank")


class Turning(Callback):
    """Keeps, for every epoch, what the layers but the head show on average. To be the last of the callbacks.

    ``epochs`` holds a dict an epoch, of

    - ``turn``: the angle by which a layer's median filter turns in a step, the mean of the steps, in degrees;
    - ``unsteady``: the deviation of a filter's angle from step to step, over its mean; 0 where all steps are alike;
    - ``filters``: the deviation of the filters' mean angles within a layer, over their mean; 0 where all turn alike;
    - ``layers``: the largest ``turn`` of a layer over the smallest; what rounding turns is about 1e-6°, so above a
      thousand a layer stands still;
    - ``travel``: the angle between a median filter at the start of the epoch and at its end, in degrees;
    - ``channels``: the share of the input channels that a filter of kernels larger than 1 x 1 makes use of,
      (Σ‖κ‖²)² / (C Σ‖κ‖⁴) over its C kernels κ: 1 where all have the same norm, 1/C where one alone is not 0;
    - ``rank``: the share of the dimensions that D filters of norm 1 use, (Σσ²)² / (min(D, fan-in) Σσ⁴) over their singular
      values σ: 1 where they are orthogonal (or a tight frame), next to 0 where all are the same.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._layers: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        self._layers = constrainable(pl_module.net)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        self._steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        # After the callbacks before this one: a rescale, which turns filters of kernels, is no part of a step.
        self._last = [directions(layer.weight) for layer in self._layers]
        if self._steps == 0:
            self._first = self._last
            self._sums = [torch.zeros(2, len(filters), device=filters.device) for filters in self._first]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        now = [directions(layer.weight) for layer in self._layers]
        for sums, before, after in zip(self._sums, self._last, now, strict=True):
            angles = angle(before, after)
            sums += torch.stack([angles, angles.square()])
        self._last, self._steps = now, self._steps + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        means = [sums[0] / self._steps for sums in self._sums]
        deviations = [
            (sums[1] / self._steps - mean.square()).clamp_min(0).sqrt()
            for sums, mean in zip(self._sums, means, strict=True)
        ]
        medians = [float(mean.median()) for mean in means]
        weights = [layer.weight.detach() for layer in self._layers]
        kernels = [w for w in weights if w.ndim > 2 and w.shape[1] > 1 and w[0, 0].numel() > 1]
        self.epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                "turn": math.degrees(fmean(medians)),
                "unsteady": fmean(_over(d, m) for d, m in zip(deviations, means, strict=True)),
                "filters": fmean(_over(mean.std(correction=0), mean) for mean in means),
                "layers": max(medians) / min(medians) if min(medians) > 0 else math.inf,
                "travel": math.degrees(
                    fmean(float(angle(a, b).median()) for a, b in zip(self._first, self._last, strict=True))
                ),
                "channels": fmean(float(channels(w).mean()) for w in kernels) if kernels else math.nan,
                "rank": fmean(rank(filters) for filters in self._last),
            }
        )


def directions(weight: Tensor) -> Tensor:
    """The filters of a weight, each of norm 1: (D, fan-in) in float32. A copy."""
    filters = weight.detach().flatten(1).float()
    return filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-30)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles between rows of norm 1, in radians; by the chord, for the cosine of a small angle is 1 in float32."""
    return 2 * ((a - b).norm(dim=1) / 2).clamp_max(1).asin()


def channels(weight: Tensor) -> Tensor:
    """Share of the input channels that each filter of (D, C, *kernel) makes use of, (D,)."""
    squares = weight.flatten(2).square().sum(-1)
    return squares.sum(1).square() / (squares.shape[1] * squares.square().sum(1)).clamp_min(1e-30)


def rank(filters: Tensor) -> float:
    """Share of the dimensions that filters, (D, fan-in), use."""
    wide = len(filters) < filters.shape[1]
    gram = filters @ filters.mT if wide else filters.mT @ filters
    return float(gram.trace().square() / (len(gram) * gram.square().sum()).clamp_min(1e-30))


def _over(deviation: Tensor, mean: Tensor) -> float:
    """Mean deviation over mean."""
    return float(deviation.mean() / mean.mean().clamp_min(1e-30))

"""A streaming standard deviation per channel, as a torchmetrics metric: λ of the paper."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_fgsgd.manifolds.base import wide

__all__ = ["FeatureStd", "merge_moments", "of_processes", "own_part", "standard_deviation"]

_ROWS = 256  # numbers that are added up in float32, one after the other: what is lost is well within 1e-6


class FeatureStd(Metric):
    """Standard deviation of each channel of a stream of feature tensors, in constant memory.

    The state is one tensor (3, channels): count, mean and sum of squared deviations. Batches, processes and merged metrics
    are all joined by the formula of Chan, Golub and LeVeque, which keeps its accuracy where the mean is large beside the
    deviation. Nothing is read back to the host before :meth:`compute`.

    Args:
        channels: number of channels.
        pools: pool the channels into this many equal runs, as a conv group's fan-in; None keeps every channel apart.
        kwargs: as in ``torchmetrics.Metric``.

    Raises:
        ValueError: ``pools`` does not divide ``channels``.

    Example::

        std = FeatureStd(3)
        for images in loader:      # (N, 3, H, W)
            std.update(images, dim=1)
        std.compute()              # (3,)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    moments: Tensor

    def __init__(self, channels: int, pools: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pools = channels if pools is None else pools
        if self.pools < 1 or channels % self.pools:
            raise ValueError(f"pools: {pools!r} does not divide {channels} channels into equal runs")
        self.set_dtype(torch.float64)
        self.add_state("moments", torch.zeros(3, channels, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, features: Tensor, dim: int = 1) -> None:
        """Add a batch of features, any shape with the channels along ``dim``."""
        if features.numel() == 0:
            return
        if features.dtype not in (torch.float32, torch.float64):  # half precision, or images as bytes
            features = features.float()
        if features.ndim == 1:  # one vector is a batch of one
            features, dim = features[None], 1
        channels_last = features.movedim(dim, -1)
        parts = _of_rows(channels_last)
        parts = _of_any(channels_last) if parts is None else parts
        self.moments = merge_moments(torch.cat([self.moments[None], parts.to(self.moments)]))

    def compute(self) -> Tensor:
        """Standard deviation (population, not sample) of each channel or pool; NaN where nothing was read."""
        return standard_deviation(self.moments, self.pools)


def _of_rows(features: Tensor) -> Tensor | None:
    """Moments of parts of features (..., channels) that lie so in a CPU's memory, (parts, 3, channels); None elsewhere.

    By the sums of torch's own batch norm, which look twice and copy nothing: in less than half the time of :func:`_of_any`.
    They add up in float32, one number after the other; so neighbouring rows count as one row of more channels, of which few
    are added. None where a mean is too large beside its deviation for that.
    """
    if features.device.type != "cpu" or not features.is_contiguous():
        return None
    rows = features.reshape(-1, features.shape[-1])
    whole = len(rows) // _ROWS * _ROWS
    found = []
    for part, height in ((rows[:whole], _ROWS), (rows[whole:], len(rows) - whole)):
        if len(part):
            moments = torch.batch_norm_update_stats(part.reshape(height, -1), None, None, 1.0)
            mean, variance = (x.double().view(-1, features.shape[-1]) for x in moments)
            if bool((mean.square() > 1e3 * variance).any()):
                return None
            found.append(torch.stack([torch.full_like(mean, height), mean, height * variance], 1))
    return torch.cat(found)


def _of_any(features: Tensor) -> Tensor:
    """Moments of any features (..., channels), (1, 3, channels)."""
    others = list(range(features.ndim - 1))
    # A value of each channel is taken off first: the mean may be so large that float32 cannot hold it precisely enough.
    pivot = features[tuple(slice(1) for _ in others)]
    # Two sums, the second of squares about the mean: as precise as torch.var_mean, which takes several times as long.
    shifted = features - pivot
    mean = shifted.mean(others, keepdim=True)
    squares = wide(shifted.sub_(mean).square_().sum(others))
    count = torch.full_like(squares, features.numel() // len(squares))
    return torch.stack([count, (wide(mean) + wide(pivot)).flatten(), squares])[None]


def standard_deviation(moments: Tensor, pools: int) -> Tensor:
    """Standard deviation of each of ``pools`` equal runs of channels, from moments (3, channels)."""
    pooled = merge_moments(moments.reshape(3, pools, -1).permute(2, 0, 1))
    return (pooled[2] / pooled[0]).sqrt()


def merge_moments(moments: Tensor) -> Tensor:
    """Join counts, means and sums of squared deviations, (parts, 3, channels) -> (3, channels)."""
    count, mean, squares = moments.unbind(1)
    total = count.sum(0)
    weight = count / total.clamp_min(1)
    joint = (weight * mean).sum(0)
    return torch.stack([total, joint, (squares + count * (mean - joint).square()).sum(0)])


def of_processes(x: Tensor) -> Tensor:
    """A tensor of every process, (processes, ...), the same in all of them. Called by all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return x[None]
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return torch.stack(found)


def own_part(moments: Tensor) -> Tensor:
    """With what this process goes on of the moments of every process (processes, 3, channels).

    Its own where there are as many processes as there were; otherwise the first has those of all, and the others none.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    if len(moments) == processes:
        return moments[rank]
    joined = merge_moments(moments)
    return joined if rank == 0 else torch.zeros_like(joined)

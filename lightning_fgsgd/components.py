"""How a layer's weight is cut into components, the n x p matrices that live on manifolds.

Two cuttings. ``"kernel"``, the paper's: the A x B kernel of one output and one input channel. ``"filter"``: a block of
p output neurons seen as an n x p matrix, n the fan-in. Where A = B = 1 a kernel would be a single number, so Linear
layers and 1x1 convolutions are always cut into blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["CUTTINGS", "Cutting", "cutting_of"]

CUTTINGS = ("kernel", "filter")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Cutting:
    """A way to see one weight as a batch of k components of n x p, and back.

    Attributes:
        kind: ``"kernel"`` or ``"filter"``.
        shape: shape of the weight, (out, in per conv group, *kernel), or (in, out per conv group, *kernel) where
            ``transposed``.
        conv_groups: the ``groups`` of a convolution, 1 for Linear.
        transposed: whether it is the weight of a transposed convolution.
        n, p: shape of a component, n >= p.
    """

    kind: str
    shape: tuple[int, ...]
    conv_groups: int
    transposed: bool
    n: int
    p: int

    @property
    def count(self) -> int:
        """Number of components, k."""
        return math.prod(self.shape) // (self.n * self.p)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size; () for Linear."""
        return self.shape[2:]

    @property
    def out_channels(self) -> int:
        """Output channels of the layer, D."""
        return self.shape[1] * self.conv_groups if self.transposed else self.shape[0]

    @property
    def in_channels(self) -> int:
        """Input channels of the layer, C (of all conv groups together)."""
        return self.shape[0] if self.transposed else self.shape[1] * self.conv_groups

    @property
    def fan_in(self) -> int:
        """Weights that meet in one output neuron: C·A·B, C within the conv group."""
        return self.in_channels // self.conv_groups * math.prod(self.kernel)

    def cut(self, weight: Tensor) -> Tensor:
        """The components of ``weight``, shape (k, n, p): a view where the strides allow it, a copy elsewhere."""
        if self.kind == "kernel":
            x = weight.reshape(self.shape[0] * self.shape[1], *_matrix(self.kernel))
            return x.mT if x.shape[-2] < x.shape[-1] else x
        return self._output_first(weight).reshape(-1, self.p, self.n).mT

    def join(self, components: Tensor) -> Tensor:
        """The weight whose components are ``components`` (k, n, p): the inverse of :meth:`cut`."""
        if self.kind == "kernel":
            rows, columns = _matrix(self.kernel)
            return (components.mT if rows < columns else components).reshape(self.shape)
        rows_first = components.mT.reshape(self.out_channels, self.fan_in)
        if not self.transposed:
            return rows_first.reshape(self.shape)
        per_group = (self.conv_groups, self.shape[1], self.shape[0] // self.conv_groups, *self.kernel)
        return rows_first.reshape(per_group).transpose(1, 2).reshape(self.shape)

    def _output_first(self, weight: Tensor) -> Tensor:
        """One row per output neuron, (D, fan-in)."""
        if self.transposed:
            per_group = (self.conv_groups, self.shape[0] // self.conv_groups, self.shape[1], *self.kernel)
            weight = weight.reshape(per_group).transpose(1, 2)
        return weight.reshape(self.out_channels, self.fan_in)

    def input_channel(self) -> Tensor | None:
        """Input channel that each component reads, shape (k,); None for blocks, which read a whole fan-in."""
        if self.kind == "filter":
            return None
        first, second = self.shape[:2]
        if self.transposed:
            return torch.arange(first).repeat_interleave(second)
        conv_group = torch.arange(first) // (first // self.conv_groups)
        return (conv_group[:, None] * second + torch.arange(second)).flatten()

    def output_channel(self) -> Tensor | None:
        """Output channel that each component writes, shape (k,); None for blocks, which write p of them."""
        if self.kind == "filter":
            return None
        first, second = self.shape[:2]
        if not self.transposed:
            return torch.arange(first).repeat_interleave(second)
        conv_group = torch.arange(first) // (first // self.conv_groups)
        return (conv_group[:, None] * second + torch.arange(second)).flatten()

    def conv_group(self) -> Tensor:
        """Conv group that each component belongs to, shape (k,)."""
        return torch.arange(self.count) // (self.count // self.conv_groups)


def cutting_of(module: nn.Module, kind: str = "kernel", block_size: int = 16) -> Cutting | None:
    """The cutting of ``module.weight``, or None where ``module`` is not a Linear layer or a convolution.

    Args:
        module: the layer.
        kind: ``"kernel"`` or ``"filter"``, for k x k convolutions. Where the kernel is a single weight it is
            ``"filter"`` always.
        block_size: largest number of output neurons in a block. p is the largest divisor of the outputs (of one conv
            group: a block does not mix neurons that read different inputs) that is at most ``block_size`` and the
            fan-in, so that no block is ragged.
    """
    if isinstance(module, nn.Linear):
        shape, conv_groups, transposed = tuple(module.weight.shape), 1, False
    elif isinstance(module, (*_CONVS, *_TRANSPOSED_CONVS)):
        shape, conv_groups = tuple(module.weight.shape), module.groups
        transposed = isinstance(module, _TRANSPOSED_CONVS)
    else:
        return None
    kernel = shape[2:]
    if kind == "kernel" and math.prod(kernel) > 1:
        rows, columns = _matrix(kernel)
        return Cutting(kind, shape, conv_groups, transposed, max(rows, columns), min(rows, columns))
    outputs, inputs = (shape[1], shape[0] // conv_groups) if transposed else (shape[0] // conv_groups, shape[1])
    n = inputs * math.prod(kernel)
    p = max(d for d in range(1, min(block_size, n, outputs) + 1) if outputs % d == 0)
    return Cutting("filter", shape, conv_groups, transposed, n, p)


def _matrix(kernel: tuple[int, ...]) -> tuple[int, int]:
    """A kernel as a matrix: its last axis against all others; a 1-d kernel is one column."""
    if len(kernel) == 1:
        return kernel[0], 1
    return math.prod(kernel[:-1]), kernel[-1]

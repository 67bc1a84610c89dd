"""How a layer's weight is cut into components, the n x p matrices that live on manifolds.

Two cuttings. ``"kernel"``, the paper's: the A x B kernel of one output and one input channel. ``"filter"``: a block of
p output neurons seen as an n x p matrix, n the fan-in. Where A = B = 1 a kernel would be a single number, so Linear
layers and 1x1 convolutions are always cut into blocks.

A module may hold several weights (an LSTM: one for the input and one for the hidden state, four gates each), and a weight
several layers (the experts of timm's CondConv2d); :func:`cutting_of` knows them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "CUTTINGS", "Cutting", "cutting_of"]

CUTTINGS = ("kernel", "filter")

Device = torch.device | str

_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVS)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


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
        experts: how many weights of that shape are stored as the rows of one matrix (CondConv2d); None for one that is
            stored as it is.
    """

    kind: str
    shape: tuple[int, ...]
    conv_groups: int
    transposed: bool
    n: int
    p: int
    experts: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the parameter that holds the weight."""
        return self.shape if self.experts is None else (self.experts, math.prod(self.shape))

    @property
    def count(self) -> int:
        """Number of components, k."""
        return math.prod(self.stored) // (self.n * self.p)

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
            x = weight.reshape(-1, *_matrix(self.kernel))
            return x.mT if x.shape[-2] < x.shape[-1] else x
        return self._output_first(weight).reshape(-1, self.p, self.n).mT

    @property
    def small(self) -> bool:
        """Whether a component is so small (a kernel up to 7x7) that it is stored and compiled entry by entry."""
        return self.kind == "kernel" and self.n * self.p <= 49

    def view(self, weight: Tensor) -> Tensor | None:
        """The components as a view, (..., n, p), for geometry alone: None where the strides do not allow one.

        The components come in the order of :meth:`cut`, over two axes where one does not do. The rows of a block come in
        the order in which they lie in memory: that is the same for tensors of the same strides, and no manifold minds.
        """
        if self.kind == "kernel":
            rows, columns = _matrix(self.kernel)
            try:
                if weight.is_contiguous():
                    x = weight.view(-1, rows, columns)
                else:
                    x = weight.view(-1, self.shape[1], rows, columns)
            except RuntimeError:
                return None
            return x.mT if rows < columns else x
        if self.transposed:
            return None
        by_stride = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
        dense = weight.permute(0, *by_stride)
        return dense.view(-1, self.p, self.n).mT if dense.is_contiguous() else None

    def strides(self, weight: Tensor) -> tuple[int, int, int, int] | None:
        """Strides of :meth:`view`: of the two axes that count the components (the first alone, of blocks), of a component's
        rows and of its columns; None where there is no view.
        """
        view = self.view(weight)
        if view is None:
            return None
        first, *second = view.stride()[:-2]
        if not second:
            first, second = first * (1 if self.kind == "filter" else self.shape[1]), [first]
        return first, second[0], view.stride(-2), view.stride(-1)

    def join(self, components: Tensor) -> Tensor:
        """The weight whose components are ``components`` (k, n, p): the inverse of :meth:`cut`."""
        if self.kind == "kernel":
            rows, columns = _matrix(self.kernel)
            return (components.mT if rows < columns else components).reshape(self.stored)
        rows_first = components.mT
        if self.transposed:
            per_group = (self.conv_groups, self.shape[1], self.shape[0] // self.conv_groups, *self.kernel)
            rows_first = rows_first.reshape(per_group).transpose(1, 2)
        return rows_first.reshape(self.stored)

    def _output_first(self, weight: Tensor) -> Tensor:
        """One row per output neuron, (D, fan-in)."""
        if self.transposed:
            per_group = (self.conv_groups, self.shape[0] // self.conv_groups, self.shape[1], *self.kernel)
            weight = weight.reshape(per_group).transpose(1, 2)
        return weight.reshape(-1, self.fan_in)

    def input_channel(self, device: Device = "cpu") -> Tensor | None:
        """Input channel that each component reads, shape (k,); None for blocks, which read a whole fan-in."""
        if self.kind == "filter":
            return None
        return self._first_channel(device) if self.transposed else self._second_channel(device)

    def output_channel(self, device: Device = "cpu") -> Tensor | None:
        """Output channel that each component writes, shape (k,); None for blocks, which write p of them."""
        if self.kind == "filter":
            return None
        return self._second_channel(device) if self.transposed else self._first_channel(device)

    def _first_channel(self, device: Device) -> Tensor:
        """Of kernels: the channel that the weight's first axis counts."""
        return torch.arange(self.shape[0], device=device).repeat_interleave(self.shape[1]).repeat(self.experts or 1)

    def _second_channel(self, device: Device) -> Tensor:
        """Of kernels: the channel that the weight's second axis counts, within its conv group."""
        first, second = self.shape[:2]
        conv_group = torch.arange(first, device=device) // (first // self.conv_groups)
        return (conv_group[:, None] * second + torch.arange(second, device=device)).flatten().repeat(self.experts or 1)

    def reads(self, device: Device = "cpu") -> Tensor:
        """Number of the features that each component reads, shape (k,): its input channel, or the conv group of a block."""
        channel = self.input_channel(device)
        return self.conv_group(device) if channel is None else channel

    def conv_group(self, device: Device = "cpu") -> Tensor:
        """Conv group that each component belongs to, shape (k,)."""
        of_one = self.count // (self.experts or 1)
        return (torch.arange(of_one, device=device) // (of_one // self.conv_groups)).repeat(self.experts or 1)


def cutting_of(module: nn.Module, kind: str = "kernel", block_size: int = 16, attr: str = "weight") -> Cutting | None:
    """The cutting of a weight of ``module``, or None where ``module`` has no such weight.

    Weights are those of Linear layers, convolutions, recurrent layers and cells, ``nn.MultiheadAttention``, timm's
    CondConv2d, and, in a module of another class, a parameter called ``weight`` or ``..._weight`` with at least two axes
    (embeddings apart): it is taken for one that goes through ``F.linear`` or ``F.conv``, (out, in, *kernel).

    Args:
        module: the layer.
        kind: ``"kernel"`` or ``"filter"``, for k x k convolutions. Where the kernel is a single weight it is
            ``"filter"`` always.
        block_size: largest number of output neurons in a block. p is the largest divisor of the outputs (of one conv
            group, one gate of a recurrent layer, or the queries, keys or values of an ``in_proj_weight``: a block does not
            mix neurons that read different inputs or do different work) that is at most ``block_size`` and the fan-in, so
            that no block is ragged.
        attr: name of the parameter in ``module``.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None  # of which class the layer was, and so what its weight is, is not known any more
    weight = module._parameters.get(attr)
    if weight is None or not _is_weight(module, attr, weight):
        return None
    if weight.numel() == 0:
        return None
    shape, experts = tuple(weight.shape), None
    conv_groups, transposed = getattr(module, "groups", 1), isinstance(module, _TRANSPOSED_CONVS)
    if isinstance(module, CondConv2d):
        shape, experts = tuple(module.weight_shape), len(weight)
    elif len(shape) == 2 or not isinstance(conv_groups, int):
        conv_groups = 1
    kernel = shape[2:]
    if kind == "kernel" and math.prod(kernel) > 1:
        rows, columns = _matrix(kernel)
        return Cutting(kind, shape, conv_groups, transposed, max(rows, columns), min(rows, columns), experts)
    outputs, inputs = (shape[1], shape[0] // conv_groups) if transposed else (shape[0] // conv_groups, shape[1])
    if isinstance(module, _RECURRENT):
        outputs = getattr(module, "proj_size", 0) if attr.startswith("weight_hr") else module.hidden_size
    elif isinstance(module, nn.MultiheadAttention) and attr == "in_proj_weight":
        outputs //= 3
    n = inputs * math.prod(kernel)
    p = max(d for d in range(1, min(block_size, n, outputs) + 1) if outputs % d == 0)
    return Cutting("filter", shape, conv_groups, transposed, n, p, experts)


def _is_weight(module: nn.Module, attr: str, weight: Tensor) -> bool:
    if isinstance(module, (nn.Linear, *CONVOLUTIONS, CondConv2d)):
        return attr == "weight"
    if isinstance(module, _RECURRENT):
        return re.fullmatch(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?", attr) is not None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)) or "Norm" in type(module).__name__:
        return False
    return (attr == "weight" or attr.endswith("_weight")) and 2 <= weight.ndim <= 5


def _matrix(kernel: tuple[int, ...]) -> tuple[int, int]:
    """A kernel as a matrix: its last axis against all others; a 1-d kernel is one column."""
    if len(kernel) == 1:
        return kernel[0], 1
    return math.prod(kernel[:-1]), kernel[-1]

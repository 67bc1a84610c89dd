"""What a step does to one constrained weight, and by which path."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_fgsgd import eager, fused
from lightning_fgsgd.average import distance_to_average
from lightning_fgsgd.pom import POM, working_dtype
from lightning_fgsgd.sharding import add_up, opened, split_like
from lightning_fgsgd.step import Options
from lightning_fgsgd.stepsize import step_normalizer

__all__ = ["Update", "compiles", "undisturbed"]


def compiles(wanted: bool | None) -> bool:
    """Whether the compiled step is to be used: as ``wanted``, or where there is a compiler.

    Raises:
        RuntimeError: it is wanted, and there is none.
    """
    if wanted is False:
        return False
    reason = fused.available()
    if reason and wanted:
        raise RuntimeError(f"fused: True was asked for, but no C++ could be compiled here ({reason})")
    if reason and not _said:
        _said.append(reason)
        warnings.warn(
            f"FGSGD: no C++ could be compiled here ({reason}), so weights are stepped by torch's own operations, which "
            "takes several times as long; install a compiler (g++ or clang++), or pass fused=False to say that you know",
            stacklevel=4,
        )
    return not reason


_said: list[str] = []


@contextmanager
def undisturbed(weights: Iterable[Tensor]) -> Iterator[None]:
    """The geometry of ``weights`` keeps its precision, also where a step is taken under autocast (manual optimization)."""
    with ExitStack() as stack:
        for device in {p.device.type for p in weights}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass
class Update:
    """One weight in one step.

    Attributes:
        weight: the parameter.
        pom: its products of manifolds.
        group: its parameter group.
        state: its state, which a momentum buffer is put into.
        compiled: whether compiled code may be used.
        chunk: how many numbers the eager path works on at a time.
    """

    weight: Tensor
    pom: POM
    group: Mapping[str, Any]
    state: dict[str, Any]
    compiled: bool
    chunk: int

    def __post_init__(self) -> None:
        assert self.weight.grad is not None
        self.grad = split_like(self.weight.grad, self.weight)
        self._first = self.group["momentum"] != 0 and "momentum_buffer" not in self.state

    @property
    def _options(self) -> Options:
        group = self.group
        fresh = 1.0 if self._first else 1.0 - group["dampening"]
        return Options(-1.0 if group["maximize"] else 1.0, group["weight_decay"], group["lr"], group["momentum"], fresh)

    def _suits(self, *tensors: Any) -> bool:
        return self.compiled and fused.suits(self.pom, *tensors)

    def sums(self) -> Tensor:
        """Sums of ‖gradL(ω)‖² over the components of every group in this process, (G,): R_g² of Theorem 1."""
        with opened(self.pom.shard, self.weight, self.grad) as (weight, grad):
            args = self.pom, weight, grad, self.group["metric"], self._options
            if self._suits(weight, grad):
                return fused.group_squares(*args)
            return self.pom.group_sums(eager.squares(*args, self.chunk))

    def shares(self, sums: Tensor | None) -> Tensor:
        """1/𝔤 of every group, (G,) (Eq. 5), given R_g²; 1 without."""
        dtype = working_dtype(self.weight)
        if sums is None:
            return torch.ones(self.pom.num_groups, dtype=dtype, device=self.weight.device)
        rho, metric = self.group["rho"], self.group["metric"]
        if rho == "average":
            rho = self._distance_to_average().to(dtype)
        return 1 / step_normalizer(sums.sqrt().to(dtype), rho, self.pom.curvatures(metric))

    def _distance_to_average(self) -> Tensor:
        pom = self.pom
        if "average" not in self.state:
            self.state["average"] = torch.zeros_like(self.weight, dtype=working_dtype(self.weight))
        steps = self.state["averaged"] = self.state.get("averaged", 0) + 1
        with opened(pom.shard, self.weight, self.state["average"], write=True) as (weight, average):
            squares = distance_to_average(pom, weight, average, steps, self.group["metric"])
        if pom.shard is not None and pom.shard.spread:
            squares = add_up({0: (pom.shard, squares)})[0]
        return squares.sqrt()

    def move(self, shares: Tensor) -> Tensor:
        """Move the weight and its momentum; which components were moved, bool (k,).

        At a learning rate of 0 the weight stays as it is, also where it is not on its manifolds.
        """
        with opened(self.pom.shard, self.weight, self.grad, self._buffer(), write=True) as (weight, grad, buffer):
            weight = weight.clone() if self.group["lr"] == 0 else weight
            args = self.pom, weight, grad, buffer, shares, self.group["metric"], self._options, self.group["nesterov"]
            return fused.advance(*args) if self._suits(weight, grad, buffer) else eager.advance(*args, self.chunk)

    def move_far(self, shares: Tensor, moved: Tensor) -> None:
        """Move the components that :meth:`move` left, for their steps are longer than its retraction is made for."""
        with opened(self.pom.shard, self.weight, self.grad, self._buffer(), write=True) as (weight, grad, buffer):
            weight = weight.clone() if self.group["lr"] == 0 else weight
            args = self.pom, weight, grad, buffer, shares, self.group["metric"], self._options, self.group["nesterov"]
            eager.advance_far(*args, (~moved).nonzero()[:, 0])

    def move_freely(self, shares: Tensor) -> None:
        """Move a weight with Euclidean components only: torch's own SGD, on the gradient times ``shares``."""
        group, cutting = self.group, self.pom.cutting
        factors = shares[self.pom.sets.group.long()][:, None, None].expand(-1, cutting.n, cutting.p)
        options = {key: group[key] for key in ("momentum", "lr", "dampening", "nesterov", "foreach")}
        with opened(self.pom.shard, self.weight, self.grad, self._buffer(self.weight.dtype), write=True) as tensors:
            weight, grad, buffer = tensors
            grad = -grad if group["maximize"] else grad
            grad = grad.add(weight, alpha=group["weight_decay"]) if group["weight_decay"] else grad
            grad = torch.empty_like(weight).copy_(grad * cutting.join(factors))
            buffers = [None if self._first else buffer] if buffer is not None else []
            sgd([weight], [grad], buffers, weight_decay=0.0, maximize=False, fused=False, **options)
            if buffer is not None and self._first:
                buffer.copy_(buffers[0])

    def _buffer(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The momentum, laid out as the weight; in the precision of the geometry by default."""
        if self.group["momentum"] == 0:
            return None
        like, buffer = self.weight, self.state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=dtype or working_dtype(like))
        elif buffer.stride() != like.stride():
            buffer = torch.empty_like(like, dtype=buffer.dtype).copy_(buffer)
        self.state["momentum_buffer"] = buffer
        return buffer

"""What a step does to one constrained weight, and by which path."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_fgsgd import eager, fused
from lightning_fgsgd.average import distance_to_average
from lightning_fgsgd.pom import POM, working
from lightning_fgsgd.step import Options
from lightning_fgsgd.stepsize import step_normalizer

__all__ = ["Update", "compiles"]


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
        self.grad = self.weight.grad
        self.buffer = self.state.get("momentum_buffer") if self.group["momentum"] != 0 else None
        self._first = self.buffer is None
        self._fused = self.compiled and fused.suits(self.pom, self.weight, self.grad, self.buffer)

    @property
    def _options(self) -> Options:
        group = self.group
        fresh = 1.0 if self._first else 1.0 - group["dampening"]
        return Options(-1.0 if group["maximize"] else 1.0, group["weight_decay"], group["lr"], group["momentum"], fresh)

    def norms(self) -> Tensor:
        """R_g of every group, (G,) (Theorem 1)."""
        metric = self.group["metric"]
        if self._fused:
            return (
                fused.group_squares(self.pom, self.weight, self.grad, metric, self._options)
                .sqrt()
                .to(self.weight.dtype)
            )
        found = eager.squares(self.pom, self.weight, self.grad, metric, self._options, self.chunk)
        return self.pom.group_norms(found)

    def shares(self, norms: Tensor | None) -> Tensor:
        """1/𝔤 of every group, (G,) (Eq. 5); 1 without norms."""
        if norms is None:
            return working(self.weight).new_ones(self.pom.num_groups)
        rho, metric = self.group["rho"], self.group["metric"]
        if rho == "average":
            rho = distance_to_average(self.pom, self.weight, self.state, metric)
        return 1 / step_normalizer(norms, rho, self.pom.curvatures(metric))

    def move(self, shares: Tensor) -> Tensor:
        """Move the weight and its momentum; which components were moved, bool (k,)."""
        if self.group["momentum"] != 0:
            self._prepare_buffer()
        args = self.pom, self.weight, self.grad, self.buffer, shares, self.group["metric"], self._options
        if self._fused:
            return fused.advance(*args, self.group["nesterov"])
        return eager.advance(*args, self.group["nesterov"], self.chunk)

    def move_far(self, shares: Tensor, moved: Tensor) -> None:
        """Move the components that :meth:`move` left, for their steps are longer than its retraction is made for."""
        args = self.pom, self.weight, self.grad, self.buffer, shares, self.group["metric"], self._options
        eager.advance_far(*args, self.group["nesterov"], (~moved).nonzero()[:, 0])

    def move_freely(self, shares: Tensor) -> None:
        """Move a weight with Euclidean components only: torch's own SGD, on the gradient times ``shares``."""
        grad, group, cutting = self.grad, self.group, self.pom.cutting
        grad = -grad if group["maximize"] else grad
        grad = grad.add(self.weight, alpha=group["weight_decay"]) if group["weight_decay"] else grad
        factors = shares[self.pom.sets.group.long()][:, None, None].expand(-1, cutting.n, cutting.p)
        grad = torch.empty_like(self.weight).copy_(grad * cutting.join(factors))
        buffers = [self.buffer] if group["momentum"] != 0 else []
        options = {key: group[key] for key in ("momentum", "lr", "dampening", "nesterov", "foreach")}
        sgd([self.weight], [grad], buffers, weight_decay=0.0, maximize=False, fused=False, **options)
        if buffers:
            self.state["momentum_buffer"] = buffers[0]

    def _prepare_buffer(self) -> None:
        """A buffer in the precision of the geometry, laid out as the weight."""
        like = self.weight
        if self.buffer is None:
            dtype = working(like[:0]).dtype
            self.buffer = self.state["momentum_buffer"] = torch.zeros_like(like, dtype=dtype)
        elif self.buffer.stride() != like.stride():
            self.buffer = self.state["momentum_buffer"] = torch.empty_like(like, dtype=self.buffer.dtype).copy_(
                self.buffer
            )

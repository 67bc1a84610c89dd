"""What a step does to one constrained weight, and by which code."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

from lightning_fgsgd import eager, fused, fused_gpu
from lightning_fgsgd.average import distance_to_average
from lightning_fgsgd.job import Job
from lightning_fgsgd.manifolds import working_dtype
from lightning_fgsgd.pom import POM
from lightning_fgsgd.sharding import add_up, local, opened, split_like
from lightning_fgsgd.step import Options
from lightning_fgsgd.stepsize import step_normalizer

__all__ = ["Update", "compiles", "options_of"]


def compiles(wanted: bool | None, device: torch.device | str = "cpu") -> bool:
    """Whether the compiled step is to be used on a device: as ``wanted``, or where there is a compiler.

    Raises:
        RuntimeError: it is wanted, and there is none.
    """
    kind = torch.device(device).type
    if wanted is False or kind not in ("cpu", "cuda"):
        return False
    on_gpu = kind == "cuda" or fused_gpu.interpreted()
    reason = fused_gpu.available() if on_gpu else fused.available()
    what, remedy = ("Triton code", "triton") if on_gpu else ("C++", "a compiler (g++ or clang++)")
    if reason and wanted:
        raise RuntimeError(f"fused: True was asked for, but no {what} could be compiled here ({reason})")
    if reason and what not in _said:
        _said.append(what)
        warnings.warn(
            f"FGSGD: no {what} could be compiled here ({reason}), so weights are stepped by torch's own operations, which "
            f"takes several times as long; install {remedy}, or pass fused=False to say that you know",
            stacklevel=4,
        )
    return not reason


_said: list[str] = []


def options_of(group: Mapping[str, Any]) -> Options:
    """The numbers of a step of a parameter group whose momentum, if there is one, has begun."""
    lr, decay, momentum = (float(group[name]) for name in ("lr", "weight_decay", "momentum"))  # or tensors, or integers
    return Options(-1.0 if group["maximize"] else 1.0, decay, lr, momentum, 1.0 - group["dampening"])


@dataclass(eq=False)
class Update:
    """One weight in one step.

    Attributes:
        weight: the parameter.
        pom: its products of manifolds.
        group: its parameter group.
        options: the numbers that :func:`options_of` finds in it, but for a momentum that begins.
        state: its state, which a momentum buffer is put into.
        compiled: whether compiled code may be used.
        chunk: how many numbers the eager path works on at a time.
    """

    weight: Tensor
    pom: POM
    group: Mapping[str, Any]
    options: Options
    state: dict[str, Any]
    compiled: bool
    chunk: int

    def __post_init__(self) -> None:
        assert self.weight.grad is not None
        self.grad = split_like(self.weight.grad, self.weight)
        self._first = self.options.momentum != 0 and "momentum_buffer" not in self.state
        if self._first:
            self.options = self.options._replace(fresh=1.0)

    @property
    def can_wait(self) -> bool:
        """Whether the weight stays where it is when 1/𝔤 is NaN, so that nobody has to look at 𝔤 before it is moved."""
        return self.pom.constrains and self.pom.shard is None and not isinstance(self.group["rho"], str | None)

    def undo(self) -> None:
        """Forget the momentum that a step which moved nothing has begun."""
        if self._first:
            self.state.pop("momentum_buffer", None)

    @functools.cached_property
    def job(self) -> Job | None:
        """What is to be done, but for 1/𝔤, where compiled code may do it for many weights at once.

        Weights that are gathered for the step have none here: :meth:`sums` and :meth:`move` do them one by one.
        """
        shard = self.pom.shard
        if not self.compiled or (shard is not None and shard.gathered):
            return None
        weight, grad, buffer = self.weight, self.grad, self._buffer()
        if isinstance(weight, DTensor):  # replicated ones too, which have no shard
            weight, grad, buffer = local(weight), local(grad), None if buffer is None else local(buffer)
        return self._job(weight, grad, buffer)

    @functools.cached_property
    def form(self) -> tuple[Any, ...]:
        """What decides how the weight is stepped, but for addresses and numbers: :class:`Prepared` is kept while it stays.

        The products of manifolds go in by identity.
        """
        group, job = self.group, self.job
        told = id(self.pom), self.pom.edition, group["metric"], group["rho"], group["nesterov"]
        tensors = () if job is None else (job.weight, job.grad, *(() if job.buffer is None else (job.buffer,)))
        return *told, *((x.stride(), x.dtype, x.device) for x in tensors)

    def _job(self, weight: Tensor, grad: Tensor, buffer: Tensor | None) -> Job:
        group = self.group
        weight = weight.clone() if self.options.lr == 0 else weight
        return Job(self.pom, weight, grad, buffer, group["metric"], self.options, group["nesterov"])

    def code(self, job: Job | None) -> ModuleType | None:
        """Which compiled code does a job; None where torch's operations do it."""
        if job is None or not self.compiled:
            return None
        return next(
            (code for code in (fused_gpu, fused) if code.suits(job.pom, job.weight, job.grad, job.buffer)), None
        )

    def sums(self) -> Tensor:
        """Sums of ‖gradL(ω)‖² over the components of every group in this process, (G,): R_g² of Theorem 1."""
        with opened(self.pom.shard, self.weight, self.grad) as (weight, grad):
            job = self._job(weight, grad, None)
            if code := self.code(job):
                found: Tensor = code.Launches([job], "squares").squares([job])[0]
                return found
            args = self.pom, weight, grad, self.group["metric"], self.options
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
        dtype, average = working_dtype(self.weight), self.state.get("average")
        if average is None:
            self.state["average"] = torch.zeros_like(self.weight, dtype=dtype)
        elif average.dtype != dtype or average.device != self.weight.device:
            # The model was brought to another precision or device, or the state is of one in another.
            self.state["average"] = torch.empty_like(self.weight, dtype=dtype).copy_(average)
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
            job = self._job(weight, grad, buffer)
            if code := self.code(job):
                moved: Tensor = code.Launches([job]).advance([job], [shares])[0][0]
                return moved
            args = self.pom, job.weight, grad, buffer, shares, job.metric, self.options, job.nesterov
            return eager.advance(*args, self.chunk)

    def move_far(self, shares: Tensor, moved: Tensor) -> None:
        """Move the components that :meth:`move` left, for their steps are longer than its retraction is made for."""
        with opened(self.pom.shard, self.weight, self.grad, self._buffer(), write=True) as (weight, grad, buffer):
            job = self._job(weight, grad, buffer)
            args = self.pom, job.weight, grad, buffer, shares, job.metric, self.options, job.nesterov
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
        like, buffer, dtype = self.weight, self.state.get("momentum_buffer"), dtype or working_dtype(self.weight)
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=dtype)
        elif buffer.stride() != like.stride() or buffer.dtype != dtype or buffer.device != like.device:
            buffer = torch.empty_like(like, dtype=dtype).copy_(buffer)
        self.state["momentum_buffer"] = buffer
        return buffer

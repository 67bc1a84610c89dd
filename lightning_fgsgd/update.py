"""What a step does to one constrained weight, and by which path."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

from lightning_fgsgd import checks, eager, fused, fused_gpu
from lightning_fgsgd.average import distance_to_average
from lightning_fgsgd.job import Job
from lightning_fgsgd.manifolds import working_dtype
from lightning_fgsgd.pom import POM
from lightning_fgsgd.sharding import add_up, anywhere, local, opened, split_like
from lightning_fgsgd.step import Options
from lightning_fgsgd.stepsize import step_normalizer

__all__ = [
    "Update",
    "compiles",
    "finite_sums",
    "move_all",
    "refuse",
    "shares_of_all",
    "sums_of_all",
    "together",
    "undisturbed",
]


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


@contextmanager
def undisturbed(weights: Iterable[Tensor]) -> Iterator[None]:
    """The geometry of ``weights`` keeps its precision.

    Also where a step is taken under autocast (manual optimization), and where float32 products are allowed to be rounded
    (``torch.set_float32_matmul_precision``): manifolds would be left by a thousandth in every step.
    """
    with ExitStack() as stack:
        for device in {p.device.type for p in weights}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_exact_products())
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # torch 2.9 and later refuse the older name once the newer has been used.
    new = [b for b in backends if hasattr(b, "fp32_precision")]
    if not new:
        before = torch.get_float32_matmul_precision()
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    allowed = [(b, b.fp32_precision) for b in new]
    rounded = [(b, precision) for b, precision in allowed if precision not in ("ieee", "none")]
    for b, _ in rounded:
        b.fp32_precision = "ieee"
    try:
        yield
    finally:
        for b, precision in rounded:
            b.fp32_precision = precision


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
        sign, lr = -1.0 if group["maximize"] else 1.0, float(group["lr"])  # lr may be a tensor
        return Options(sign, group["weight_decay"], lr, group["momentum"], fresh)

    @property
    def can_wait(self) -> bool:
        """Whether the weight stays where it is when 1/𝔤 is NaN, so that nobody has to look at 𝔤 before it is moved."""
        return self.pom.constrains and self.pom.shard is None and not isinstance(self.group["rho"], str | None)

    def undo(self) -> None:
        """Forget the momentum that a step which moved nothing has begun."""
        if self._first:
            self.state.pop("momentum_buffer", None)

    @functools.cached_property
    def job(self) -> tuple[ModuleType, Job] | None:
        """What compiled code is to do, but for 1/𝔤, and which code; None where that is not for it.

        Weights that are gathered for the step have none here: :meth:`sums` and :meth:`move` do them one by one.
        """
        shard = self.pom.shard
        if not self.compiled or (shard is not None and shard.gathered):
            return None
        weight, grad, buffer = self.weight, self.grad, self._buffer()
        if isinstance(weight, DTensor):  # replicated ones too, which have no shard
            weight, grad, buffer = local(weight), local(grad), None if buffer is None else local(buffer)
        return self._job(weight, grad, buffer)

    def _job(self, weight: Tensor, grad: Tensor, buffer: Tensor | None) -> tuple[ModuleType, Job] | None:
        code = next((c for c in (fused_gpu, fused) if self.compiled and c.suits(self.pom, weight, grad, buffer)), None)
        if code is None:
            return None
        group = self.group
        weight = weight.clone() if group["lr"] == 0 else weight
        return code, Job(self.pom, weight, grad, buffer, None, group["metric"], self._options, group["nesterov"])

    def sums(self) -> Tensor:
        """Sums of ‖gradL(ω)‖² over the components of every group in this process, (G,): R_g² of Theorem 1."""
        with opened(self.pom.shard, self.weight, self.grad) as (weight, grad):
            if compiled := self._job(weight, grad, None):
                code, job = compiled
                found: Tensor = code.group_squares([job])[0]
                return found
            args = self.pom, weight, grad, self.group["metric"], self._options
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
            if compiled := self._job(weight, grad, buffer):
                code, job = compiled
                moved: Tensor = code.advance([job._replace(share=shares)])[0][0]
                return moved
            weight = weight.clone() if self.group["lr"] == 0 else weight
            args = self.pom, weight, grad, buffer, shares, self.group["metric"], self._options, self.group["nesterov"]
            return eager.advance(*args, self.chunk)

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
        like, buffer, dtype = self.weight, self.state.get("momentum_buffer"), dtype or working_dtype(self.weight)
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=dtype)
        elif buffer.stride() != like.stride() or buffer.dtype != dtype:
            buffer = torch.empty_like(like, dtype=dtype).copy_(buffer)
        self.state["momentum_buffer"] = buffer
        return buffer


# All weights of a step -----------------------------------------------------------------------------------------------


def sums_of_all(updates: Sequence[Update]) -> list[Tensor | None]:
    """R_g² of the groups of each weight, see :meth:`Update.sums`; None without 𝔤."""
    wanted = {i: u for i, u in enumerate(updates) if u.group["rho"] is not None}
    found: dict[int, Tensor] = {}
    for code, jobs in _by_code({i: u.job for i, u in wanted.items()}):
        found |= zip(jobs, code.group_squares(list(jobs.values())), strict=True)
    return [None if i not in wanted else found[i] if i in found else u.sums() for i, u in enumerate(updates)]


def _by_code(jobs: Mapping[int, tuple[ModuleType, Job] | None]) -> Iterator[tuple[ModuleType, dict[int, Job]]]:
    """The numbered jobs of each compiled code: it does all of them at once."""
    for code in (fused_gpu, fused):
        mine = {i: found[1] for i, found in jobs.items() if found is not None and found[0] is code}
        if mine:
            yield code, mine


def finite_sums(updates: Sequence[Update]) -> tuple[list[Tensor | None], Tensor | None]:
    """R_g² as of :func:`sums_of_all`, over all processes, when gradients are known to be finite.

    Or before that, with one bool that will say it, so that the host does not wait for the backward pass: where it turns out
    not to hold, :func:`shares_of_all` lets nothing move, and :func:`refuse` is to follow.

    Raises:
        FloatingPointError: gradients are not finite, or too large.
    """
    shards = [update.pom.shard for update in updates]
    sums = sums_of_all(updates)
    spread = {i: (s, x) for i, (s, x) in enumerate(zip(shards, sums, strict=True)) if s and s.spread and x is not None}
    for i, found in add_up(spread).items():
        sums[i] = found
    known = [x for x in sums if x is not None]
    if not known:
        return sums, None
    # By device: a model may be spread over several.
    devices = dict.fromkeys(x.device for x in known)
    worst = together(torch.cat([x for x in known if x.device == device]).max() for device in devices)
    finite = worst.max() <= checks.LARGEST_GRADIENT**2
    if all(update.can_wait for update in updates):
        return sums, finite
    bad = not bool(finite)
    if any(shards):
        bad = any(anywhere([bad] * len(shards), shards, updates[0].grad.device))
    if bad:
        refuse(updates, sums)
    return sums, None


def together(answers: Iterable[Tensor]) -> Tensor:
    """One number each of weights that may be on several devices, as one tensor on the first's."""
    first, *others = answers
    return torch.stack([first, *(x.to(first.device) for x in others)])


def refuse(updates: Sequence[Update], sums: Sequence[Tensor | None]) -> None:
    """Refuse weights or gradients that are not finite or too large, before a step, or after one that moved nothing for that.

    Raises:
        FloatingPointError: always.
    """
    for update in updates:
        update.undo()
    checks.gradients([(u.pom.name, local(u.grad)) for u in updates], [u.pom.shard for u in updates])
    checks.weights([(u.pom.name, local(u.weight)) for u in updates])
    # They are large in their metric alone, as where weights had stood at next to 0 when they were placed.
    raise checks.too_large([(u.pom.name, x) for u, x in zip(updates, sums, strict=True) if x is not None])


def shares_of_all(
    updates: Sequence[Update], sums: Sequence[Tensor | None], finite: Tensor | None = None
) -> list[Tensor]:
    """1/𝔤 of the groups of each weight, see :meth:`Update.shares`: at once for all whose ρ is the same.

    NaN, with which no component moves, where ``finite`` (one bool) is given and does not hold.
    """
    shares: dict[int, Tensor] = {}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (update, of_groups) in enumerate(zip(updates, sums, strict=True)):
        rho = update.group["rho"]
        if of_groups is None or isinstance(rho, str):
            shares[i] = update.shares(of_groups)
        else:
            alike.setdefault((rho, working_dtype(update.weight), of_groups.device), []).append(i)
    for (rho, dtype, _), members in alike.items():
        norms = torch.cat([sums[i] for i in members]).sqrt().to(dtype)  # type: ignore[misc]
        curvature = torch.cat([updates[i].pom.curvatures(updates[i].group["metric"]) for i in members])
        of_all = 1 / step_normalizer(norms, rho, curvature)
        of_all = of_all if finite is None else torch.where(finite.to(of_all.device), of_all, torch.nan)
        shares |= zip(members, of_all.split([updates[i].pom.num_groups for i in members]), strict=True)
    return [shares[i] for i in range(len(updates))]


def move_all(updates: Sequence[Update], shares: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Move all constrained weights and their momenta.

    Returns:
        Which components of each were moved, see :meth:`Update.move`; and whether all of them were, a few answers for all.
    """
    moved: dict[int, Tensor] = {}
    whole: list[Tensor] = []
    for code, jobs in _by_code({i: u.job for i, u in enumerate(updates)}):
        masks, answers = code.advance([job._replace(share=shares[i]) for i, job in jobs.items()])
        moved |= zip(jobs, masks, strict=True)
        whole += answers
    for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
        if i not in moved:
            moved[i] = update.move(share)
            whole.append(moved[i].all())
    return [moved[i] for i in range(len(updates))], whole

"""FG-SGD, Algorithm 1 of Ozay (NeurIPS 2019), as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_fgsgd import checkpoint, checks
from lightning_fgsgd.look import ProductOfManifolds
from lightning_fgsgd.plan import POMParamGroup, POMParamGroups, POMPlan
from lightning_fgsgd.pom import POM
from lightning_fgsgd.precision import undisturbed
from lightning_fgsgd.prepared import Prepared, refuse, together
from lightning_fgsgd.sharding import anywhere, count, largest, local, opened, shard_of, split_like, version, whole_of
from lightning_fgsgd.takeover import taken_over
from lightning_fgsgd.update import Update, compiles, options_of

__all__ = ["FGSGD"]


@dataclass
class _Own:
    """What an optimizer binds anew while it lives.

    It stands in one object, for Lightning's ``self.optimizers()`` and Fabric's ``setup`` give an optimizer with copied
    attributes: what that one binds would be its own, and the one that takes the steps would not know.
    """

    plan: POMPlan = field(default_factory=POMPlan)
    waits: bool = False  # whether frozen weights are held that are to be placed once they are not
    chunk: int = 0  # how many numbers of a weight torch's operations are given at a time; 0: to be found
    prepared: Prepared = field(default_factory=Prepared)


class FGSGD(torch.optim.Optimizer):
    r"""Fine-grained SGD: stochastic gradient descent with weights on products of manifolds (POMs).

    Each step, for each group g of components ω_ι = R · q_ι · S_ι of a constrained weight:

    1. gradL(ω_ι) = Π(gradE(ω_ι)), the tangent projection on each component manifold (line 5 of Algorithm 1);
    2. R_g = sqrt(Σ_ι ‖gradL(ω_ι)‖²) (Theorem 1);
    3. gradL is divided by 𝔤(R_g, ρ, c) (Eq. 5; see :func:`~lightning_fgsgd.stepsize.step_normalizer`);
    4. momentum, as in :class:`torch.optim.SGD`, on a buffer that is moved along by projection;
    5. ω_ι is retracted along −lr times the result (Eq. 3, lines 7 and 8).

    Parameters that are not constrained are stepped exactly as :class:`torch.optim.SGD` steps them, by torch's own code.
    Weight decay does not act on constrained components: the gradient of ‖ω‖² is normal to all three manifolds.

    With ``DistributedDataParallel``, make the optimizer after the model is wrapped: wrapping sends round the weights of the
    first process, and only then do all of them take the same manifolds from the weights. Lightning does so.

    Args:
        params: what :func:`~lightning_fgsgd.pom_param_groups` returns, which puts the weights onto their manifolds here,
            once, and groups of one's own beside these in a list; or anything that ``torch.optim.SGD`` takes, which
            constrains nothing until :meth:`constrain`.
        lr: learning rate, r(t) of the paper. Eq. 4 (Σ r = ∞, Σ r² < ∞) is up to the scheduler.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        rho: ρ of Eq. 5, the geodesic distance to a minimum: a number, or ``"average"``, which estimates it by the distance
            to a running average of the weights over 100 steps, group by group (one more tensor of the weights' size, and
            about twice the time). ``None`` turns the normalisation 𝔤 off.
        metric: the Riemannian metric, relative to the unit manifold's. ``"start"``: times the mean squared scale at
            which the layer's components of each manifold stood before they were placed. The learning rate of plain SGD
            carries over, and rescaling R does not change it. ``"unit"``: the unit manifold's own. ``"embedded"``: that of
            the space in which ω stands, at radius R (the paper read literally). R_g, ρ and c are taken in the metric chosen.
        foreach: as in ``torch.optim.SGD``, for the unconstrained parameters.
        fused: step the constrained weights by compiled code made from the step itself, in one pass over memory: C++ on a CPU
            (float32 and float64; :mod:`~lightning_fgsgd.fused`), Triton on a GPU (float32;
            :mod:`~lightning_fgsgd.fused_gpu`). ``None``: where that can be compiled; says so once where it cannot.
            ``False``: by torch's own operations. ``True``: an error where there is no compiler. Weights with no
            such code are stepped by torch's operations in any case: other precisions, blocks of more than 64 neurons, and
            kernels with more than 64 columns (on a GPU 32).

    Raises:
        ValueError: an argument out of range, or a weight to be placed that holds NaN or infinite values.
        RuntimeError: ``fused=True``, and no C++ can be compiled here; on a GPU in the first step, no Triton code.

    Example::

        optimizer = FGSGD(pom_param_groups(model, start="preserve"), lr=0.1, momentum=0.9)
        loss_fn(model(input), target).backward()
        optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        rho: float | str | None = 1.0,
        metric: str = "start",
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "rho": rho,
            "metric": metric,
            "foreach": foreach,
            "fused": fused,
        }
        checks.options(defaults)
        self._poms: dict[Tensor, POM] = {}
        # What a weight was before it was placed, until the first step: a checkpoint that is loaded then finds the
        # weight as its own model state left it, not as a start that was drawn in between.
        self._unplaced: dict[Tensor, tuple[int, Tensor]] = {}
        # How often each constrained weight had been written to when it was last known to be on its manifolds.
        self._versions: dict[Tensor, int] = {}
        self._own = _Own()
        given = params if isinstance(params, Tensor) else list(params)  # a Tensor is torch's to refuse
        carriers = [x for x in (params, *given) if isinstance(x, POMParamGroups | POMParamGroup)]
        plans = list({id(x.plan): x.plan for x in carriers}.values())
        super().__init__([dict(g) if isinstance(g, dict) else g for g in given], defaults)
        if fused:
            for device in {p.device.type for group in self.param_groups for p in group["params"]}:
                compiles(True, device)
        if plans:
            self.constrain(functools.reduce(operator.or_, plans))
        checks.lost_plans(self.param_groups, self._own.plan.names)

    # Products of manifolds ------------------------------------------------------------------------------------------

    def constrain(self, plan: POMPlan) -> None:
        """Put the weights that ``plan`` and this optimizer share onto their manifolds. Called once.

        Weights of the plan that the optimizer does not hold are constrained when ``add_param_group`` brings them, those that
        are frozen when they are not any more, in the next step. Nothing is moved before. Momentum that plain SGD has
        gathered goes along, divided by the 𝔤 of the gradients that it is of (:func:`~lightning_fgsgd.takeover.taken_over`).

        Raises:
            ValueError: there are products of manifolds already, or the plan shares no weight with the optimizer.
        """
        if self._own.plan.weights:
            raise ValueError("FGSGD: there is a plan of products of manifolds already; constrain can be called once")
        mine = [p for group in self.param_groups for p in group["params"]]
        if mine and not any(p in plan.names for p in mine):
            raise ValueError("plan: it knows none of this optimizer's parameters; draw it from the same model")
        self._own.plan = plan
        try:
            self._place(self.param_groups)
        except ValueError:
            self._own.plan = POMPlan()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters as ``torch.optim.SGD`` does; weights that the plan knows are put onto their manifolds.

        A group with an ``"lr_factor"`` (``layer_decay`` and ``euclidean_lr_factor`` of ``pom_param_groups``) and no ``"lr"``
        has that many times the optimizer's learning rate. A group of ``pom_param_groups`` brings its plan with it, and has a
        number in its name where those of another model have that name already: ``"pom, 2"``.
        """
        if isinstance(param_group, POMParamGroup):
            self._own.plan |= param_group.plan
            param_group = dict(param_group)
        if "lr_factor" in param_group and "lr" not in param_group:
            param_group = {**param_group, "lr": self.defaults["lr"] * param_group["lr_factor"]}
        param_group = checks.named_apart(param_group, self.param_groups)
        checks.options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._own.chunk = 0
        try:
            self._place(self.param_groups[-1:])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def _place(self, groups: list[dict[str, Any]]) -> None:
        """Put the weights of these groups that the plan knows onto their manifolds; none where one has no place there."""
        zero = {}
        held = {
            p: group for group in groups for p in group["params"] if p in self._own.plan.weights and p not in self._poms
        }
        new = [(p, group, self._own.plan.weights[p]) for p, group in held.items() if p.requires_grad]
        self._own.waits |= len(new) < len(held)
        for p, _, planned in new:
            planned.check(whole_of(p))
        for p, group, planned in new:
            before = p.detach().clone() if planned.start != "preserve" else None
            weight = whole_of(p)
            pom = POM.place(planned, weight)
            if before is not None:
                p.detach().copy_(split_like(weight, p))
                self._unplaced[p] = (version(p), before)
            self._versions[p] = version(p)
            buffer = self.state[p].get("momentum_buffer") if p in self.state else None
            if buffer is not None:  # of plain SGD, whose weights are constrained only now
                self.state[p]["momentum_buffer"] = split_like(taken_over(pom, weight, whole_of(buffer), group), p)
            self._poms[p] = pom.part(shard_of(p, planned.cutting, planned.scheme))
            if count := pom.zero_components():
                zero[pom.name] = count
        if zero:
            layers = ", ".join(f"{count} in {name}" for name, count in zero.items())
            warnings.warn(f"FGSGD: components that are zero have no direction and stay zero: {layers}", stacklevel=3)

    @property
    def poms(self) -> Mapping[Tensor, POM]:
        """The live products of manifolds of the constrained parameters; :meth:`pom` gives a look at one."""
        return MappingProxyType({p: pom.follow(p) for p, pom in self._poms.items()})

    def pom(self, param: Tensor) -> ProductOfManifolds | None:
        """The products of manifolds of ``param``; ``None`` where it is not constrained.

        Of a sharded weight (a DTensor) the components that this process steps.
        """
        checks.parameter(param)
        pom = self.poms.get(param)
        if pom is None:
            return None
        with opened(pom.shard, param) as (weight,):
            return pom.look(weight)

    def distance(self, param: Tensor) -> float:
        """Largest relative violation of the constraints of ``param``; 0 where it is not constrained.

        The maximum over its components of ‖fixed part of ωᵀω − its target‖_F / ‖target‖_F. Of a sharded weight over those of
        all processes, each of which must ask.
        """
        checks.parameter(param)
        pom = self.poms.get(param)
        if pom is None:
            return 0.0
        with opened(pom.shard, param) as (weight,):
            distance = pom.distance(weight)
        if pom.shard is None or pom.shard.gathered:
            return distance
        return float(largest(torch.tensor(distance, device=param.device), pom.shard))

    def project(self, param: Tensor | None = None) -> None:
        """Bring ``param``, or all constrained weights, back to the nearest point of their manifolds."""
        if param is not None:
            checks.parameter(param)
        for p, pom in self.poms.items():
            if param is not None and p is not param:
                continue
            with opened(pom.shard, p, write=True) as (weight,):
                pom.project(weight)
            self._versions[p] = version(p)

    def unplaced(self, param: Tensor) -> Tensor:
        """``param`` as it was before it was put onto its manifolds, until the first step; as it is otherwise."""
        return self._unplaced[param][1] if self.has_unplaced(param) else param.detach()

    def has_unplaced(self, param: Tensor) -> bool:
        """Whether ``param`` was moved when it was put onto its manifolds, and neither stepped nor changed since."""
        return param in self._unplaced and self._unplaced[param][0] == version(param)

    def rescale(self, param: Tensor, radius: Tensor) -> None:
        """Set R of the components of ``param``, as :meth:`pom` shows them, to ``radius`` (k,); the weight scales along.

        Raises:
            ValueError: ``param`` is not constrained, or ``radius`` is not k positive numbers.
        """
        pom = self.poms.get(param)
        if pom is None:
            raise ValueError("param: it is not on a product of manifolds, so it has no radius to set")
        k = pom.cutting.count
        if radius.shape != (k,) or not bool((torch.isfinite(radius) & (radius > 0)).all()):
            raise ValueError(f"radius: {pom.name} needs {k} positive numbers, got {radius}")
        stray = self._versions.get(param) != version(param)
        with opened(pom.shard, param, write=True) as (weight,):
            pom.rescale(weight, radius)
        if not stray:
            self._versions[param] = version(param)

    # The step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            FloatingPointError: a constrained weight, or its gradient, holds NaN or infinite values, or the norm of the
                gradient, Euclidean or Riemannian, exceeds 1e18. Nothing has moved then. Unconstrained parameters are stepped
                as by torch.optim.SGD, whatever their gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with undisturbed(p for group in self.param_groups for p in group["params"]):
            self._step()
        return loss

    def _step(self) -> None:
        left_out = self._place_unfrozen() if self._own.waits else set()
        updates, free = self._updates(left_out)
        self._check(updates)
        if not self._own.prepared.suits(updates):
            self._own.prepared = Prepared(updates)
        sums, finite = self._own.prepared.finite_sums(updates)
        shares = self._own.prepared.shares(updates, sums, finite)
        moved, answers = self._own.prepared.move(updates, shares)
        # One answer to the host: steps that are too long for the fast retraction are as good as never taken.
        answers += [] if finite is None else [finite]
        if answers and not bool(together(answers).all()):
            if finite is not None and not bool(finite):
                refuse(updates, sums)
            late = [(updates[i], shares[i], m) for i, m in moved.items() if not bool(m.all())]
            self._bring_back([update for update, _, _ in late])
            for update, share, m in late:
                update.move_far(share, m)
        self._unplaced.clear()
        for update in updates:
            if update.group["lr"] != 0:
                self._versions[update.weight] = version(update.weight)
        for params, group in free:
            self._step_free(params, group)

    def _place_unfrozen(self) -> set[Tensor]:
        """Place the weights that were frozen until now; those that this moved, whose gradient is of where they were."""
        before = set(self._poms)
        self._own.waits = False
        self._place(self.param_groups)
        return {p for p, pom in self._poms.items() if p not in before and pom.start != "preserve"}

    def _updates(self, left_out: set[Tensor]) -> tuple[list[Update], list[tuple[list[Tensor], dict[str, Any]]]]:
        """The weights that have a gradient, but for those that were placed after it was taken.

        Returns:
            Those of products of manifolds; and by group the others, to which torch's own SGD is all that there is.
        """
        updates, free = [], []
        if not self._own.chunk:
            sizes = [count(p) for group in self.param_groups for p in group["params"]]
            # A step by torch's operations holds up to eighteen tensors of one: together the largest weight, or 5 % of all.
            self._own.chunk = min(2**19, max(2**14, max(max(sizes, default=0), sum(sizes) // 20) // 18))
        for group in self.param_groups:
            plain, options = [], options_of(group)
            for p in group["params"]:
                if p.grad is None or p in left_out:
                    continue
                pom = self._poms.get(p)
                if pom is None or (not pom.constrains and group["rho"] is None):
                    plain.append(p)
                else:
                    compiled = compiles(group["fused"], p.device)
                    updates.append(Update(p, pom.follow(p), group, options, self.state[p], compiled, self._own.chunk))
            free.append((plain, group))
        return updates, free

    def _check(self, updates: list[Update]) -> None:
        """Refuse gradients that are not finite where 𝔤 will not notice, and look at the weights that others have written to.

        Stray weights are brought back, but not at a learning rate of 0, for nothing may move then: torch's distributed
        checkpoints take such a step, on weights that are loaded already, before they load the optimizer's state.
        """
        without = [u for u in updates if u.group["rho"] is None]
        checks.gradients([(u.pom.name, local(u.grad)) for u in without], [u.pom.shard for u in without])
        changed = [self._versions.get(u.weight) != version(u.weight) for u in updates]
        shards = [u.pom.shard for u in updates]
        if any(shards):
            changed = anywhere(changed, shards, updates[0].grad.device)
        written = [u for u, others_wrote in zip(updates, changed, strict=True) if others_wrote and u.group["lr"] != 0]
        stray = checks.stray_weights({u.weight: (u.pom.name, self.distance(u.weight)) for u in written})
        self._versions |= {u.weight: version(u.weight) for u in written}
        for p in stray:
            self.project(p)

    def _bring_back(self, updates: list[Update]) -> None:
        """Bring back the weights, of those that could not be moved, that are off their manifolds.

        Others have written to them without a trace, through ``.data``. A long step starts on the manifolds, too.
        """
        found = {}
        for update in updates:
            if update.group["lr"] != 0:
                with opened(update.pom.shard, update.weight) as (weight,):  # this process asks alone: not self.distance
                    found[update.weight] = update.pom.name, update.pom.distance(weight)
        for p in checks.stray_weights(found):
            self.project(p)

    def _step_free(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The unconstrained parameters of a group: torch's own SGD."""
        states = [self.state[p] for p in params] if group["momentum"] != 0 else []
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            buffers,
            has_sparse_grad=any(p.grad.is_sparse for p in params),  # type: ignore[union-attr]
            foreach=group["foreach"],
            fused=None if group["foreach"] is None else False,  # else torch does not choose foreach by itself
            **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
        )
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of ``torch.optim.SGD``, and in each parameter group a list ``"pom"`` beside its ``"params"``.

        With sharded weights it is called by all processes. The momentum then is a DTensor, as with ``torch.optim.SGD``; what
        is in ``"pom"`` belongs to the whole weights.
        """
        state = super().state_dict()
        for packed, group in zip(state["param_groups"], self.param_groups, strict=True):
            saved = checkpoint.save([self._poms.get(p) for p in group["params"]])
            waiting = [None if p in self._poms else self._own.plan.weights.get(p) for p in group["params"]]
            packed["pom"] = [
                state if weight is None else checkpoint.frozen(weight)
                for state, weight in zip(saved, waiting, strict=True)
            ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the index sets, scales and radii in it replace those that were drawn here.

        The weights are not part of it, load them into the model before or after. Weights that were placed on their
        manifolds when this optimizer was made, and not touched since, get back the values that they had before.

        Raises:
            ValueError: the state belongs to other weights, cuttings or constraints than this optimizer's.
        """
        saved, pairs = checkpoint.take_apart(state_dict, self.param_groups, constrained=bool(self._poms))
        poms = checkpoint.match(pairs, self._poms, self._own.plan)
        replaced = [pom.name for p, pom in poms.items() if p in self._poms and not pom.same_constraints(self._poms[p])]
        saved = [{**self.defaults, **group} for group in saved]  # a state of torch.optim.SGD lacks our own options
        super().load_state_dict({**state_dict, "param_groups": saved})
        checkpoint.restore_momentum(state_dict, self, poms)
        for p, (then, before) in self._unplaced.items():
            if version(p) == then:
                p.detach().copy_(before)
        self._unplaced.clear()
        self._versions.clear()
        self._own.waits |= any(p not in poms for p in self._poms)
        self._poms.clear()
        self._poms.update(poms)
        self._own.prepared = Prepared()
        if replaced:
            warnings.warn(
                f"FGSGD: the manifolds, groups or start of {len(replaced)} weights ({replaced[0]} first) are those of the "
                "checkpoint, and not those asked for here; to change them, load the model's weights only",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_poms": self._poms,
            "_own": replace(self._own, prepared=Prepared()),
            "_unplaced": {},
            "_versions": {},
        }

"""Free choices of the method that the package has no option for, to measure what each is worth.

Each is an option of an arm whose ``method`` is ``fgsgd``:

* ``assign``: manifolds by each component's own spectrum, not at random (:class:`BySpectrum`);
* ``constrain_after``: so many epochs of plain SGD first (:class:`Later`), in which ``gradually: true`` brings the weights
  onto their manifolds little by little (:class:`Gradually`);
* ``rates``: learning rates by manifold (:func:`rates_by_manifold`);
* ``redraw``: new index sets, or the same ones, before every epoch (:class:`Redraw`);
* ``std_of``: one λ for a whole layer, or none (:class:`OtherStdRescaling`);
* ``carried: false``: momentum that is not moved along with the weights (:func:`momentum_left_behind`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_fgsgd import FGSGD, FeatureStdRescaling, POMGrouping, eager, pom_param_groups
from lightning_fgsgd.matrices import combine, where
from lightning_fgsgd.plan import POMParamGroups
from lightning_fgsgd.pom import POM
from lightning_fgsgd.prepared import Prepared
from lightning_fgsgd.step import move, riemannian_gradient
from lightning_fgsgd.update import Update

__all__ = [
    "BySpectrum",
    "Gradually",
    "Later",
    "OtherStdRescaling",
    "Redraw",
    "flatness",
    "momentum_left_behind",
    "rates_by_manifold",
]

# From the manifold that fixes least of a component's Gram matrix to the one that fixes all of it.
STRENGTH = ("euclidean", "sphere", "oblique", "stiefel")


def flatness(components: Tensor) -> Tensor:
    """How equal the singular values of components (k, n, p) are: (Σσ)²/(p Σσ²), from 1/p, where all but one are 0, to 1."""
    values = torch.linalg.svdvals(components)
    return values.sum(-1).square() / (values.shape[-1] * values.square().sum(-1)).clamp_min(1e-30)


class BySpectrum(POMGrouping):
    """Give each layer's manifolds out by spectrum: as many of each as would be drawn, and a group for each manifold.

    Args:
        assign: ``"flat"``: the components with the flattest spectra go to the manifold that fixes most, for it then changes
            least what they can become. ``"steep"``: the other way round.
        settings: of :class:`~lightning_fgsgd.POMGrouping`.
    """

    def __init__(self, assign: str, **settings: Any) -> None:
        super().__init__(**settings)
        if assign not in ("flat", "steep"):
            raise ValueError(f"assign: unknown choice {assign!r}; choose from 'flat', 'steep'")
        if self.settings["scheme"] != "pio" or self.settings["groups"] is not None:
            raise ValueError("assign: it is for scheme: pio and one group a manifold, in which a layer is one pool")
        self.assign = assign

    def param_groups(self, model: nn.Module) -> POMParamGroups:  # noqa: D102
        groups = super().param_groups(model)
        weights = groups.plan.weights
        for weight, planned in weights.items():
            sets = planned.index_sets
            flat = flatness(planned.cutting.cut(weight.detach()).float())
            order = flat.argsort(descending=self.assign == "steep")
            strength = torch.tensor([STRENGTH.index(name) for name in sets.manifold_names])
            given = strength[sets.manifold.long()].argsort()  # what was drawn, from the weakest to the strongest
            manifold, slot = torch.empty_like(sets.manifold), torch.empty_like(sets.slot)
            manifold[order], slot[order] = sets.manifold[given], sets.slot[given]
            weights[weight] = replace(planned, index_sets=replace(sets, manifold=manifold, slot=slot))
        return groups


class Later(POMGrouping):
    """Plain SGD for some epochs, then the manifolds, from where the weights are by then.

    Args:
        constrain_after: epochs of plain SGD, in which all parameters have the learning rate and the weight decay of those
            that stay unconstrained.
        settings: of :class:`~lightning_fgsgd.POMGrouping`.
    """

    def __init__(self, constrain_after: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.constrain_after = constrain_after

    def param_groups(self, model: nn.Module) -> Any:
        """Groups as they will be, without their plan, so that nothing is constrained yet."""
        return [{**group, "name": f"euclidean, {group['name']}"} for group in super().param_groups(model)]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.current_epoch != self.constrain_after:
            return
        (optimizer,), (schedule,) = trainer.optimizers, trainer.lr_scheduler_configs
        assert isinstance(optimizer, FGSGD)
        optimizer.constrain(pom_param_groups(pl_module, **self.settings).plan)
        for i, group in enumerate(optimizer.param_groups):
            if any(p in optimizer.poms for p in group["params"]):
                own = float(optimizer.defaults["lr"]) * group.get("lr_factor", 1.0)
                group["lr"] *= own / group["initial_lr"]
                group["initial_lr"] = schedule.scheduler.base_lrs[i] = own


class Gradually(Later):
    """Plain SGD for some epochs, in which the weights come onto their manifolds little by little.

    After each step every weight goes a part of its way to the nearest point of its manifolds: one over the steps that are
    left of those epochs. Without gradients the distance would fall linearly; after the last of the steps it is 0.

    Args:
        constrain_after: as of :class:`Later`.
        settings: of :class:`~lightning_fgsgd.POMGrouping`, with ``start="project"``: with the others there is no nearest
            point to go to.
    """

    def __init__(self, constrain_after: int, **settings: Any) -> None:
        super().__init__(constrain_after, **settings)
        layers = (self.settings["overrides"] or {}).values()
        for start in (self.settings["start"], *(layer["start"] for layer in layers if "start" in layer)):
            if start != "project":
                raise ValueError(f"gradually: it is for start: project, got {start!r}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the manifolds, as they will be again when the weights are constrained.

        Raises:
            ValueError: the run has no more epochs than it takes.
        """
        if self.constrain_after >= (trainer.max_epochs or 0):
            raise ValueError(f"gradually: {self.constrain_after} of {trainer.max_epochs} epochs; some are to follow")
        planned = pom_param_groups(pl_module, **self.settings).plan.weights
        self._planned = {weight: how for weight, how in planned.items() if weight.requires_grad}
        self._left = self.constrain_after * int(trainer.num_training_batches)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go a part of the way.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        if self._left <= 0:
            return
        for weight, planned in self._planned.items():
            if not bool(weight.isfinite().all()):
                raise FloatingPointError(f"{planned.name}: not finite after a step of plain SGD")
            nearest = weight.detach().clone()
            POM.place(planned, nearest)
            weight.lerp_(nearest, 1 / self._left)
        self._left -= 1


class Redraw(Callback):
    """Draw the index sets anew before each epoch but the first: every weight goes onto its new manifolds as it did at first.

    Momentum starts from zero after each, since it belongs to the manifolds before; ``new=False`` draws the same sets again,
    and tells what that is worth.

    Args:
        grouping: with the settings to draw with.
        new: whether each epoch's draw has a seed of its own.
    """

    def __init__(self, grouping: POMGrouping, new: bool = True) -> None:
        self.grouping = grouping
        self.new = new

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        epoch = trainer.current_epoch
        if epoch == 0:
            return
        (optimizer,) = trainer.optimizers
        settings = dict(self.grouping.settings)
        settings["seed"] += 1000 * epoch if self.new else 0
        drawn = FGSGD(pom_param_groups(pl_module, **settings)).state_dict()["param_groups"]
        state = optimizer.state_dict()
        for mine, its in zip(state["param_groups"], drawn, strict=True):
            # The metric stays that of the first start: a rate is worth what it was.
            mine["pom"] = [
                new and {**new, "origins": old["origins"]} for old, new in zip(mine["pom"], its["pom"], strict=True)
            ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FGSGD: the manifolds, groups or start of")  # that is what is meant
            optimizer.load_state_dict({**state, "state": {}})


class OtherStdRescaling(FeatureStdRescaling):
    """R by another λ than each channel's own.

    Args:
        std_of: ``"layer"``: one for each layer, the root mean square of its channels'. ``"nothing"``: λ = 1, so that R = γ.
        settings: of :class:`~lightning_fgsgd.FeatureStdRescaling`.
    """

    def __init__(self, std_of: str, **settings: Any) -> None:
        super().__init__(**settings)
        if std_of not in ("layer", "nothing"):
            raise ValueError(f"std_of: unknown choice {std_of!r}; choose from 'layer', 'nothing'")
        self.std_of = std_of

    def _rescale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, std in self._last.items():
            one = std.square().mean().sqrt() if self.std_of == "layer" else std.new_ones(())
            self._last[name] = one.expand_as(std)
        super()._rescale(trainer, pl_module)


def _move_apart(geometry: Any, omega: Any, grad: Any, buffer: Any, share: Any, options: Any, **how: Any) -> Any:
    """:func:`~lightning_fgsgd.step.move`, but that momentum stays as it was made, not tangent where the weight is now."""
    weights, carried, within = move(geometry, omega, grad, buffer, share, options, **how)
    if buffer is None:
        return weights, carried, within
    gradient = riemannian_gradient(geometry, geometry.unit(omega), omega, grad, options, share)
    return weights, where(within, combine(gradient, options.fresh, buffer, options.momentum), buffer), within


@contextmanager
def momentum_left_behind() -> Iterator[None]:
    """Inside, optimizers with ``fused=False`` do not carry momentum along: their buffers are summed where they were made."""
    before = eager.move
    eager.move = _move_apart
    try:
        yield
    finally:
        eager.move = before


@contextmanager
def rates_by_manifold(rates: Mapping[str, float]) -> Iterator[None]:
    """Inside, a group's learning rate is the optimizer's, times what ``rates`` has for its manifold, 1 by default.

    Args:
        rates: factor by the manifold's name.

    Raises:
        ValueError: in the first step, where components of different manifolds share a group: a group has one rate.
    """
    unknown = [name for name in rates if name not in STRENGTH]
    if unknown or not all(rate > 0 for rate in rates.values()):
        raise ValueError(f"rates: positive factors by {', '.join(STRENGTH)}, got {dict(rates)}")
    before = Prepared.shares

    def shares(self: Prepared, updates: Sequence[Update], *args: Any, **kwargs: Any) -> list[Tensor]:
        found = before(self, updates, *args, **kwargs)
        return [share * _factors(update.pom, rates).to(share) for share, update in zip(found, updates, strict=True)]

    with patch.object(Prepared, "shares", shares):
        yield


def _factors(pom: POM, rates: Mapping[str, float]) -> Tensor:
    """What ``rates`` has for each group of a weight, (G,)."""
    of_component = torch.tensor([rates.get(name, 1.0) for name in pom.sets.manifold_names])[
        pom.sets.manifold.long().cpu()
    ]
    group = pom.sets.group.long().cpu()
    factors = torch.ones(pom.num_groups).index_copy_(0, group, of_component)
    if not torch.equal(factors[group], of_component):
        raise ValueError(f"rates: groups of {pom.name} have components of several manifolds; groups: each has not")
    return factors

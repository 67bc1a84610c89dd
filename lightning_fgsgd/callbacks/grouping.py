"""POMGrouping: draws the index sets of the products of manifolds when fitting starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fgsgd._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_fgsgd.choices import DEFAULT_MANIFOLDS, check_choices, check_override, check_splits
from lightning_fgsgd.describe import describe
from lightning_fgsgd.optimizer import FGSGD
from lightning_fgsgd.plan import POMParamGroups, pom_param_groups

__all__ = ["POMGrouping"]


class POMGrouping(Callback):
    """Put a model's weights on products of manifolds when fitting starts.

    With :class:`~lightning_fgsgd.FGSGDMixin`, ``configure_optimizers`` groups with the settings given here. Without it,
    ``configure_optimizers`` returns an ``FGSGD(self.parameters(), ...)`` of its own, and this callback constrains it.

    The arguments are those of :func:`~lightning_fgsgd.pom_param_groups`, and

    Args:
        verbose: print :func:`~lightning_fgsgd.describe`'s table when fitting starts.

    Raises:
        ValueError: a wrong argument; those that depend on the model when fitting starts.
        MisconfigurationException: there is no FGSGD to constrain, or it is constrained already by
            ``pom_param_groups`` with settings that this callback cannot know; or ``layer_decay``, ``euclidean_lr_factor`` or
            ``no_weight_decay`` is asked for where the module makes its parameter groups itself.

    Example::

        Trainer(callbacks=[POMGrouping(scheme="pi", manifolds=["sphere", "stiefel"]), FeatureStdRescaling()])
    """

    def __init__(
        self,
        scheme: str = "pio",
        manifolds: Sequence[str] = DEFAULT_MANIFOLDS,
        start: str = "preserve",
        cutting: str = "kernel",
        block_size: int = 16,
        groups: int | str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        normalized: bool = False,
        layer_decay: float | None = None,
        euclidean_lr_factor: float | None = None,
        no_weight_decay: bool | Sequence[str] = False,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        each: dict[str, Any] = {
            "scheme": scheme,
            "manifolds": manifolds if isinstance(manifolds, str) else tuple(manifolds),
            "start": start,
            "cutting": cutting,
            "block_size": block_size,
            "groups": groups,
        }
        check_choices(**each, seed=seed)
        for pattern, change in (overrides or {}).items():
            check_override(pattern, change, each, seed)
        check_splits(layer_decay, euclidean_lr_factor)
        for argument, patterns in (("include", include), ("exclude", exclude), ("no_weight_decay", no_weight_decay)):
            if isinstance(patterns, str):
                raise ValueError(f"{argument}: {patterns!r} is one string; give a list of patterns, [{patterns!r}]")
        self.settings: dict[str, Any] = {
            **each,
            "include": include,
            "exclude": exclude,
            "overrides": overrides,
            "normalized": normalized,
            "layer_decay": layer_decay,
            "euclidean_lr_factor": euclidean_lr_factor,
            "no_weight_decay": no_weight_decay,
            "seed": seed,
        }
        self.verbose = verbose
        self._groups: POMParamGroups | None = None

    def param_groups(self, model: nn.Module) -> POMParamGroups:
        """Draw the index sets of ``model``; what to give to :class:`~lightning_fgsgd.FGSGD`."""
        self._groups = pom_param_groups(model, **self.settings)
        return self._groups

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._groups = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._groups is None:  # otherwise the mixin asked for them in configure_optimizers
            self._constrain(trainer, pl_module)
        if self.verbose:
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, FGSGD):
                    describe(optimizer, quiet=not trainer.is_global_zero)

    def _constrain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Constrain the optimizers that the module made without us."""
        optimizers = [o for o in trainer.optimizers if isinstance(o, FGSGD)]
        if not optimizers:
            names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "no optimizer"
            raise MisconfigurationException(
                f"POMGrouping needs an FGSGD to constrain, and configure_optimizers returned {names}; inherit from "
                "FGSGDMixin (before LightningModule), or return FGSGD(self.parameters(), lr=...)"
            )
        # The plan's, not the optimizer's poms: frozen weights are placed later.
        if any(optimizer._own.plan.weights for optimizer in optimizers):
            raise MisconfigurationException(
                "POMGrouping: configure_optimizers has grouped the weights already, with pom_param_groups; "
                "leave out one of the two"
            )
        for name in ("layer_decay", "euclidean_lr_factor", "no_weight_decay"):
            if self.settings[name]:
                raise MisconfigurationException(
                    f"POMGrouping: {name} splits parameter groups, and configure_optimizers made its own; inherit from "
                    f"FGSGDMixin, or return FGSGD(pom_param_groups(self, {name}={self.settings[name]!r}), lr=...)"
                )
        plan = self.param_groups(pl_module).plan
        for optimizer in optimizers:
            optimizer.constrain(plan)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": None}  # the model of a fit is not a copy's

"""POMProjection: holds weights on products of manifolds that another optimizer steps."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lightning_fgsgd._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_fgsgd.callbacks.grouping import POMGrouping
from lightning_fgsgd.optimizer import FGSGD

__all__ = ["POMProjection"]

_OF_PARAM_GROUPS = ("layer_decay", "euclidean_lr_factor", "no_weight_decay")
_NOT_HERE = {
    **dict.fromkeys(_OF_PARAM_GROUPS, "it is of FGSGD's parameter groups; the optimizer here has its own"),
    "verbose": "print describe(projection.held) when fitting has started",
}


class POMProjection(Callback):
    """Hold weights on products of manifolds whatever steps them: after each step, at the nearest point.

    For optimizers other than :class:`~lightning_fgsgd.FGSGD`, which steps along the manifolds by itself. Each of their steps
    is followed by the projection onto the manifolds, q ↦ argmin ‖q − v‖; what they gather, such as momentum, is not moved
    along, and their weight decay acts on the weights in between. It is what :meth:`~lightning_fgsgd.FGSGD.project` does.

    Weights are put onto their manifolds when fitting starts. Those that are frozen then, or that no optimizer has, stay as
    they are. A checkpoint has the index sets and the Gram information; a fit that is resumed goes on with them.

    Args:
        settings: those of :class:`~lightning_fgsgd.POMGrouping`, but ``verbose``, and ``layer_decay``,
            ``euclidean_lr_factor`` and ``no_weight_decay``, which are of FGSGD's parameter groups.

    Attributes:
        held: an ``FGSGD`` that takes no step, during a fit and after it: ``held.pom(weight)`` and ``held.distance(weight)``
            show how the weights are held.

    Raises:
        TypeError: a setting that there is not.
        ValueError: a setting that is wrong; those that depend on the model when fitting starts.
        MisconfigurationException: when fitting starts with an FGSGD, with an optimizer that is not torch's, or with none of
            the weights that are to be held.

    Example::

        class LitModel(LightningModule):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        Trainer(callbacks=[POMProjection(cutting="filter", manifolds=["stiefel"], start="project")])
    """

    def __init__(self, **settings: Any) -> None:
        for name, why in _NOT_HERE.items():
            if settings.get(name):  # a command line gives all of POMGrouping's arguments, these as they are by default
                raise TypeError(f"{name}: {why}")
        self._grouping = POMGrouping(**settings)
        self.settings = {k: v for k, v in self._grouping.settings.items() if k not in _OF_PARAM_GROUPS}
        self.held: FGSGD | None = None
        self._saved: dict[str, Any] | None = None
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if stage == "fit":  # what an earlier fit held; a checkpoint is loaded after this
            self.held = self._saved = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, FGSGD):
                raise MisconfigurationException(
                    "POMProjection: an FGSGD holds its weights itself; take POMGrouping, or another optimizer"
                )
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise MisconfigurationException(
                    f"POMProjection: {type(optimizer).__name__} is no torch.optim.Optimizer, which calls hooks after a step"
                )
        groups = self._grouping.param_groups(pl_module)
        stepped = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        mine = [p for group in groups for p in group["params"] if p in stepped]
        if not any(p in groups.plan.weights for p in mine):
            raise MisconfigurationException(
                f"POMProjection: the optimizers have none of the {len(groups.plan.weights)} weights that are to be held"
            )
        self.held = FGSGD(mine)
        self.held.constrain(groups.plan)
        if self._saved is not None:  # weights that were placed just now get back what the checkpoint gave them
            self.held.load_state_dict(self._saved)
        for optimizer in trainer.optimizers:
            # One that was not made by Optimizer.__init__ (timm's Lookahead) would call no hook before its first zero_grad.
            optimizer._patch_step_function()
            self._hooks.append(optimizer.register_step_post_hook(self._project))

    @torch.no_grad()
    def _project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self.held is not None
        self.held._unplaced.clear()  # what the weights were before the first step; these are steps that it does not see
        poms = self.held.poms
        mine = [p for group in optimizer.param_groups for p in group["params"] if p in poms]
        if len(mine) == len(poms):
            self.held.project()
        else:  # the others are another optimizer's
            for p in mine:
                self.held.project(p)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # Copies and checkpoints -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # What is of a fit is not a copy's.
        return {**self.__dict__, "_grouping": copy.copy(self._grouping), "held": None, "_hooks": []}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {} if self.held is None else {"held": self.held.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._saved = state_dict.get("held")
        if self.held is not None and self._saved is not None:  # strategies that restore when all is set up
            self.held.load_state_dict(self._saved)

"""FGSGDMixin: a LightningModule's ``configure_optimizers`` for FG-SGD."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_fgsgd._lightning import rank_zero_warn
from lightning_fgsgd.callbacks.grouping import POMGrouping
from lightning_fgsgd.optimizer import FGSGD

__all__ = ["FGSGDMixin"]

_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "rho", "metric", "fused")


class FGSGDMixin:
    """Mixin for a LightningModule: sets up FG-SGD in ``configure_optimizers``.

    Put it before ``LightningModule`` among the base classes. The options of :class:`~lightning_fgsgd.FGSGD` (``lr``,
    ``momentum``, ``dampening``, ``weight_decay``, ``nesterov``, ``maximize``, ``rho``, ``metric``, ``fused``) are read from
    the module's attributes, but for methods and modules (``self.metric`` may be one of torchmetrics'), then from its
    ``hparams``; the optimizer's defaults hold otherwise. The weights are grouped with
    the settings of the :class:`~lightning_fgsgd.POMGrouping` among the Trainer's callbacks, or with its defaults.

    Raises:
        TypeError: when a class is defined whose ``configure_optimizers`` hides the mixin's by the order of its bases.

    Example::

        class LitModel(FGSGDMixin, LightningModule):
            def __init__(self, lr=0.1, momentum=0.9):
                super().__init__()
                self.save_hyperparameters()
                self.model = timm.create_model("resnet18", pretrained=True)

            def configure_lr_scheduler(self, optimizer):
                return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next((base for base in cls.__mro__ if "configure_optimizers" in vars(base)), None)
        if owner is not None and not issubclass(owner, FGSGDMixin):
            raise TypeError(
                f"{cls.__name__}: {owner.__name__}.configure_optimizers hides FGSGDMixin's; write "
                f"class {cls.__name__}(FGSGDMixin, LightningModule)"
            )

    def configure_optimizers(self) -> Any:
        """An FGSGD over this module's parameters, with the scheduler of :meth:`configure_lr_scheduler` if any."""
        assert isinstance(self, nn.Module)
        trainer = getattr(self, "_trainer", None)
        callbacks = trainer.callbacks if trainer is not None else []
        grouping = next((c for c in callbacks if isinstance(c, POMGrouping)), None) or POMGrouping()
        options = self._fgsgd_options()
        try:
            optimizer = FGSGD(grouping.param_groups(self), **options)
        except ValueError as error:
            name = str(error).partition(":")[0]
            if name not in options:
                raise
            raise ValueError(f"{error} (FGSGDMixin takes it from self.{name}, or from hparams)") from error
        scheduler = self.configure_lr_scheduler(optimizer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def configure_lr_scheduler(self, optimizer: FGSGD) -> Any:
        """Override to return a scheduler, or Lightning's dict of a scheduler and its settings. None by default."""
        return None

    def _fgsgd_options(self) -> dict[str, Any]:
        hparams = getattr(self, "hparams", {})
        options = {}
        for name in _OPTIONS:
            # A module may have a `metric` that is a torchmetrics one, or a method of such a name.
            if hasattr(self, name) and not callable(getattr(self, name)):
                options[name] = getattr(self, name)
            elif name in hparams:
                options[name] = hparams[name]
        if "lr" not in options and (
            isinstance(getattr(self, "learning_rate", None), float) or "learning_rate" in hparams
        ):
            rank_zero_warn(
                f"{type(self).__name__}: FGSGDMixin reads the learning rate from `lr`, and there is only a `learning_rate`; "
                "without `lr` it is 0.001"
            )
        return options

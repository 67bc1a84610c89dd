"""NormBoundMonitor: logs the norms of the constrained weights that the paper's bounds are made of."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fgsgd._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_fgsgd.bounds import component_norms, group_norms
from lightning_fgsgd.optimizer import FGSGD

__all__ = ["NormBoundMonitor"]


class NormBoundMonitor(Callback):
    """Log, per layer, the norms of the components and of the groups ω_g at the end of an epoch.

    For every constrained layer: the largest spectral, Frobenius and ℓ2→1 norm of its components, the largest Frobenius
    norm of its groups and the paper's geometric mean of the components' Frobenius norms. They go to the Trainer's loggers
    as ``norms/<layer>/<norm>``, and to :attr:`history`.

    Args:
        every_n_epochs: how often.

    Attributes:
        history: for each epoch looked at a dict with ``"epoch"`` and ``"layers"``: layer name to norm name to value.

    Raises:
        ValueError: a wrong argument.
        MisconfigurationException: when fitting starts without an FGSGD.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: {every_n_epochs!r} is not a whole number of at least 1")
        self.every_n_epochs = every_n_epochs
        self.history: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not any(isinstance(o, FGSGD) for o in trainer.optimizers):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "no optimizer"
            raise MisconfigurationException(
                f"NormBoundMonitor reads the manifolds of an FGSGD, and configure_optimizers returned {names}; "
                "inherit from FGSGDMixin, return an FGSGD, or leave this callback out"
            )

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        layers = {}
        for optimizer in trainer.optimizers:
            for param, pom in optimizer.poms.items() if isinstance(optimizer, FGSGD) else ():
                components = pom.cutting.cut(param.detach().float())
                norms = component_norms(components)
                groups = group_norms(components, pom.sets.group.long())
                layers[pom.name.removesuffix(".weight")] = {
                    "spectral": float(norms.spectral.max()),
                    "frobenius": float(norms.frobenius.max()),
                    "l21": float(norms.l21.max()),
                    "group_frobenius": float(groups.frobenius.max()),
                    "geometric_mean": float(norms.frobenius.clamp_min(1e-30).log().mean().exp()),
                }
        self.history.append({"epoch": trainer.current_epoch, "layers": layers})
        scalars = {f"norms/{layer}/{name}": value for layer, row in layers.items() for name, value in row.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.history = list(state_dict["history"])

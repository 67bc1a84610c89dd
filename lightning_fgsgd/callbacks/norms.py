"""NormBoundMonitor: the norms of the weights during training, and the generalisation bounds that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import scaling
from lightning_fgsgd._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_fgsgd.bounds import CHECKS, LayerNorms, layer_norms, table1
from lightning_fgsgd.callbacks._layers import layer_names
from lightning_fgsgd.checkpoint import whole
from lightning_fgsgd.components import cutting_of
from lightning_fgsgd.manifolds import working
from lightning_fgsgd.norms import Norms, group_norms
from lightning_fgsgd.optimizer import FGSGD
from lightning_fgsgd.pom import POM
from lightning_fgsgd.reasons import normalizes_weight
from lightning_fgsgd.sharding import whole_of

__all__ = ["NormBoundMonitor"]


class NormBoundMonitor(Callback):
    r"""Watch the norms of components, groups and layers, and the generalisation bounds of the paper's Table 1.

    At the start of training and then at the chosen interval, for every constrained layer: the largest spectral, Frobenius
    and ℓ2→1 norm of its components ω_ι (``spectral``, ...), the largest entries of Table 2 times R beside them
    (``table2_spectral``, ..., where the table has one), the largest norms of its concatenated groups ω_g
    (``group_spectral``, ...), the largest geometric means of the components' norms (``mean_spectral``, ..., Remark 1), and
    the shares of components and groups that meet Proposition 1, Remark 1 and the Bai-Yin law
    (:meth:`~lightning_fgsgd.bounds.LayerNorms.checks`; γ in the Xavier reading, the stricter one unless a layer puts out
    fewer pixels than its kernel has).

    For the network: the smallest of these shares, the logarithms of the three bounds of Table 1, and of the same bounds
    before the weights were put onto their manifolds. In the bounds a Linear layer or convolution that is not constrained is
    one group; the gains of norm layers do not count, nor do layers that normalise their weights themselves.

    They go to the Trainer's loggers, as ``norms/<layer>/<norm>`` and ``bounds/<bound>``, and to :attr:`history`.

    Args:
        every_n_epochs: look at the end of every n-th epoch.
        every_n_steps: look after every n-th optimizer step instead.
        samples: N of Table 1; by default the size of the training set, or 1 where that is not known.

    Attributes:
        history: for each look a dict with ``"epoch"``, ``"step"``, ``"layers"`` (layer to name to value) and ``"network"``
            (name to value).
        start: the bounds before the weights were placed, by name. Empty where these are gone: in a fit resumed from a
            checkpoint that this callback has no part in, and with ``"project"`` or ``"random"`` after a finder of learning
            rates or batch sizes.
        latest: the norms of every component and group at the last look, by layer; on the CPU, and not in checkpoints.

    Raises:
        ValueError: a wrong argument.
        MisconfigurationException: when fitting starts without an FGSGD.

    Example::

        monitor = NormBoundMonitor()
        Trainer(callbacks=[POMGrouping(), FeatureStdRescaling(), monitor]).fit(module)
        monitor.plot("norms.png")
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None, samples: int | None = None) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps), ("samples", samples)):
            unset = value is None and name != "every_n_epochs"
            if not unset and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: {value!r} is not a whole number of at least 1")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.samples = samples
        self.history: list[dict[str, Any]] = []
        self._looking_on = False  # whether the Trainer is at something else than a fit
        self.start: dict[str, float] = {}
        self.latest: dict[str, LayerNorms] = {}
        self._epoch: int | None = None  # of the last batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._looking_on = stage != "fit"
        if stage == "fit":  # a checkpoint is loaded after this
            self.history, self.start, self._epoch = [], {}, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._looking_on = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not any(isinstance(o, FGSGD) for o in trainer.optimizers):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "no optimizer"
            raise MisconfigurationException(
                f"NormBoundMonitor reads the manifolds of an FGSGD, and configure_optimizers returned {names}; "
                "inherit from FGSGDMixin, return an FGSGD, or leave this callback out"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # Not in on_fit_start: POMGrouping may come after this callback and constrain there.
        if self.history:
            if self._epoch is None:  # an earlier version did not keep it
                self._epoch = trainer.current_epoch
            # From a checkpoint of the last batch of an epoch Lightning goes on with the next, without a hook between.
            if trainer.current_epoch > self._epoch:
                self.on_train_epoch_end(trainer, pl_module)
            return
        constrained = list(_constrained(trainer))
        resumed = trainer.global_step > 0 and trainer.ckpt_path is not None
        if not resumed and all(o.has_unplaced(p) or pom.start == "preserve" for o, p, pom in constrained):
            groups = [
                group_norms(pom.cutting.cut(working(whole_of(optimizer.unplaced(p)))), pom.sets.group.long())
                for optimizer, p, pom in constrained
            ]
            self.start = self._bounds(trainer, pl_module, groups)
        self._epoch = trainer.current_epoch
        self._look(trainer, pl_module)

    def on_train_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._epoch = trainer.current_epoch

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A batch may take several steps, or none.
        every, last = self.every_n_steps, self.history[-1]["step"] if self.history else 0
        if every and trainer.global_step // every > last // every:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert self._epoch is not None
        if not self.every_n_steps and (self._epoch + 1) % self.every_n_epochs == 0:
            self._look(trainer, pl_module)

    # Looking --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Looked already: between two steps of accumulated gradients, or before the checkpoint from which this fit goes on.
        if self.history and self.history[-1]["step"] == trainer.global_step:
            return
        poms = {p: pom for _, p, pom in _constrained(trainer)}
        names = layer_names(pl_module, poms)
        self.latest = {
            names[p]: layer_norms(pom, whole_of(p), scaling.gamma(pom.cutting)).cpu() for p, pom in poms.items()
        }
        layers = {name: norms.largest() | norms.checks() for name, norms in self.latest.items()}
        network = self._bounds(trainer, pl_module, [norms.groups for norms in self.latest.values()])
        if layers:  # none as long as all that is constrained is frozen
            network |= {check: min(row[check] for row in layers.values()) for check in CHECKS}
        self.history.append({"epoch": self._epoch, "step": trainer.global_step, "layers": layers, "network": network})
        scalars = {f"norms/{layer}/{name}": value for layer, row in layers.items() for name, value in row.items()}
        scalars |= {f"bounds/{name}": value for name, value in network.items()}
        scalars |= {f"bounds/{name}_at_the_start": value for name, value in self.start.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def _bounds(self, trainer: Trainer, pl_module: LightningModule, constrained: list[Norms]) -> dict[str, float]:
        """Table 1 for the whole network, by name, given the norms of the groups of its constrained layers."""
        layers = list(constrained)
        poms = {p: pom for o in trainer.optimizers if isinstance(o, FGSGD) for p, pom in o.poms.items()}
        seen = set(poms)
        width = max((max(pom.layer.in_channels, pom.layer.out_channels) for pom in poms.values()), default=1)
        for module in pl_module.modules():
            cutting = cutting_of(module, "filter")
            weight: Any = getattr(module, "weight", None)
            if cutting is None or normalizes_weight(module) or not weight.is_floating_point():  # quantised, say
                continue
            width = max(width, cutting.in_channels, cutting.out_channels)
            if weight not in seen:
                seen.add(weight)
                components = cutting.cut(working(whole_of(weight)))
                one_group = torch.zeros(len(components), dtype=torch.long, device=components.device)
                layers.append(group_norms(components, one_group))
        on_the_cpu = [Norms(*(x.cpu().double() for x in norms)) for norms in layers]
        return table1(on_the_cpu, self.samples or _training_samples(trainer), width)._asdict()

    # Afterwards -----------------------------------------------------------------------------------------------------

    def plot(self, path: str | Path | None = None) -> Any:
        """Bounds over training, and norms by layer at the last look, as a ``matplotlib.figure.Figure``.

        Args:
            path: where to save it, if anywhere.

        Raises:
            RuntimeError: there was no look yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        from lightning_fgsgd.callbacks._plots import plot_norms

        if not self.history:
            raise RuntimeError("NormBoundMonitor.plot: there is nothing to plot before a fit")
        figure = plot_norms(self.history, self.start)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"history": list(self.history), "start": dict(self.start), "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        # trainer.test(ckpt_path="best") after a fit: what was seen up to there, and after it, is here already.
        if self._looking_on and self.history:
            return
        self.history, self.start = list(state_dict["history"]), dict(state_dict["start"])
        self._epoch = state_dict.get("epoch")


def _constrained(trainer: Trainer) -> Iterator[tuple[FGSGD, Tensor, POM]]:
    """The constrained weights, each with its products of manifolds: those of all of it, where it is sharded."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, FGSGD):
            for p, pom in optimizer.poms.items():
                yield optimizer, p, whole([pom])[0] or pom


def _training_samples(trainer: Trainer) -> int:
    """Size of the training set; 1 where it has none."""
    loader: Any = trainer.train_dataloader
    try:
        return max(len(loader.dataset), 1)
    except (AttributeError, TypeError, NotImplementedError):  # several loaders, no data set, or one without a length
        return 1

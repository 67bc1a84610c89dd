"""FeatureStdRescaling: gathers the standard deviation of each layer's features, and rescales the manifolds with it."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import scaling
from lightning_fgsgd._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_fgsgd.callbacks._layers import layer_names
from lightning_fgsgd.features import FeatureReader, keeps_statistics
from lightning_fgsgd.optimizer import FGSGD
from lightning_fgsgd.pom import POM
from lightning_fgsgd.sharding import collect
from lightning_fgsgd.statistics import FeatureStd, merge_moments, of_processes, own_part, standard_deviation

__all__ = ["FeatureStdRescaling"]


class FeatureStdRescaling(Callback):
    """Rescale the manifolds by the standard deviation λ of the features that enter their layers.

    During training, forward hooks stream each constrained layer's input into a :class:`~lightning_fgsgd.FeatureStd`: one λ
    per input channel for kernels, one over the fan-in (of the conv group) for blocks. Weights that are used without a call
    of their layer are read too (:class:`~lightning_fgsgd.features.FeatureReader`); where a layer's features cannot be seen,
    that is said once and its R stays; so it is where features are NaN or infinite. Before the first batch of the next
    epoch (so that what was validated, saved and averaged is what was trained), R = γ/λ is set, or with ``start="preserve"``
    R = R¹·λ¹/λ, where R¹ = 1 and λ¹ are those of the first epoch that was gathered. Only training is read.
    Several processes share what they read after every batch that is read, so λ, and a checkpoint at any moment, has all.

    Batch norm's running statistics belong to the weights before a rescale, and follow within a few steps of training; to
    evaluate right after one, recalibrate them with ``torch.optim.swa_utils.update_bn``. Where all batch norms are frozen
    (in evaluation mode while training, of a class such as timm's ``FrozenBatchNormAct2d``, or without
    ``track_running_stats``, as ``BaseFinetuning.freeze`` of Lightning leaves them) they would not follow, and a pretrained
    network would compute something else after every rescale: weights that started with ``"preserve"`` then keep their R,
    and that is said once. Only norms that something trained comes before do count, so not those of a teacher.

    Args:
        gamma: reading of b̂ in Eq. 2, ``"xavier"`` or ``"literal"``; see :func:`~lightning_fgsgd.scaling.gamma`.
        clamp: raise λ to 1 where it is less, as the paper's bounds need; says so once when it acts. Weights that started
            with ``"preserve"`` are not clamped.
        limit: with ``"preserve"``, R stays within [1/limit, limit]. A channel that dies has λ -> 0, and λ¹/λ would blow up
            weights that no gradient can correct. ``None`` lifts it.
        every_n_batches: read every n-th batch. λ is an average over very many features, so a sample is enough: of N images
            it is within 0.5/√N of the λ of all for 95 % of the channels (relative; measured on EfficientNet-Lite0).

    Attributes:
        history: for each epoch a dict with ``"epoch"`` and ``"layers"``, which maps a layer's name to the mean λ (``"std"``)
            and the mean, smallest and largest R (``"radius"``, ``"radius_min"``, ``"radius_max"``) of that epoch.

    Raises:
        ValueError: a wrong argument.
        MisconfigurationException: when fitting starts without an FGSGD that constrains a weight.
    """

    def __init__(
        self, gamma: str = "xavier", clamp: bool = True, limit: float | None = 10.0, every_n_batches: int = 8
    ) -> None:
        if gamma not in scaling.GAMMA_READINGS:
            choices = ", ".join(map(repr, scaling.GAMMA_READINGS))
            raise ValueError(f"gamma: unknown reading {gamma!r}; choose from {choices}")
        if isinstance(every_n_batches, bool) or not isinstance(every_n_batches, int) or every_n_batches < 1:
            raise ValueError(f"every_n_batches: {every_n_batches!r} is not a whole number of at least 1")
        if limit is not None and not limit >= 1:
            raise ValueError(f"limit: {limit!r} is not a number of at least 1; None lifts the limit")
        self.gamma = gamma
        self.clamp = clamp
        self.limit = limit
        self.every_n_batches = every_n_batches
        self.history: list[dict[str, Any]] = []
        self._metrics: dict[str, FeatureStd] = {}
        self._reader: FeatureReader | None = None
        self._reads = False
        self._looking_on = False  # whether the Trainer is at something else than a fit
        self._said: set[str] = set()
        self._epoch: int | None = None  # of the last batch
        self._open = False  # whether λ of that epoch is still to be computed
        # By layer: λ of the first epoch and of the last one, for each channel or conv group; moments of the epoch under
        # way, of every process; pixels of the output feature map.
        self._first: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._feature_map: dict[str, int] = {}
        # Norms that something trained is before, by name: as all processes know of the last epoch (None: of a checkpoint
        # that does not tell), and as this one has seen since.
        self._behind: set[str] | None = set()
        self._seen: set[str] = set()

    # The order of a fit ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._looking_on = stage != "fit"
        if stage == "fit":  # what an earlier fit gathered belongs to other manifolds; a checkpoint is loaded after this
            for gathered in (self._metrics, self._first, self._last, self._moments, self._feature_map):
                gathered.clear()
            self.history = []
            self._epoch, self._open = None, False
            self._behind, self._seen = set(), set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "no optimizer"
        if not any(isinstance(o, FGSGD) for o in trainer.optimizers):
            raise MisconfigurationException(
                f"FeatureStdRescaling rescales the manifolds of an FGSGD, and configure_optimizers returned {names}; "
                "inherit from FGSGDMixin, return an FGSGD, or leave this callback out"
            )
        self._said.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # Not in on_fit_start: POMGrouping may come after this callback and constrain there. Frozen weights come later.
        if not any(isinstance(o, FGSGD) and (o.poms or o._own.plan.weights) for o in trainer.optimizers):
            raise MisconfigurationException(
                "FeatureStdRescaling: no weight of the FGSGD is on a product of manifolds; add POMGrouping() to the "
                "callbacks, or give FGSGD the groups of pom_param_groups"
            )
        # From a checkpoint of the last batch of an epoch Lightning goes on with the next, without a hook between.
        if self._epoch is not None and trainer.current_epoch > self._epoch:
            self._close(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._watch(trainer, pl_module)

    def on_train_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._reader is None:  # a fit resumed without the start of an epoch
            self._watch(trainer, pl_module)
        # Not when the epoch starts: other callbacks freeze, load and average weights there, before us or after us. The epoch
        # that StochasticWeightAveraging adds takes no step; its average is not what R was gathered for.
        if self._last and not getattr(trainer.fit_loop, "_skip_backward", False):
            self._rescale(trainer, pl_module)
        self._epoch, self._open = trainer.current_epoch, True
        self._reads = batch_idx % self.every_n_batches == 0
        if self._reads:
            self._read(True)

    # Blocks that are checkpointed run forward again in the backward pass; they were read already.
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:  # noqa: D102
        self._read(False)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._read(self._reads)  # manual optimization goes on with another forward pass

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._reads:
            self._reads = False
            if self._reader is not None:
                self._reader.close()
            self._gather()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._reads:  # the module's own on_train_batch_start has ended the epoch, and with it the batch
            self._unhook()
        self._close(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        self._unhook()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._looking_on = False
        self._unhook()

    # Gathering ------------------------------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch every layer whose weight is constrained; layers that were unfrozen meanwhile join."""
        self._unhook()
        poms = _poms(trainer)
        names = layer_names(pl_module, poms)
        for param, pom in poms.items():
            name = names[param]
            if name in self._metrics:
                continue
            metric = self._metrics[name] = FeatureStd(pom.layer.in_channels, _pools(pom))
            if param.device.type == "mps":
                metric.set_dtype(torch.float32)  # no float64 there
            metric.to(param.device)
            if name in self._moments:
                metric.moments = own_part(self._moments[name]).to(metric.moments)

        def update(weight: Tensor, features: Tensor, dim: int) -> None:
            self._metrics[names[weight]].update(features, dim=dim)

        def pixels(weight: Tensor, count: int) -> None:
            self._feature_map[names[weight]] = count

        norms: dict[Any, str] = {}

        def behind(norm: Any) -> None:
            if norm not in norms:  # the first one, or one that was put in meanwhile
                norms.update({norm: name for name, norm in _norms(pl_module).items()})
            self._seen.add(norms[norm])

        self._reader = FeatureReader(pl_module, poms, update, pixels, behind)

    def _read(self, whether: bool) -> None:
        if self._reader is not None:
            self._reader.start() if whether else self._reader.stop()

    def _gather(self) -> None:
        """Share what was read with the other processes: one message, so that a checkpoint, saved by one, has it all."""
        if not self._metrics:
            return
        moments = [metric.moments for metric in self._metrics.values()]
        message = torch.cat([x.to(moments[0]) for x in moments], 1)
        parts = of_processes(message).split([x.shape[1] for x in moments], 2)
        self._moments = dict(zip(self._metrics, parts, strict=True))

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute λ of the epoch, of all that all processes read; a layer may have been used in some of them only."""
        if not self._open:
            return
        self._open = False
        found: list[tuple[str, Tensor]] = []
        std_at: dict[str, Tensor] = {}  # λ at R = 1: it is not 1 where a fit goes on, and this callback was not in it
        rows = []
        poms = _poms(trainer)
        names = layer_names(pl_module, poms).values()
        # R of a sharded weight is in all the processes that share it.
        shards = {i: (pom.shard, (pom.radius,)) for i, pom in enumerate(poms.values()) if pom.shard is not None}
        parts = {i: (shard, radius) for i, (shard, radius) in shards.items() if not shard.gathered}
        spread = {i: torch.cat([radius for (radius,) in shares]) for i, shares in collect(parts).items()}
        for i, (name, pom) in enumerate(zip(names, poms.values(), strict=True)):
            radius = spread[i].to(pom.radius) if i in spread else pom.radius
            if name not in self._moments:
                continue
            moments = merge_moments(self._moments[name].to(radius.device))
            std = standard_deviation(moments, _pools(pom)).to(radius)
            found.append((name, std))
            std_at[name] = std * _radius_by_channel(pom)
            rows.append(torch.stack([moments[0].max().to(radius), std.mean(), radius.mean(), *radius.aminmax()]))
        if not rows:
            return
        norms = _norms(pl_module)
        here = [self._feature_map.get(name, 0) for name, _ in found] + [int(name in self._seen) for name in norms]
        # Images may be of another size elsewhere, or go through other parts.
        anywhere = of_processes(torch.tensor(here, device=rows[0].device)).amax(0).tolist()
        largest, seen = anywhere[: len(found)], anywhere[len(found) :]
        self._feature_map = {name: size for (name, _), size in zip(found, largest, strict=True) if size}
        if any(seen):
            self._behind = {name for name, is_behind in zip(norms, seen, strict=True) if is_behind}
        self._seen = set()
        layers: dict[str, dict[str, float]] = {}
        for (name, std), (count, *row) in zip(found, torch.stack(rows).tolist(), strict=True):
            if count == 0:
                self._say(name, f"the input of {name} was not seen in any forward pass; its R stays as it is")
                continue
            self._last[name] = std
            # A channel that was dead at first has its λ¹ from the first epoch in which it lives.
            first = self._first.get(name, std_at[name]).to(std)
            self._first[name] = torch.where(first > 0, first, std_at[name])
            layers[name] = dict(zip(("std", "radius", "radius_min", "radius_max"), row, strict=True))
        for metric in self._metrics.values():
            metric.reset()
        self._moments = {}
        if not layers:
            return
        bad = [name for name, row in layers.items() if not math.isfinite(row["std"])]
        if bad:
            self._say(
                "not finite",
                f"the input of {len(bad)} layers ({bad[0]} first) held NaN or infinite values in epoch {self._epoch}; "
                "where λ is not finite, R stays as it is",
            )
        self.history.append({"epoch": self._epoch, "layers": layers})
        for logger in trainer.loggers:
            scalars = {f"{key}/{name}": row[key] for name, row in layers.items() for key in ("std", "radius")}
            logger.log_metrics(scalars, step=trainer.global_step)

    def _unhook(self) -> None:
        self._reads = False
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # Rescaling ------------------------------------------------------------------------------------------------------

    def _rescale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clamped, held = 0, _norms_are_frozen(pl_module, self._behind)
        names = layer_names(pl_module, _poms(trainer))
        for optimizer in (o for o in trainer.optimizers if isinstance(o, FGSGD)):
            for param, pom in optimizer.poms.items():
                name = names[param]
                std = self._last.pop(name, None)
                if std is None or not param.requires_grad:  # frozen weights stay as they are
                    continue
                if held and pom.start == "preserve":
                    self._say(
                        "frozen norms",
                        "all batch norms are frozen and could not follow a rescale; R of weights that started with "
                        "'preserve' stays as it is",
                    )
                    continue
                reads, radius = pom.reads(), pom.radius
                std = std.to(radius)[reads]
                if pom.start == "preserve":
                    first = self._first[name].to(std)[reads]
                    new = scaling.preserved_radius(first, std, radius, self.limit)
                elif self.gamma == "literal" and name not in self._feature_map:
                    self._say(
                        name, f"what {name} puts out was not seen, which gamma='literal' needs; its R stays as it is"
                    )
                    continue
                else:
                    size = scaling.gamma(pom.layer, self.gamma, self._feature_map.get(name))
                    new = scaling.radius(size, std, self.clamp)
                    clamped += int(self.clamp and bool((std < 1).any()))
                optimizer.rescale(param, torch.where(torch.isfinite(new) & (new > 0), new, radius))
        if clamped and "clamp" not in self._said:
            self._said.add("clamp")
            rank_zero_info(f"FeatureStdRescaling: λ < 1 in {clamped} layers is taken as 1 (clamp=True)")

    def _say(self, name: str, message: str) -> None:
        if name not in self._said:
            self._said.add(name)
            rank_zero_warn(f"FeatureStdRescaling: {message}")

    # Copies and checkpoints -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_reads": False}  # the hooks of a fit are not a copy's

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {
            "first": dict(self._first),
            "last": dict(self._last),
            "moments": dict(self._moments),
            "feature_map": dict(self._feature_map),
            "history": list(self.history),
            "epoch": self._epoch,
            "behind": None if self._behind is None else sorted(self._behind | self._seen),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        # trainer.test(ckpt_path="best") after a fit: what was seen up to there, and after it, is here already.
        if self._looking_on and self.history:
            return
        self._first = dict(state_dict["first"])
        self._last = dict(state_dict["last"])
        # An earlier version kept those of one process, (3, channels), and not the epoch.
        self._moments = {name: x.reshape(-1, 3, x.shape[-1]) for name, x in state_dict["moments"].items()}
        self._epoch = state_dict.get("epoch")
        self._open = bool(self._moments)
        self._feature_map = dict(state_dict["feature_map"])
        behind = state_dict.get("behind")
        self._behind = None if behind is None else set(behind)
        self.history = list(state_dict["history"])
        self._metrics.clear()


def _norms_are_frozen(module: LightningModule, behind: Container[str] | None) -> bool:
    """Whether norms that follow something trained keep their running statistics, and none of them takes them from the batch.

    Args:
        module: what is trained.
        behind: the names of the norms that follow something trained; those before it, and of a teacher, do not count.
            ``None``: nobody knows, and all count.
    """
    frozen = [
        "FrozenBatchNorm" in type(norm).__name__ or not norm.training or not norm.track_running_stats
        for name, norm in _norms(module).items()
        if behind is None or name in behind
    ]
    return bool(frozen) and all(frozen)


def _norms(module: LightningModule) -> dict[str, Any]:
    """The norms with running statistics, by name."""
    found = {name.replace("_orig_mod.", ""): part for name, part in module.named_modules()}
    return {name: part for name, part in found.items() if keeps_statistics(part)}


def _radius_by_channel(pom: POM) -> Tensor:
    """R of the components that read each channel, or conv group of blocks: their mean; 1 where there is none."""
    held = ~pom.on("euclidean")
    reads, radius = pom.reads()[held], pom.radius[held]
    total, count = (radius.new_zeros(_pools(pom)).index_add_(0, reads, x) for x in (radius, torch.ones_like(radius)))
    return torch.where(count > 0, total / count, 1.0)


def _poms(trainer: Trainer) -> dict[Tensor, POM]:
    """The constrained weights of all optimizers."""
    return {p: pom for o in trainer.optimizers if isinstance(o, FGSGD) for p, pom in o.poms.items()}


def _pools(pom: POM) -> int:
    """How many λ a layer has: one for each input channel, or for blocks one for each conv group."""
    return pom.layer.conv_groups if pom.layer.kind == "filter" else pom.layer.in_channels

"""One run of an experiment: a network trained by one method on one task, and what came out."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fgsgd import FeatureStdRescaling, FGSGDMixin, NormBoundMonitor
from recipes.experiments.callbacks import callbacks_of
from recipes.experiments.choices import momentum_left_behind, rates_by_manifold
from recipes.experiments.conditioning import Conditioning
from recipes.experiments.data import Task
from recipes.experiments.forgetting import Forgetting, photographs
from recipes.experiments.methods import BASELINES, head_of, split_off_the_rest
from recipes.experiments.networks import build
from recipes.experiments.turning import Turning

PACKAGES = ("lightning-fgsgd", "torch", "timm", "pytorch-lightning", "geoopt")

MODULE = ("warmup", "power", "constrained_power", "euclidean_lr", "frozen_norms", "pull")

# What is measured in every epoch where an arm has ``<name>: true``.
MEASURED = {"turning": Turning, "conditioning": Conditioning}

# Mean and deviation of Fashion-MNIST's pixels, for networks that were not trained on anything else.
GREY = {"mean": (0.286,), "std": (0.353,)}


@dataclass
class Outcome:
    """What a run gives: its numbers for the row, a dict an epoch, the history of its layers if it was watched, and what of
    :data:`MEASURED` was asked for, by name, a dict an epoch."""

    numbers: dict[str, float]
    epochs: list[dict[str, float]] = field(default_factory=list)
    history: dict[str, Any] | None = None
    measured: dict[str, list[dict[str, float]]] = field(default_factory=dict)


class Classifier(FGSGDMixin, LightningModule):
    """A network trained by a method under half a cosine after a linear warm-up.

    Args:
        net: takes normalised images, gives logits.
        method: ``"fgsgd"`` or one of :data:`~recipes.experiments.methods.BASELINES`.
        options: of the method.
        config: mean and std of the images that the network expects.
        warmup: share of the steps in which the learning rate rises to ``lr``.
        power: that the half cosine is taken to: less than 1 falls later. Under weight decay a filter that batch norm
            follows turns by an angle that goes as the square root of the learning rate (Kosson et al. 2024), on a sphere
            as the rate itself.
        constrained_power: that it is taken to for the weights that FG-SGD constrains, if it is another.
        euclidean_lr: learning rate of the parameters that FG-SGD leaves unconstrained, if it is another, under any method;
            that of the last layer, with ``layer_decay``.
        frozen_norms: batch norm keeps its running statistics while training.
        pull: strength of a pull of all parameters but the head's towards where they started: L2-SP's penalty
            pull/2 · ‖w − w⁰‖² in the loss, for any method.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        method: str,
        options: dict[str, Any],
        config: dict[str, Any],
        warmup: float = 0.05,
        power: float = 1.0,
        constrained_power: float | None = None,
        euclidean_lr: float | None = None,
        frozen_norms: bool = False,
        pull: float = 0.0,
    ) -> None:
        super().__init__()
        if constrained_power is not None and method != "fgsgd":
            raise ValueError(f"constrained_power: {method!r} constrains nothing; give power, which is for all weights")
        if euclidean_lr is not None and method == "muon":
            raise ValueError("euclidean_lr: of 'muon' it is adamw_lr")
        self.net = net
        self.method = method
        self.options = options
        self.warmup = warmup
        self.power = power
        self.constrained_power = power if constrained_power is None else constrained_power
        self.euclidean_lr = euclidean_lr
        self.frozen_norms = frozen_norms
        self.pull = pull
        self.starts: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1))
        if method == "fgsgd":
            for name, value in options.items():  # where the mixin looks for them
                setattr(self, name, value)
        self.wrong: list[Tensor] = []
        self.losses: list[Tensor] = []

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the network expects them; grey ones get its number of channels."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(self.normalize(images))
        return logits

    def on_fit_start(self) -> None:  # noqa: D102
        head = set(head_of(self.net).parameters()) if self.pull else set()
        self.starts = [(p, p.detach().clone()) for p in self.net.parameters() if self.pull and p not in head]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: D102
        for p, start in self.starts:
            if p.grad is not None:
                p.grad.add_(p.detach() - start, alpha=self.pull)

    def on_train_epoch_start(self) -> None:  # noqa: D102
        self.losses.clear()
        if self.frozen_norms:
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self.wrong.append(self(batch[0]).argmax(1) != batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self.validation_step(batch, batch_idx)

    def error(self) -> float:
        """Share of the images since the last call that were classified wrongly, in %."""
        wrong = torch.cat(self.wrong)
        self.wrong.clear()
        return 100 * float(wrong.float().mean())

    def configure_optimizers(self) -> Any:
        """The method's optimizer."""
        if self.method == "fgsgd":
            return super().configure_optimizers()
        optimizer = BASELINES[self.method](self.net, **self.options)
        if self.euclidean_lr is not None:
            split_off_the_rest(self.net, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": self.configure_lr_scheduler(optimizer)}

    def configure_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Linear warm-up, then half a cosine to 0, step by step."""
        euclidean = [group.get("name", "").startswith("euclidean") for group in optimizer.param_groups]
        for group, unconstrained in zip(optimizer.param_groups, euclidean, strict=True):
            if self.euclidean_lr is not None and unconstrained:
                group["lr"] = self.euclidean_lr * group.get("lr_factor", 1.0)
        total = int(self.trainer.estimated_stepping_batches)
        rising = max(round(self.warmup * total), 1)

        def factor(step: int, power: float) -> float:
            cosine = (1 + math.cos(math.pi * min(step / total, 1.0))) / 2
            return float(min((step + 1) / rising, 1.0) * cosine**power)

        powers = [self.power if unconstrained else self.constrained_power for unconstrained in euclidean]
        factors: list[Callable[[int], float]] = [partial(factor, power=power) for power in powers]
        return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factors), "interval": "step"}


class Diverged(ArithmeticError):
    """The training loss is not finite any more."""


class Curve(Callback):
    """Keeps training loss and validation error of every epoch.

    Raises:
        Diverged: when a loss is NaN or infinite.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._val = math.nan

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        if not math.isfinite(float(outputs["loss"])):
            raise Diverged(f"epoch {trainer.current_epoch + 1}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        self._val = pl_module.error()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        loss = float(torch.stack(pl_module.losses).mean())
        self.epochs.append({"epoch": trainer.current_epoch + 1, "train_loss": loss, "val_error": self._val})
        self._val = math.nan


def train(
    config: dict[str, Any], seed: int, *, test: bool, root: str, device: str = "cpu", watch: bool = False
) -> Outcome:
    """Run one configuration with one seed.

    Args:
        config: ``data`` (of :class:`~recipes.experiments.data.Task`), ``network`` (of
            :func:`~recipes.experiments.networks.build`), ``epochs``, ``validate_every`` and ``method``; all other
            entries are options of the method, of its callbacks for ``fgsgd``, but for the names of :data:`MEASURED`.
        seed: of the images that are drawn, the network's start, the batches and the index sets.
        test: whether the test images are looked at.
        root: folder of the data.
        device: ``"cpu"`` or ``"cuda:<n>"``.
        watch: whether to keep norms, bounds, λ and R by layer and epoch, of ``fgsgd``.
    """
    _quiet()
    options = dict(config)
    data = Task(root=root, seed=seed, **options.pop("data"))
    network, epochs = options.pop("network"), options.pop("epochs")
    every, method = options.pop("validate_every", 1), options.pop("method")
    bn_momentum = options.pop("bn_momentum", None)
    watching = {name: kind() for name, kind in MEASURED.items() if options.pop(name, False)}
    module_options = {name: options.pop(name) for name in MODULE if name in options}
    carried = method != "fgsgd" or options.pop("carried", True)
    rates = options.get("rates")
    callbacks, options = callbacks_of(method, options, seed, watch)
    if not carried:
        options["fused"] = False

    seed_everything(seed, verbose=False)
    net = build(data.num_classes, **network)
    expects: dict[str, Any] = GREY
    kept = None
    if network.get("pretrained"):
        expects = resolve_model_data_config(net)
        kept = Kept(net, data, Classifier(net, "sgd", {}, expects).normalize)
        net.reset_classifier(data.num_classes)  # type: ignore[operator]
    for norm in (m for m in net.modules() if isinstance(m, _BatchNorm) and bn_momentum is not None):
        norm.momentum = bn_momentum
    net = net.to(memory_format=torch.channels_last)
    module = Classifier(net, method, options, expects, **module_options)
    curve = Curve()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=[int(device.partition(":")[2] or 0)] if device.startswith("cuda") else 1,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        callbacks=[curve, *callbacks, *watching.values()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    measured = {name: callback.epochs for name, callback in watching.items()}
    try:
        with (
            nullcontext() if carried else momentum_left_behind(),
            rates_by_manifold(rates) if rates else nullcontext(),
        ):
            trainer.fit(module, data)
    except (Diverged, FloatingPointError):  # FGSGD raises the latter where gradients are not finite
        errors = ("train_loss", "val_error", *(("test_error",) if test else ()))
        lost = {"seconds": time.perf_counter() - began, **dict.fromkeys(errors, math.nan)}
        return Outcome(lost, curve.epochs, measured=measured)
    numbers = {"seconds": time.perf_counter() - began} | curve.epochs[-1]
    del numbers["epoch"]
    if test:
        trainer.test(module, data, verbose=False)
        numbers["test_error"] = module.error()
    if kept is not None:
        numbers |= kept.measure(net)
    history = (_history(callbacks) or None) if watch else None
    return Outcome(numbers, curve.epochs, history, measured)


class Kept:
    """What of a pretrained network is measured again once it is fine-tuned: on photographs, and on the task's images."""

    def __init__(self, net: nn.Module, data: Task, normalize: Any) -> None:
        images = torch.stack([data.val[i][0] for i in range(min(500, len(data.val)))])
        self.photographs = Forgetting(net, photographs(data.train.size), normalize)
        self.task = Forgetting(net, images, normalize)

    def measure(self, net: nn.Module) -> dict[str, float]:
        """The columns of a row, see :class:`~recipes.experiments.forgetting.Forgetting`."""
        return self.photographs.measure(net) | {"drift_task": self.task.drift(net)}


def _history(callbacks: list[Callback]) -> dict[str, Any]:
    history: dict[str, Any] = {}
    for callback in callbacks:
        if isinstance(callback, FeatureStdRescaling):
            history["rescaling"] = callback.history
        elif isinstance(callback, NormBoundMonitor):
            history["norms"] = {"history": callback.history, "start": callback.start}
    return history


def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # of torch, on what Lightning calls


def provenance() -> dict[str, str]:
    """Git commit of the checkout, marked where files differ from it, and versions of the packages, as JSON."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(("git", *command), cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/lightning_fgsgd", ":/recipes/*.py")
    return {
        "commit": commit + ("-changed" if changed else ""),
        "versions": json.dumps({name: version(name) for name in PACKAGES}),
    }

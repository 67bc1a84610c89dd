"""What a fine-tuned network has forgotten of the pretrained one, measured on images that neither was trained for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div, log_softmax
from torch.nn.modules.batchnorm import _BatchNorm

# Those that come inside the packages; scikit-image's others are fetched over the network.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def photographs(size: int, crops: int = 50) -> Tensor:
    """Crops of the colour photographs of scikit-learn and scikit-image, (6 * crops, 3, size, size) in [0, 1].

    Squares of a quarter of the photograph's height up to all of it, at random places, the same ones at every call.

    Args:
        size: height and width of the crops, in pixels.
        crops: of each photograph.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "photographs: what is forgotten is measured on those of scikit-image; pip install scikit-image"
        ) from error
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    found = []
    for photograph in [*load_sample_images().images, *(getattr(data, name)() for name in PHOTOGRAPHS)]:
        whole = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float() / 255
        height, width = whole.shape[-2:]
        for _ in range(crops):
            side = int(rng.uniform(0.25, 1) * min(height, width))
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = whole[..., top : top + side, left : left + side]
            found.append(interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(found).clamp(0, 1)


class Forgetting:
    """Remembers what a pretrained timm classifier makes of some images, and compares what it makes of them later.

    Args:
        pretrained: a timm model with its pretrained classifier.
        images: (N, C, H, W) in [0, 1].
        normalize: from such images to what the network takes; called at the start only, where ``pretrained`` is.
        batch_size: images that pass the network at a time, at least 2: batch norm takes a variance over them.

    Raises:
        ValueError: the model has no classifier that can be told from its features, or there are too few images.
    """

    def __init__(
        self, pretrained: nn.Module, images: Tensor, normalize: Callable[[Tensor], Tensor], batch_size: int = 64
    ) -> None:
        head = pretrained.get_classifier() if hasattr(pretrained, "get_classifier") else None  # type: ignore[operator]
        if not isinstance(head, nn.Linear) or not hasattr(pretrained, "forward_head"):
            raise ValueError(
                f"pretrained: {type(pretrained).__name__} has no Linear classifier (timm's get_classifier) to read its "
                "features by"
            )
        for what, value in (("images", len(images)), ("batch_size", batch_size)):
            if value < 2:
                raise ValueError(f"{what}: {value} is less than 2, of which batch norm could take no variance")
        self.batch_size = batch_size
        device = next(pretrained.parameters()).device
        with torch.no_grad():  # normalised here, once: what normalises may hold tensors that move later
            self.images = torch.cat([normalize(batch.to(device)).cpu() for batch in images.split(batch_size)])
        # Its own copy: the network's classifier is replaced, or trained on.
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.features = self.features_of(pretrained)
        self.logits = self._through_old_head(self.features)
        self.recalibrated_logits = self._recalibrated_logits(pretrained, self.logits)

    def measure(self, net: nn.Module) -> dict[str, float]:
        """Compare a network that was fine-tuned from the pretrained one; its own classifier does not matter.

        Returns:
            ``agreement``, % of the images whose first class through the old classifier is what it was;
            ``agreement_recalibrated``, the same between both networks once their batch norms have taken their statistics
            from these images, in the order and the batches in which they are here: how alike the weights are whatever the
            norms had, not what is still known, for the pretrained network may itself give other answers then;
            ``divergence``, the mean of KL(before ‖ now) of the classes' probabilities, in nats; and ``drift``.

        Raises:
            ValueError: the network has no features, or others than the pretrained one.
        """
        features = self.features_of(net)
        logits = self._through_old_head(features)
        recalibrated = self._recalibrated_logits(net, logits)
        # In double precision: the rounding errors of single ones make small divergences negative.
        before, now = log_softmax(self.logits.double(), 1), log_softmax(logits.double(), 1)
        return {
            "agreement": _agreement(logits, self.logits),
            "agreement_recalibrated": _agreement(recalibrated, self.recalibrated_logits),
            "divergence": float(kl_div(now, before, reduction="batchmean", log_target=True)),
            "drift": self.drift(net, features),
        }

    def drift(self, net: nn.Module, features: Tensor | None = None) -> float:
        """‖F − F⁰‖ / ‖F⁰‖ (Frobenius) of the pooled features F of ``net`` and those before, F⁰, both (N, C)."""
        now = self.features_of(net) if features is None else features
        return float((now - self.features).norm() / self.features.norm())

    @torch.no_grad()
    def features_of(self, net: nn.Module) -> Tensor:
        """Features (N, C) that enter the classifier of ``net`` in evaluation mode, on the CPU."""
        if not hasattr(net, "forward_head"):
            raise ValueError(f"net: {type(net).__name__} is no timm model, it has no forward_head to read features by")
        with _modes(net, train=lambda module: False):
            features = torch.cat([self._features(net, batch) for batch in self.images.split(self.batch_size)])
        if features.shape != (wanted := (len(self.images), self.head.in_features)):
            raise ValueError(f"net: {type(net).__name__} has features {tuple(features.shape)}, not {wanted}")
        return features

    @torch.no_grad()
    def recalibrated(self, net: nn.Module) -> nn.Module:
        """A copy of ``net`` whose batch norms have the mean and variance of these images, averaged over batches."""
        net = copy.deepcopy(net)
        norms = _norms(net)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        with _modes(net, train=lambda module: module in norms):
            for batch in self.images.split(self.batch_size):
                if len(batch) > 1 and norms:
                    self._features(net, batch)
        return net

    def _features(self, net: Any, batch: Tensor) -> Tensor:
        device = next(net.parameters()).device
        features: Tensor = net.forward_head(net.forward_features(batch.to(device)), pre_logits=True)
        return features.cpu()

    @torch.no_grad()
    def _through_old_head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head.cpu()(features)
        return logits

    def _recalibrated_logits(self, net: nn.Module, logits: Tensor) -> Tensor:
        return self._through_old_head(self.features_of(self.recalibrated(net))) if _norms(net) else logits


def _agreement(logits: Tensor, before: Tensor) -> float:
    return 100 * float((logits.argmax(1) == before.argmax(1)).float().mean())


def _norms(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def _modes(net: nn.Module, train: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put each module into the mode that ``train`` says, and back."""
    before = {module: module.training for module in net.modules()}
    for module in before:
        module.training = train(module)
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training

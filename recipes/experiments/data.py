"""Images of an experiment, held in memory: a training set of so many images a class, drawn anew for every seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset

from recipes.data import labelled_idx

SOURCES = ("fashion_mnist", "digits")


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Grey images as bytes (N, H, W), read a batch at a time: float (B, 1, size, size) in [0, 1], and labels (B,).

    Args:
        images: (N, H, W), uint8.
        labels: (N,), int64.
        size: height and width of what comes out; bilinear where that is not the images' own.
        shift: each image is moved by up to so many pixels either way, at random.
        mirror: each image is mirrored or not, at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, shift: int = 0, mirror: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.size = size
        self.shift = shift
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: the loader asks for it by this name."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen, None].float() / 255
        if self.size != images.shape[-1]:
            images = interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        if self.mirror:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        return (shifted(images, self.shift) if self.shift else images), self.labels[chosen]


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image of a batch (B, C, H, W) moved by up to ``most`` pixels in either direction, black coming in."""
    count, _, height, width = images.shape
    padded = pad(images, (most, most, most, most))
    rows = torch.randint(2 * most + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * most + 1, (count, 1)) + torch.arange(width)
    which = torch.arange(count)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Task(LightningDataModule):
    """A classification task of an experiment: ``train``, ``val`` and ``test`` after ``setup``.

    The training images (``per_class`` of each class, or all) and the validation images (``validation`` of them) are drawn,
    without overlap, from the source's training images by ``seed``; the test images are always the source's own, all of them.

    Args:
        source: ``"fashion_mnist"``, 60 000 images and 10 000 to test (a folder of its four IDX files), or ``"digits"``,
            scikit-learn's, 1437 and 360.
        root: folder of the IDX files.
        per_class: training images of each class; None takes all that are not for validation.
        validation: number of validation images.
        size: height and width of the images, in pixels.
        batch_size: images in a batch; at most the whole training set.
        shift, mirror: augmentation of training images, see :class:`Images`.
        seed: of the draw.

    Raises:
        ValueError: an unknown source, or more images than there are.
    """

    num_classes = 10

    def __init__(
        self,
        source: str,
        root: str = "",
        per_class: int | None = None,
        validation: int = 5000,
        size: int = 28,
        batch_size: int = 128,
        shift: int = 0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"data.source: unknown source {source!r}; choose from {', '.join(map(repr, SOURCES))}")
        (images, labels), test = _fashion_mnist(root) if source == "fashion_mnist" else _digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        if not 0 < validation < len(labels):
            raise ValueError(f"data.validation: {validation} is not between 1 and {len(labels) - 1}")
        held_out, rest = order[:validation], order[validation:]
        if per_class is not None:
            rest = torch.cat([_first(rest, labels, c, per_class) for c in range(self.num_classes)])
        self.train = Images(images[rest], labels[rest], size, shift, mirror)
        self.val = Images(images[held_out], labels[held_out], size)
        self.test = Images(*test, size)
        self.batch_size = min(batch_size, len(rest))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, whole batches only."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images in order."""
        return DataLoader(self.val, 250, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images in order."""
        return DataLoader(self.test, 250, collate_fn=_as_it_is)


def _first(candidates: Tensor, labels: Tensor, label: int, count: int) -> Tensor:
    found = candidates[labels[candidates] == label]
    if len(found) < count:
        raise ValueError(f"data.per_class: {count} is more than the {len(found)} images there are of class {label}")
    return found[:count]


def _as_it_is(batch: Any) -> Any:
    return batch


def _fashion_mnist(root: str) -> tuple[tuple[Tensor, Tensor], ...]:
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"root: there is no folder {root!r}; give the folder of Fashion-MNIST's IDX files, --root"
        )
    return tuple(_tensors(*labelled_idx(Path(root), part)) for part in ("train", "t10k"))


def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return tuple(_tensors(images[part], labels[part]) for part in parts)


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))

"""Data sets as LightningDataModules. Images come out as float tensors (3, H, W) in [0, 1]; the model normalises them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Subset, random_split


class ImageData(LightningDataModule):
    """What the recipes expect of data: ``num_classes``, and the sets ``train``, ``val`` and ``test`` after ``setup``.

    Args:
        image_size: height and width of the images that come out, in pixels.
        batch_size: images in a batch.
        num_workers: processes that load; 0 loads in the training process.
        seed: of the split into training and validation set.
    """

    num_classes: int
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]

    def __init__(self, image_size: int = 64, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}: {value} is less than {least}")
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, whole batches only (a batch of one would break batch norm)."""
        if len(self.train) < self.batch_size:  # type: ignore[arg-type]
            raise ValueError(
                f"data.batch_size: {self.batch_size} is more than the {len(self.train)} training images"  # type: ignore[arg-type]
            )
        return self._loader(self.train, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation set in order."""
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test set in order."""
        return self._loader(self.test)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **options,
        )

    def _split(self, dataset: Dataset[Any], val_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
        """Part of a training set for validation, always the same one."""
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction: {val_fraction} is not between 0 and 1")
        generator = torch.Generator().manual_seed(self.seed)
        train, val = random_split(dataset, [1 - val_fraction, val_fraction], generator=generator)
        return train, val


class GrayImages(Dataset[tuple[Tensor, Tensor]]):
    """Grey images in memory, as bytes; each is brought to ``size`` and three channels when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int) -> None:
        self.images = torch.from_numpy(images.copy())
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].float()[None, None] / 255
        image = interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        return image[0].expand(3, -1, -1), self.labels[index]


class Digits(ImageData):
    """scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels; a fifth for testing, a tenth for validation."""

    num_classes = 10

    def setup(self, stage: str) -> None:
        """Split by class, always the same way for one seed."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        rest, self.test = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=self.seed
        )
        train, val = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=self.seed)
        self.train, self.val, self.test = (
            GrayImages(images[part], labels[part], self.image_size) for part in (train, val, self.test)
        )


class IDXFolder(ImageData):
    """A folder of the four IDX files of MNIST, Fashion-MNIST and their kin, gzip'd or not.

    Args:
        root: folder of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte
            (with or without .gz).
        num_classes: number of classes.
        val_fraction: share of the training images kept for validation.
        options: those of :class:`ImageData`.
    """

    def __init__(self, root: str, num_classes: int = 10, val_fraction: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.root = _folder(root)
        self.num_classes = num_classes
        self.val_fraction = val_fraction

    def setup(self, stage: str) -> None:
        """Read the four files."""
        train, test = (GrayImages(*labelled_idx(self.root, part), self.image_size) for part in ("train", "t10k"))
        most = max(int(part.labels.max()) for part in (train, test) if len(part))
        if most >= self.num_classes:
            raise ValueError(
                f"data.num_classes: {self.num_classes} was given, but {str(self.root)!r} has a label {most}"
            )
        self.train, self.val = self._split(train, self.val_fraction)
        self.test = test


class TimmData(ImageData):
    """Any data set of ``timm.data.create_dataset``, with timm's transforms.

    Args:
        dataset: its name: "" for a folder of images in one folder a class (with or without train and validation folders
            above), ``torch/cifar10``, ``torch/cifar100``, ``torch/imagenet`` and others of torchvision, ``hfds/<name>`` for
            a data set of the Hugging Face hub (needs the package ``datasets``).
        root: folder of the data, or where to keep what is downloaded.
        num_classes: number of classes.
        train_split, val_split, test_split: names of the splits; without ``val_split`` a part of the training images is kept
            for validation, without ``test_split`` the validation images are tested.
        val_fraction: that part.
        download: fetch the data set where it is missing, if its name allows that.
        transform: further arguments of timm's ``create_transform`` for training, ``auto_augment`` or ``re_prob`` say.
        options: those of :class:`ImageData`.
    """

    def __init__(
        self,
        root: str,
        num_classes: int,
        dataset: str = "",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "validation",
        val_fraction: float = 0.1,
        download: bool = False,
        transform: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = str(_folder(root, may_be_empty=download or dataset.startswith("hfds/")))
        self.num_classes = num_classes
        self.dataset = dataset
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.val_fraction = val_fraction
        self.download = download
        self.transform = transform or {}

    def prepare_data(self) -> None:
        """Download once, on one process."""
        if self.download:
            self._create("train", training=True)

    def setup(self, stage: str) -> None:
        """Open the splits."""
        train = self._create("train", training=True)
        if self.splits["val"] is None:
            # Two views of the same images: augmented for training, plain for validation.
            self.train, held_out = self._split(train, self.val_fraction)
            self.val = Subset(self._create("train", training=False), held_out.indices)
        else:
            self.train, self.val = train, self._create("val", training=False)
        self.test = self.val if self.splits["test"] is None else self._create("test", training=False)

    def _create(self, split: str, training: bool) -> Dataset[Any]:
        # A mean of 0 and a deviation of 1 leave the images in [0, 1]: the model normalises.
        transform = create_transform(
            self.image_size, is_training=training, mean=(0, 0, 0), std=(1, 1, 1), **(self.transform if training else {})
        )
        name = self.splits[split]
        assert name is not None
        dataset = create_dataset(self.dataset, self.root, name, is_training=training, download=self.download)
        transform.transforms.insert(0, _in_colour)
        dataset.transform = transform
        reader = getattr(dataset, "reader", dataset)
        classes = getattr(reader, "class_to_idx", None)
        found = len(set(classes.values())) if classes else 0  # torchvision's ImageNet has several names for a class
        if classes and found != self.num_classes:
            raise ValueError(f"data.num_classes: {self.num_classes} was given, but {self.root!r} has {found} classes")
        if classes and split == "train":
            self._classes = classes
        elif classes and classes != self._classes:
            raise ValueError(
                f"data.{split}_split: {name!r} has other classes than {self.splits['train']!r} in {self.root!r}"
            )
        if self.dataset == "" and split != "train" and Path(reader.root) == Path(self.root):
            # timm takes the folder itself where it finds none for the split: training images would be tested.
            raise FileNotFoundError(
                f"data.{split}_split: there is no folder {name!r} in {self.root!r}; name another, or null to do without"
            )
        return dataset


def labelled_idx(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one part, ``"train"`` or ``"t10k"``, of the four IDX files of a folder."""
    images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise ValueError(f"data.root: {str(folder)!r} has {len(images)} images and {len(labels)} labels of {part!r}")
    return images, labels


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an IDX file of bytes (the format of MNIST), gzip'd or not."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opener(path, "rb") as file:
                data = file.read()
            break
    else:
        raise FileNotFoundError(f"data.root: {str(folder)!r} holds neither {name}.gz nor {name}")
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"data.root: {path} is not an IDX file of bytes")
    dims: Sequence[int] = np.frombuffer(data, ">i4", count=data[3], offset=4).tolist()
    offset = 4 + 4 * data[3]
    if len(data) - offset != int(np.prod(dims)):
        raise ValueError(f"data.root: {path} is cut short: {len(data) - offset} bytes instead of {int(np.prod(dims))}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(dims)


def _in_colour(image: Any) -> Any:
    """A PIL image with the three channels that the transforms and the model expect."""
    return image.convert("RGB")


def _folder(root: str, may_be_empty: bool = False) -> Path:
    path = Path(root)
    if may_be_empty:
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"data.root: there is no folder {root!r}; give the folder that holds the data set")
    if not any(path.iterdir()):
        raise FileNotFoundError(f"data.root: the folder {root!r} is empty; put the data set there")
    return path

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from recipes.data import Digits, IDXFolder, TimmData, read_idx

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES.reshape(-1, 8, 8) * 15).astype(np.uint8)
LABELS = LABELS.astype(np.uint8)


def write_idx(path, array, zipped=True):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    (gzip.open if zipped else open)(path, "wb").write(header + array.tobytes())


def idx_folder(folder, zipped=True):
    for part, rows in (("train", slice(0, 100)), ("t10k", slice(100, 140))):
        for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
            write_idx(folder / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}", array[rows], zipped)
    return str(folder)


def image_folder(folder, splits=("train", "validation", "test"), classes=3):
    for s, split in enumerate(splits):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in np.flatnonzero(label == LABELS)[8 * s : 8 * s + 8]:
                Image.fromarray(IMAGES[i]).resize((40, 40)).save(folder / split / f"class{label}" / f"{i}.png")
    return str(folder)


def test_digits_are_split_by_class_without_overlap():
    data = Digits(image_size=16)
    data.setup("fit")
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sizes == [1257, 180, 360]
    rows = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.val, data.test)]
    assert not rows[0] & rows[2]
    for part in (data.train, data.val, data.test):
        share = torch.bincount(part.labels) / len(part)
        assert share.min() > 0.08
    image, label = data.train[0]
    assert image.shape == (3, 16, 16)
    assert 0 <= image.min() <= image.max() <= 1
    assert label.dtype == torch.int64


@pytest.mark.parametrize("zipped", [True, False])
def test_an_idx_folder_gives_its_images(tmp_path, zipped):
    data = IDXFolder(idx_folder(tmp_path, zipped), image_size=8, batch_size=10, val_fraction=0.2)
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [80, 20, 40]
    image, label = data.test[3]
    np.testing.assert_allclose(image[1].numpy() * 255, IMAGES[103], atol=1e-3)
    assert label == LABELS[103]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (10, 3, 8, 8)
    assert labels.shape == (10,)


def test_bad_idx_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root: there is no folder '.*missing'; give the folder"):
        IDXFolder(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"data\.root: the folder .* is empty"):
        IDXFolder(str(tmp_path))
    (tmp_path / "readme").touch()
    with pytest.raises(
        FileNotFoundError, match=r"holds neither train-images-idx3-ubyte\.gz nor train-images-idx3-ubyte"
    ):
        IDXFolder(str(tmp_path)).setup("fit")
    write_idx(tmp_path / "short", IMAGES[:2], zipped=False)
    (tmp_path / "short").write_bytes((tmp_path / "short").read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut short: 127 bytes instead of 128"):
        read_idx(tmp_path, "short")
    (tmp_path / "other").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not an IDX file"):
        read_idx(tmp_path, "other")


def test_an_image_folder_gives_its_splits(tmp_path):
    data = TimmData(image_folder(tmp_path), num_classes=3, image_size=32, batch_size=4)
    data.splits.update(val="validation", test="test")
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 24, 24]
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1


def test_validation_images_held_out_of_training_are_not_augmented(tmp_path):
    root = image_folder(tmp_path, splits=("train",))
    data = TimmData(root, num_classes=3, test_split=None, val_fraction=0.25, image_size=32)
    data.setup("fit")
    assert (len(data.train), len(data.val)) == (18, 6)
    assert not set(data.train.indices) & set(data.val.indices)
    assert torch.equal(data.val[0][0], data.val[0][0])
    assert not all(torch.equal(data.train[i][0], data.train[i][0]) for i in range(10))


def test_bad_image_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root: there is no folder"):
        TimmData(str(tmp_path / "missing"), num_classes=3)
    with pytest.raises(FileNotFoundError, match="is empty"):
        TimmData(str(tmp_path), num_classes=3)
    root = image_folder(tmp_path, splits=("train", "validation"))
    with pytest.raises(ValueError, match=r"data\.num_classes: 5 was given, but .* has 3 classes"):
        TimmData(root, num_classes=5).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"data\.test_split: there is no folder 'test' in"):
        TimmData(root, num_classes=3, test_split="test").setup("fit")
    (tmp_path / "validation" / "class0").rename(tmp_path / "validation" / "other")
    with pytest.raises(ValueError, match=r"data\.test_split: 'validation' has other classes"):
        TimmData(root, num_classes=3).setup("fit")


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    root = idx_folder(tmp_path, zipped=False)
    with pytest.raises(ValueError, match=r"data\.num_classes: 9 was given, but .* has a label 9"):
        IDXFolder(root, num_classes=9).setup("fit")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS[:7], zipped=False)
    with pytest.raises(ValueError, match=r"data\.root: .* has 40 images and 7 labels of 't10k'"):
        IDXFolder(root).setup("fit")


def test_grey_images_of_torchvision_have_three_channels(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    idx_folder(folder, zipped=False)
    data = TimmData(
        str(tmp_path), num_classes=10, dataset="torch/mnist", image_size=8, batch_size=4, transform={"crop_pct": 1.0}
    )
    data.setup("fit")
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 8, 8)
    image, label = data.test[3]
    assert label == LABELS[103]
    assert torch.equal(image[0], image[2])
    assert image.mean() == pytest.approx(IMAGES[103].mean() / 255, rel=0.3)


def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch):
    # The real reader on a small archive in CIFAR's own format; only the checksum of the true files is waived.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.zeros((6, 3, 32, 32), np.uint8)
    pixels[:, 1] = 200
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(6, -1), "labels": [0, 1, 2, 3, 4, 9]}))
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    data = TimmData(str(tmp_path), num_classes=10, dataset="torch/cifar10", image_size=32, batch_size=4)
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 6]
    image, label = data.test[5]
    assert label == 9
    assert image[1].mean() == pytest.approx(200 / 255, abs=0.02)


def test_imagenet_is_read_through_torchvision_with_several_names_for_a_class(tmp_path):
    # As torchvision's own ImageNet wants it: meta.bin, and a folder a class, whose names are synonyms.
    wnids = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish", "Carassius auratus")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            folder = tmp_path / split / wnid
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "0.jpeg")
    options = {
        "dataset": "torch/imagenet",
        "root": str(tmp_path),
        "image_size": 32,
        "num_workers": 0,
        "test_split": None,
    }
    data = TimmData(**options, val_split="validation", num_classes=2)
    data.setup("fit")
    assert (len(data.train), len(data.val)) == (2, 2)
    with pytest.raises(ValueError, match=r"data\.num_classes: 4 was given, but .* has 2 classes"):
        TimmData(**options, val_split="validation", num_classes=4).setup("fit")


def test_a_hub_data_set_is_read_through_datasets(tmp_path):
    # The Hugging Face reader on a local folder: the same code path as a name on the hub, without the download.
    image_folder(tmp_path / "mine", splits=("train", "test"))
    data = TimmData(
        str(tmp_path / "cache"),
        num_classes=3,
        dataset=f"hfds/{tmp_path / 'mine'}",
        test_split="test",
        image_size=32,
        batch_size=4,
    )
    data.setup("fit")
    assert len(data.test) == 24
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert set(labels.tolist()) <= {0, 1, 2}


def test_impossible_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.batch_size: 0 is less than 1"):
        Digits(batch_size=0)
    data = IDXFolder(idx_folder(tmp_path), batch_size=512)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"data\.batch_size: 512 is more than the 90 training images"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"data\.val_fraction: 1\.5 is not between 0 and 1"):
        IDXFolder(str(tmp_path), val_fraction=1.5).setup("fit")

import gzip

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from recipes.experiments.data import Images, Task, shifted


@pytest.fixture
def idx_folder(tmp_path):
    """Fashion-MNIST's four files with 200 and 50 images; each image's first pixel is its number."""
    for part, count in (("train", 200), ("t10k", 50)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return str(tmp_path)


def numbers(images):
    return set(images.images[:, 0, 0].tolist())


def test_training_and_validation_images_are_drawn_by_class_and_seed_without_overlap(idx_folder):
    task = Task("fashion_mnist", idx_folder, per_class=5, validation=60, seed=3)
    assert torch.bincount(task.train.labels).tolist() == [5] * 10
    assert len(task.val) == 60
    assert not numbers(task.train) & numbers(task.val)
    assert len(numbers(task.train)) == 50
    again = Task("fashion_mnist", idx_folder, per_class=5, validation=60, seed=3)
    assert numbers(again.train) == numbers(task.train)
    other = Task("fashion_mnist", idx_folder, per_class=5, validation=60, seed=4)
    assert numbers(other.train) != numbers(task.train)
    assert numbers(other.test) == set(range(50))  # all of them, whatever the seed


def test_fewer_images_a_class_are_some_of_the_more(idx_folder):
    few, more = (Task("fashion_mnist", idx_folder, per_class=n, validation=60, seed=0) for n in (2, 5))
    assert numbers(few.train) < numbers(more.train)


def test_all_images_train_that_are_not_for_validation(idx_folder):
    task = Task("fashion_mnist", idx_folder, validation=60)
    assert numbers(task.train) | numbers(task.val) == set(range(200))
    assert len(task.train) == 140


def test_digits_never_tests_on_what_it_trains_on():
    task = Task("digits", validation=100, size=8)
    seen = {image.numpy().tobytes() for part in (task.train, task.val) for image in part.images}
    assert len(task.train) + len(task.val) + len(task.test) == 1797
    assert sum(image.numpy().tobytes() in seen for image in task.test.images) <= 2  # duplicates in the data themselves


def test_a_batch_is_what_its_images_are_one_by_one(idx_folder):
    task = Task("fashion_mnist", idx_folder, per_class=5, validation=60, size=40, batch_size=16)
    images, labels = next(iter(task.val_dataloader()))
    assert images.shape == (60, 1, 40, 40)
    one = task.val.images[7].float()[None, None] / 255
    expected = interpolate(one, size=(40, 40), mode="bilinear", align_corners=False)[0]
    assert torch.equal(images[7], expected)
    assert torch.equal(labels, task.val.labels)
    batches = list(task.train_dataloader())
    assert [len(batch[1]) for batch in batches] == [16, 16, 16]


def test_a_batch_is_never_more_than_the_training_set(idx_folder):
    task = Task("fashion_mnist", idx_folder, per_class=1, validation=60, batch_size=64)
    assert [len(labels) for _, labels in task.train_dataloader()] == [10]


def test_shifted_images_are_moved_whole_with_black_coming_in():
    images = torch.rand(64, 2, 9, 7) + 0.1
    torch.manual_seed(0)
    moved = shifted(images, 2)
    assert moved.shape == images.shape
    found = set()
    for before, after in zip(images, moved, strict=True):
        fits = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = torch.zeros_like(before)
                rows, columns = slice(max(down, 0), 9 + min(down, 0)), slice(max(right, 0), 7 + min(right, 0))
                source = before[:, max(-down, 0) : 9 - max(down, 0), max(-right, 0) : 7 - max(right, 0)]
                expected[:, rows, columns] = source
                fits += [(down, right)] if torch.equal(expected, after) else []
        assert len(fits) == 1
        found |= set(fits)
    assert len(found) > 12  # of 25


def test_mirrored_images_are_the_image_or_its_mirror_image_about_half_the_time():
    images = torch.randint(256, (400, 6, 6), dtype=torch.uint8)
    dataset = Images(images, torch.zeros(400, dtype=torch.long), 6, mirror=True)
    torch.manual_seed(0)
    batch, _ = dataset.__getitems__(list(range(400)))
    plain = images[:, None].float() / 255
    same = (batch == plain).flatten(1).all(1)
    assert ((batch == plain.flip(-1)).flatten(1).all(1) | same).all()
    assert 150 < int(same.sum()) < 250


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "mnist"}, ValueError, "data.source: unknown source 'mnist'"),
        ({"source": "fashion_mnist", "root": "nowhere"}, FileNotFoundError, "there is no folder 'nowhere'"),
        ({"source": "digits", "validation": 0}, ValueError, "data.validation: 0"),
        ({"source": "digits", "per_class": 1000, "validation": 10}, ValueError, "data.per_class: 1000 is more than"),
    ],
)
def test_impossible_data_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Task(**options)

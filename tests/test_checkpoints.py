"""A fit that is interrupted anywhere and resumed ends as one that was not, and what does not fit is refused."""

import itertools
import multiprocessing
import random
import signal
import time
import warnings
from collections.abc import Mapping, Sequence

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fgsgd import FeatureStdRescaling, NormBoundMonitor, POMGrouping
from tests.lit import LitTiny, loader, trainer

EPOCHS, BATCHES = 4, 5


class InOrder:
    """Shuffles by a seed and the epoch, which Lightning sets; each order can be had without those before it."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8 * BATCHES

    def __iter__(self):
        yield from torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Resumable(DataLoader):
    """Saves how many batches of the epoch it has given, and goes on from there. What Lightning asks of a loader."""

    given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]

    def __iter__(self):
        first, self.given = self.given % len(self), 0
        for i, batch in enumerate(super().__iter__()):
            self.given = i + 1
            if i >= first:
                yield batch


class WithSchedule(LitTiny):
    def configure_lr_scheduler(self, optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "step"}


def resumable_fit(folder, *callbacks, start="preserve", ckpt_path=None, **options):
    """The end of a fit: everything that is to be the same."""
    torch.manual_seed(7)
    module, data = WithSchedule(), loader(8 * BATCHES).dataset
    ours = POMGrouping(start=start, seed=4), FeatureStdRescaling(every_n_batches=2), NormBoundMonitor()
    options = {"max_epochs": EPOCHS, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options}
    fit = trainer(folder, *ours, *callbacks, enable_checkpointing=True, **options)
    fit.fit(module, Resumable(data, batch_size=8, sampler=InOrder()), loader(8), ckpt_path=ckpt_path)
    (optimizer,) = fit.optimizers
    return {
        "step": fit.global_step,
        "weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": fit.lr_scheduler_configs[0].scheduler.state_dict(),
        "callbacks": {type(callback).__name__: callback.state_dict() for callback in ours},
    }


def differences(a, b, path=""):
    """The paths at which two states differ by a bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if type(a) is not type(b):
        return [path]
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return list(itertools.chain.from_iterable(differences(a[key], b[key], f"{path}/{key}") for key in a))
    if isinstance(a, Sequence) and not isinstance(a, str):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        pairs = zip(a, b, strict=True)
        return list(itertools.chain.from_iterable(differences(x, y, f"{path}/{i}") for i, (x, y) in enumerate(pairs)))
    return [] if a == b else [path]


def test_differences_notices_a_bit():
    a = {"x": [torch.zeros(3), {"y": 1.0}], "z": "s"}
    b = {"x": [torch.zeros(3), {"y": 1.0}], "z": "s"}
    assert differences(a, b) == []
    b["x"][0][1] = torch.finfo(torch.float32).tiny
    b["x"][1]["y"] = 1.0 + 2**-52
    assert differences(a, b) == ["/x/0", "/x/1/y"]


MOMENTS = {
    "after a batch": {"every_n_train_steps": 1},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "after an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fit_goes_on_bit_for_bit_from_any_of_its_checkpoints(tmp_path, moment):
    saved = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **MOMENTS[moment])
    whole = resumable_fit(tmp_path / "whole", saved)
    assert len(whole["callbacks"]["FeatureStdRescaling"]["history"]) == EPOCHS
    assert len(whole["callbacks"]["NormBoundMonitor"]["history"]) == EPOCHS + 1
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == (EPOCHS * BATCHES if moment == "after a batch" else EPOCHS)
    for path in paths:
        if moment == "after an epoch" and path.name.startswith(f"epoch={EPOCHS - 1}"):
            continue  # nothing is left to do: Lightning leaves fit before it restores
        assert differences(resumable_fit(tmp_path / "resumed", ckpt_path=path), whole) == [], path.name


# Killed ---------------------------------------------------------------------------------------------------------------


class Progress(Callback):
    """Says in a file which batch is under way."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with self.path.open("a") as file:
            file.write("x")


def to_the_end(folder, start, every, ckpt_path=None):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every)
    end = resumable_fit(folder, saved, Progress(folder / "progress"), start=start, ckpt_path=ckpt_path)
    torch.save(end, folder / "end.pt")


def newest_whole(folder):
    """The newest checkpoint that can be read, and how many newer ones cannot: they were being written."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for torn, path in enumerate(paths):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path, torn
    raise AssertionError(f"no whole checkpoint among {paths}")


@pytest.mark.slow
def test_a_fit_that_is_killed_20_times_out_of_20_and_resumed_ends_bit_for_bit_as_if_it_were_not(
    tmp_path, record_property
):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytorch_lightning", "timm", "lightning_fgsgd"])
    chance = random.Random(0)
    whole, told = {}, []
    for start in ("preserve", "project", "random"):
        folder = tmp_path / start
        folder.mkdir()
        alone = processes.Process(target=to_the_end, args=(folder, start, 1))
        alone.start()
        alone.join()
        whole[start] = torch.load(folder / "end.pt")
    for attempt in range(20):
        start, every = list(whole)[attempt % 3], chance.choice([1, 2, 3])
        at_batch = chance.randint(every + 1, EPOCHS * BATCHES - 1)
        folder = tmp_path / str(attempt)
        folder.mkdir()
        fit = processes.Process(target=to_the_end, args=(folder, start, every))
        fit.start()
        progress = folder / "progress"
        while fit.is_alive() and not (progress.exists() and progress.stat().st_size >= at_batch):
            time.sleep(1e-4)
        time.sleep(chance.uniform(0, 0.02))  # in the step, in the callbacks, or while a checkpoint is written
        fit.kill()
        fit.join()
        under_way = progress.stat().st_size
        assert fit.exitcode == -signal.SIGKILL
        assert not (folder / "end.pt").exists()
        path, torn = newest_whole(folder)
        resumed = processes.Process(target=to_the_end, args=(folder, start, every, path))
        resumed.start()
        resumed.join()
        assert differences(torch.load(folder / "end.pt"), whole[start]) == [], (attempt, path.name)
        told.append(f"{under_way} ({path.stem}{', one was torn' if torn else ''})")
    record_property("report", f"killed in batch (resumed from), of {EPOCHS * BATCHES}: {', '.join(told)}")

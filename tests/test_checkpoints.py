"""A fit that is interrupted anywhere and resumed ends as one that was not, and what does not fit is refused."""

import itertools
import multiprocessing
import pickle
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

from lightning_fgsgd import FGSGD, FeatureStdRescaling, NormBoundMonitor, POMGrouping, pom_param_groups
from tests.conftest import TinyNet
from tests.lit import LitBase, LitTiny, loader, trainer

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


# How torch.load says that a file is cut short: by where it is.
TORN = RuntimeError, OSError, EOFError, pickle.UnpicklingError


def newest_whole(folder):
    """The newest checkpoint that can be read, and how many newer ones cannot: they were being written."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for torn, path in enumerate(paths):
        try:
            torch.load(path, weights_only=True)
        except TORN:
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


# Other settings, other code, other files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The end of a fit, and a checkpoint from the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("saved")
    callback = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=BATCHES + 2)
    return resumable_fit(folder, callback), folder / f"step={BATCHES + 2}.ckpt"


def resumed_with(folder, path, module=None, **settings):
    torch.manual_seed(7)
    module, rescaling = module or WithSchedule(), FeatureStdRescaling(every_n_batches=2)
    fit = trainer(folder, POMGrouping(**{"seed": 4, **settings}), rescaling, max_epochs=EPOCHS)
    fit.fit(module, Resumable(loader(8 * BATCHES).dataset, batch_size=8, sampler=InOrder()), ckpt_path=path)
    return fit, module.state_dict(), rescaling.state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "po"},
        {"seed": 5},
        {"manifolds": ["sphere"]},
        {"groups": 2},
        {"start": "project"},
        {"start": "random"},
    ],
    ids=str,
)
def test_with_another_scheme_seed_manifold_or_start_the_fit_goes_on_with_those_of_the_checkpoint_and_says_so(
    tmp_path, saved, settings
):
    whole, path = saved
    with pytest.warns(UserWarning, match=r"of \d weights .* are those of the checkpoint, and not those asked for here"):
        fit, weights, rescaling = resumed_with(tmp_path, path, **settings)
    assert differences(weights, whole["weights"]) == []
    assert differences(fit.optimizers[0].state_dict(), whole["optimizer"]) == []
    assert differences(rescaling, whole["callbacks"]["FeatureStdRescaling"]) == []


class OtherModel(WithSchedule):
    def __init__(self):
        super().__init__()
        self.model.linear = torch.nn.Linear(4, 10)
        self.model.head = torch.nn.Linear(10, 3)


class OtherOrder(WithSchedule):
    """The same names and shapes; Lightning finds nothing wrong."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)


class SwappedOrder(OtherOrder):
    def __init__(self):
        super().__init__()
        a, b = self.a, self.b
        del self.a, self.b
        self.b, self.a = b, a


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutting": "filter"}, r"model\.conv\.weight was cut into 24 kernel components of 3 x 3, here into"),
        ({"block_size": 3}, r"model\.pointwise\.weight was cut into 2 filter components of 8 x 5, here into"),
        ({"include": ["*.conv.weight"]}, r"parameter groups hold \[6, 10\] parameters, this optimizer's \[1, 15\]"),
        ({"module": OtherModel}, r"(?s)size mismatch for model\.linear\.weight.*\[9, 4\].*\[10, 4\]"),
        ({"module": OtherOrder}, r"Missing key\(s\) in state_dict: \"a\.weight\", \"b\.weight\""),
    ],
    ids=["cutting", "block size", "include", "model", "more layers"],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, saved, settings, message):
    if "module" in settings:
        settings = {**settings, "module": settings["module"]()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        resumed_with(tmp_path, saved[1], **settings)


def test_a_model_with_its_layers_in_another_order_is_refused(tmp_path):
    fit = trainer(tmp_path, POMGrouping(), max_epochs=1)
    fit.fit(OtherOrder(), loader())
    fit.save_checkpoint(tmp_path / "order.ckpt")
    with pytest.raises(ValueError, match=r"where b\.weight is here, a\.weight was when it was saved"):
        trainer(tmp_path, POMGrouping()).fit(SwappedOrder(), loader(), ckpt_path=tmp_path / "order.ckpt")


def test_a_layer_that_was_only_renamed_is_accepted():
    a, b = (torch.nn.ModuleDict({name: torch.nn.Linear(4, 4)}) for name in ("a", "b"))
    state = FGSGD(pom_param_groups(a), lr=0.1).state_dict()
    optimizer = FGSGD(pom_param_groups(b), lr=0.1)
    with pytest.warns(UserWarning, match="are those of the checkpoint"):  # each name has index sets of its own
        optimizer.load_state_dict(state)
    assert differences(optimizer.state_dict()["param_groups"], state["param_groups"]) == []


def rewritten(path, folder, change):
    """A checkpoint with something changed in it."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize("version", [None, 1, 2, 4])
def test_another_format_is_refused_with_what_to_do(tmp_path, saved, version):
    def change(checkpoint):
        for pom in checkpoint["optimizer_states"][0]["param_groups"][0]["pom"]:
            pom |= {"format": version}
            if version is None:  # the first one did not say
                del pom["format"], pom["manifold"]

    found = version or 1
    with pytest.raises(ValueError, match=rf"format {found}, and this version reads format 3; load the model's weights"):
        resumed_with(tmp_path, rewritten(saved[1], tmp_path, change))


def test_callbacks_go_on_from_the_state_of_an_earlier_version_of_theirs(tmp_path, saved):
    def change(checkpoint):
        state = checkpoint["callbacks"]["FeatureStdRescaling"]
        del state["epoch"]
        state["moments"] = {name: x[0] for name, x in state["moments"].items()}
        del checkpoint["callbacks"]["NormBoundMonitor"]["epoch"]

    whole, path = saved
    assert differences(resumable_fit(tmp_path, ckpt_path=rewritten(path, tmp_path, change)), whole) == []


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, saved):
    data, module = saved[1].read_bytes(), WithSchedule()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    cut = tmp_path / "cut.ckpt"
    ends = [0, 1, len(data) // 2, len(data) - 1, *random.Random(0).sample(range(len(data)), 6)]
    for end in ends:
        cut.write_bytes(data[:end])
        with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
            resumed_with(tmp_path, cut, module)
        assert differences(dict(module.state_dict()), before) == [], end


def test_a_checkpoint_is_loaded_without_the_callbacks_and_its_manifolds_hold(tmp_path, saved):
    path = saved[1]
    fit, data = trainer(tmp_path, max_epochs=EPOCHS), loader(8 * BATCHES).dataset
    with pytest.warns(UserWarning, match="add the following callbacks: .*FeatureStdRescaling"):
        fit.fit(WithSchedule(), Resumable(data, batch_size=8, sampler=InOrder()), ckpt_path=path)
    (optimizer,) = fit.optimizers
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]["pom"]
    ends = optimizer.state_dict()["param_groups"][0]["pom"]
    assert differences(ends, states) == []  # index sets, S and R
    assert max(map(optimizer.distance, optimizer.poms)) < 1e-5
    assert fit.global_step == EPOCHS * BATCHES

    module = WithSchedule.load_from_checkpoint(path)
    plain = TinyNet()
    weights = torch.load(path, weights_only=True)["state_dict"]
    plain.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()})
    assert differences(plain.state_dict(), module.model.state_dict()) == []


def test_a_fit_whose_module_makes_the_optimizer_itself_goes_on_bit_for_bit(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1, momentum=0.9)

    ends = []
    for path in (None, tmp_path / "step=7.ckpt"):
        torch.manual_seed(7)
        module, rescaling = Own(), FeatureStdRescaling(every_n_batches=2)
        callback = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=7)
        callbacks = POMGrouping(start="random", seed=0 if path is None else 1), rescaling, callback
        fit = trainer(tmp_path, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FGSGD: the manifolds, groups or start")
            fit.fit(module, Resumable(loader(40).dataset, batch_size=8, sampler=InOrder()), ckpt_path=path)
        ends.append((module.state_dict(), fit.optimizers[0].state_dict(), rescaling.state_dict()))
    assert differences(*ends) == []

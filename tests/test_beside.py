"""Beside other callbacks, loggers and schedulers, each in a real Trainer run: docs/beside.md row by row."""

import copy
import csv
import inspect
import subprocess
import sys
import warnings

import pytest
import timm.scheduler
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, get_ema_avg_fn
from torch.utils.data import DataLoader

from lightning_fgsgd import (
    FGSGD,
    FeatureStdRescaling,
    NormBoundMonitor,
    POMGrouping,
    RobbinsMonroLR,
    pom_param_groups,
)
from tests.conftest import TinyNet
from tests.lit import LitBase, LitTiny, loader, trainer
from tests.test_finetuning import LitBackbone, LitTimm, images, on_manifolds
from tests.test_loop import hooks, same, worst


class Lit(LitTimm):
    """Validates, and trains with batches of the size it is told."""

    def __init__(self, name="test_resnet", lr=0.05, momentum=0.9, batch_size=8):
        options = {"img_size": 32} if "vit" in name else {}
        super().__init__(name, lr, momentum, **options)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(images(48).dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return images(8)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))


class Plain(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def lit(name="test_resnet", **options):
    torch.manual_seed(0)
    return Lit(name, **options)


def ours(start="preserve", **grouping):
    return POMGrouping(start=start, **grouping), FeatureStdRescaling(every_n_batches=1)


def rescaling(fit):
    return next(c for c in fit.callbacks if isinstance(c, FeatureStdRescaling))


def state(fit):
    """Weights and buffers; momentum, index sets and R; λ and all else that callbacks keep."""
    ours = [c for c in fit.callbacks if isinstance(c, (FeatureStdRescaling, NormBoundMonitor))]
    parts = fit.lightning_module.state_dict(), fit.optimizers[0].state_dict(), [c.state_dict() for c in ours]
    return copy.deepcopy(parts)


def equal(a, b):
    """Whether two nested states are the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b


class Weights(Callback):
    """The weights as they stand when an epoch has been trained."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append([p.detach().clone() for p in pl_module.parameters()])


@pytest.fixture
def no_stray_weights():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left their manifolds.*")
        yield


# Checkpoints and stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_the_best_checkpoint_is_the_model_that_was_validated_and_a_fit_goes_on_from_it(
    tmp_path, start, no_stray_weights
):
    class Third(Lit):
        """The third epoch, the first one at R = λ¹/λ, is the best one."""

        losses = ()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", (self.current_epoch - 2.0) ** 2)

        def on_validation_epoch_end(self):
            self.losses = (*self.losses, self.trainer.callback_metrics["val_loss"].item())

    def fit(ckpt_path=None):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path, monitor="score", filename="{epoch}", enable_version_counter=False)
        options = {"max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        made = trainer(tmp_path, *ours(start), weights := Weights(), checkpoint, **options)
        made.fit(Third(), ckpt_path=ckpt_path)
        return made, weights.seen, checkpoint.best_model_path

    whole, seen, best = fit()
    assert best.endswith("epoch=2.ckpt")
    module = Third.load_from_checkpoint(best)
    assert equal([p.detach() for p in module.parameters()], seen[2])
    (checked,) = trainer(tmp_path).validate(module, images(8), verbose=False)
    assert checked["val_loss"] == whole.lightning_module.losses[2]
    # It is on the manifolds, with the index sets and R that are saved beside it: those of the third epoch.
    optimizer = FGSGD(pom_param_groups(module, start=start), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(torch.load(best, weights_only=True)["optimizer_states"][0])
    assert equal([p.detach() for p in module.parameters()], seen[2])
    assert on_manifolds(optimizer)
    radii = {name: row["radius"] for name, row in rescaling(whole).history[2]["layers"].items()}
    assert max(abs(r - 1) for r in radii.values()) > 1e-3
    found = {pom.name.removesuffix(".weight"): pom.radius.mean().item() for pom in optimizer.poms.values()}
    assert found == pytest.approx(radii)
    resumed, _, _ = fit(best)
    assert equal(state(resumed), state(whole))


def test_early_stopping_ends_a_fit_as_the_number_of_epochs_would_have(tmp_path):
    class Worse(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", [3.0, 2.0, 4.0, 5.0, 1.0][self.current_epoch])

    def fit(*callbacks, max_epochs):
        torch.manual_seed(0)
        made = trainer(tmp_path, *ours(), NormBoundMonitor(), *callbacks, max_epochs=max_epochs)
        made.fit(Worse())
        return made

    stopped = fit(EarlyStopping("val_loss", patience=2), max_epochs=5)
    assert stopped.current_epoch == 4  # the second of two epochs in which it did not fall
    assert [row["epoch"] for row in rescaling(stopped).history] == [0, 1, 2, 3]
    assert equal(state(stopped), state(fit(max_epochs=4)))
    assert worst(stopped.optimizers[0]) < 1e-5
    assert hooks(stopped.lightning_module) == 0


# Finders ----------------------------------------------------------------------------------------------------------------


class Watched:
    """Keeps the state before and after a search."""

    before = after = None

    def watch(self, search, trainer):
        self.before, self.rates = state(trainer), [group["lr"] for group in trainer.optimizers[0].param_groups]
        search()
        self.after = state(trainer)
        for kept in self.before, self.after:  # the learning rate is what may change
            for group in kept[1]["param_groups"]:
                group.pop("lr")
                group.pop("initial_lr", None)


class RateFinder(Watched, LearningRateFinder):
    def __init__(self, epoch):
        super().__init__(min_lr=1e-3, max_lr=0.5, num_training_steps=16, early_stop_threshold=None)
        self.epoch = epoch

    def on_fit_start(self, trainer, pl_module):
        if self.epoch == 0:
            self.watch(lambda: self.lr_find(trainer, pl_module), trainer)

    def on_train_epoch_start(self, trainer, pl_module):  # as Lightning's documentation does for later epochs
        if self.epoch == trainer.current_epoch > 0:
            self.watch(lambda: self.lr_find(trainer, pl_module), trainer)


class SizeFinder(Watched, BatchSizeFinder):
    def __init__(self, mode):
        super().__init__(mode, steps_per_trial=2, init_val=2, max_trials=3)
        self._margin = 0.0  # of a newer Lightning: what it takes off the size that it found

    def on_fit_start(self, trainer, pl_module):
        self.watch(lambda: self.scale_batch_size(trainer, pl_module), trainer)


class SetRate(Callback):
    """Sets the learning rate by hand, when an epoch starts."""

    def __init__(self, epoch, lr):
        self.epoch, self.lr = epoch, lr

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.lr


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("start", ["preserve", "project"])
def test_the_search_for_a_learning_rate_leaves_no_trace_and_the_fit_is_one_at_that_rate(
    tmp_path, start, epoch, no_stray_weights
):
    finder = RateFinder(epoch)
    # Once validation has run, Lightning's own search takes no step.
    options = {"max_epochs": 4, "limit_val_batches": 0 if epoch else 1}
    fit = trainer(tmp_path, *ours(start), finder, **options)
    fit.fit(lit(batch_size=3))
    assert len(set(finder.optimal_lr.results["loss"])) == 16  # it did train
    assert bool(finder.before[1]["state"]) == bool(finder.before[2][0]["first"]) == (epoch > 0)
    assert equal(finder.before, finder.after)
    lr = fit.optimizers[0].param_groups[0]["lr"]
    by_hand = trainer(tmp_path, *ours(start), SetRate(epoch, lr), **options)
    by_hand.fit(lit(batch_size=3))
    assert equal(state(fit), state(by_hand))
    assert worst(fit.optimizers[0]) < 1e-5


@pytest.mark.parametrize("module", [Lit, Plain])
def test_once_validation_has_run_lightnings_search_takes_no_step_and_sets_no_rate_with_sgd_too(tmp_path, module):
    def fit(*callbacks):
        torch.manual_seed(0)
        callbacks = callbacks if module is Plain else (*ours(), *callbacks)
        run = trainer(tmp_path, *callbacks, max_epochs=4)
        run.fit(module(batch_size=3))
        return run

    finder = RateFinder(2)
    searched = fit(finder)
    assert finder.optimal_lr.results == {"lr": [], "loss": []}
    assert finder.optimal_lr.suggestion() is None
    assert finder.rates == [group["lr"] for group in searched.optimizers[0].param_groups]
    assert equal(finder.before, finder.after)
    assert equal(state(searched), state(fit()))


@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("start", ["preserve", "project"])
def test_the_search_for_a_batch_size_leaves_no_trace_and_the_fit_is_one_with_that_size(
    tmp_path, start, mode, no_stray_weights
):
    finder, module = SizeFinder(mode), lit(batch_size=4)
    fit = trainer(tmp_path, *ours(start), finder, max_epochs=2)
    fit.fit(module)
    assert module.batch_size == finder.optimal_batch_size in (8, 16)  # an older Lightning stops one later
    assert equal(finder.before, finder.after)
    plain = trainer(tmp_path, *ours(start), max_epochs=2)
    plain.fit(lit(batch_size=module.batch_size))
    assert equal(state(fit), state(plain))
    assert worst(fit.optimizers[0]) < 1e-5


def test_a_tuner_finds_a_rate_for_a_fit_of_its_own_and_layer_decay_holds_in_it(tmp_path):
    module, twin = lit("test_vit"), lit("test_vit")
    fit = trainer(tmp_path, *ours(layer_decay=0.5), max_epochs=3)
    Tuner(fit).lr_find(module, min_lr=1e-3, max_lr=0.5, num_training=14, early_stop_threshold=None)
    assert same(module, twin)
    fit.fit(module)
    twin.hparams.lr = module.hparams.lr
    plain = trainer(tmp_path, *ours(layer_decay=0.5), max_epochs=3)
    plain.fit(twin)
    assert equal(state(fit), state(plain))
    assert module.hparams.lr != 0.05
    rates = {group["lr"] / module.hparams.lr for group in fit.optimizers[0].param_groups}
    assert {0.5, 1.0} < rates


def test_the_search_in_a_fit_sets_one_rate_for_all_groups_whatever_their_layer_decay(tmp_path):
    pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="an older Lightning sets none")
    finder = RateFinder(0)
    fit = trainer(tmp_path, *ours(layer_decay=0.5), finder, max_epochs=4)
    fit.fit(lit("test_vit", batch_size=3))
    assert len(fit.optimizers[0].param_groups) > 2
    assert {group["lr"] for group in fit.optimizers[0].param_groups} == {finder.optimal_lr.suggestion()}


def test_the_search_comes_before_the_grouping_callback_constrains_an_optimizer_that_was_made_without_it(tmp_path):
    class Own(Lit):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.05, momentum=0.9)

    class Constrained(RateFinder):
        def on_fit_start(self, trainer, pl_module):
            self.constrained = len(trainer.optimizers[0].poms)
            super().on_fit_start(trainer, pl_module)

    for module, expected in (Own, 0), (Lit, 15):
        finder = Constrained(0)
        fit = trainer(tmp_path, *ours(), finder, max_epochs=3)
        fit.fit(module(batch_size=3))
        assert finder.constrained == expected
        assert len(fit.optimizers[0].poms) == 15


@pytest.mark.parametrize("start", ["project", "random"])
def test_a_tuner_leaves_the_weights_on_their_manifolds_where_the_start_moves_them(tmp_path, start):
    module = lit()
    fit = trainer(tmp_path, *ours(start), max_epochs=1)
    Tuner(fit).lr_find(module, min_lr=1e-3, max_lr=0.5, num_training=5, early_stop_threshold=None)
    placed = lit()
    FGSGD(pom_param_groups(placed, start=start))
    assert same(module, placed)
    # metric="start" of the fit that follows is then that of the unit manifolds.
    weight = lit().model.layer2[0].conv1.weight
    first = FGSGD(pom_param_groups(lit(), start=start)).poms.values()
    then = FGSGD(pom_param_groups(module, start=start)).poms.values()
    assert all((pom.metric("start") - 1).abs().max() < 1e-3 for pom in then)
    assert all((pom.metric("start") - 1).abs().max() > 0.5 for pom in first)
    assert weight.shape == module.model.layer2[0].conv1.weight.shape


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_after_a_search_the_bounds_before_the_start_are_right_or_left_out(tmp_path, start):
    plain, after = NormBoundMonitor(), NormBoundMonitor()
    trainer(tmp_path, *ours(start), plain, max_epochs=1).fit(lit())
    trainer(tmp_path, *ours(start), after, SizeFinder("power"), max_epochs=1).fit(lit())
    assert plain.start
    assert after.start == (plain.start if start == "preserve" else {})
    assert after.history[0] == plain.history[0]
    after.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_a_fit_after_one_with_a_search_begins_anew(tmp_path):
    used = *ours("project"), NormBoundMonitor()
    trainer(tmp_path, *used, RateFinder(0), max_epochs=2).fit(lit())
    again = trainer(tmp_path, *used, max_epochs=2)
    again.fit(lit())
    plain = trainer(tmp_path, *ours("project"), NormBoundMonitor(), max_epochs=2)
    plain.fit(lit())
    assert equal(state(again), state(plain))


# Averages ---------------------------------------------------------------------------------------------------------------


class AverageOnly(StochasticWeightAveraging):
    """Of docs/beside.md: the epoch for batch norm takes no step."""

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch == self.swa_end + 1:
            trainer.optimizers[0].zero_grad()


def mean(weights):
    return [torch.stack(each).double().mean(0).float() for each in zip(*weights, strict=True)]


def largest_difference(weights, others):
    return max((a - b).abs().max().item() for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("first", ["average", "rescaling"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])  # with and without batch norm
def test_what_swa_leaves_is_the_mean_of_trained_weights_off_the_manifolds_until_it_is_projected(
    tmp_path, name, first, no_stray_weights
):
    weights, averaging = Weights(), AverageOnly(swa_lrs=0.05, swa_epoch_start=3, annealing_epochs=1)
    grouping, rescaling = ours()
    order = (averaging, rescaling) if first == "average" else (rescaling, averaging)
    fit, module = trainer(tmp_path, grouping, *order, weights, max_epochs=5, limit_val_batches=0), lit(name)
    fit.fit(module)
    (optimizer,) = fit.optimizers
    left = [p.detach().clone() for p in module.parameters()]
    # SWA looks when an epoch starts: at what the epochs before it trained.
    assert largest_difference(left, mean(weights.seen[1:4])) < 1e-6
    assert worst(optimizer) > 1e-3
    # R is that of the last epoch that was trained.
    radius = rescaling.history[4]["layers"][
        "model.layer2.0.conv1" if name == "test_resnet" else "model.blocks.0.mlp.fc1"
    ]
    pom = next(
        p for p in optimizer.poms.values() if p.name.endswith(("layer2.0.conv1.weight", "blocks.0.mlp.fc1.weight"))
    )
    assert pom.radius.mean().item() == pytest.approx(radius["radius"])
    optimizer.project()
    assert on_manifolds(optimizer)
    free = {p for p in module.parameters() if p not in optimizer.poms}
    for p, before in zip(module.parameters(), left, strict=True):
        assert torch.equal(p, before) == (p in free)


@pytest.mark.parametrize("start", ["project", "random"])
def test_an_average_from_before_the_first_rescale_is_far_from_the_manifolds_and_one_from_after_it_is_near(
    tmp_path, start
):
    def distance(swa_epoch_start):
        averaging = AverageOnly(swa_lrs=0.05, swa_epoch_start=swa_epoch_start, annealing_epochs=1)
        fit = trainer(tmp_path, *ours(start), averaging, max_epochs=5, limit_val_batches=0)
        fit.fit(lit())
        return worst(fit.optimizers[0])

    assert distance(2) > 10  # the weights that the first epoch left are at R = 1, those of the others at γ/λ
    assert distance(3) < 0.1


def test_with_batch_norm_and_no_validation_swa_itself_takes_one_more_step_on_the_average_with_sgd_too(tmp_path):
    def moved(module, *callbacks, **options):
        weights, averaging = Weights(), StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1)
        fit = trainer(tmp_path, *callbacks, averaging, weights, max_epochs=5, **options)
        torch.manual_seed(0)
        fit.fit(module())
        left = [p.detach() for p in fit.lightning_module.parameters()]
        return fit.optimizers[0], largest_difference(left, mean(weights.seen[1:4]))

    assert moved(Plain, limit_val_batches=0)[1] > 1e-3
    with pytest.warns(UserWarning, match="left their manifolds"):
        optimizer, difference = moved(Lit, *ours(), limit_val_batches=0)
    assert difference > 1e-3
    assert on_manifolds(optimizer)
    # With validation it does not.
    assert moved(Plain)[1] < 1e-6
    optimizer, difference = moved(Lit, *ours())
    assert difference < 1e-6
    assert worst(optimizer) > 1e-3


def ema(**options):
    newer = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="of a newer Lightning")
    return newer.WeightAveraging(avg_fn=get_ema_avg_fn(0.8), **options)


class Average(Callback):
    """The exponential moving average by its formula, from the first step on."""

    average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = [p.detach().double() for p in pl_module.parameters()]
        old = self.average or now
        self.average = [0.8 * a + 0.2 * p for a, p in zip(old, now, strict=True)]


class Seen(Lit):
    """Keeps the weights that are validated."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.validated = [p.detach().clone() for p in self.parameters()]


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_an_ema_is_what_is_validated_saved_and_left_and_the_trained_weights_never_notice(
    tmp_path, start, no_stray_weights
):
    def fit(module, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        made = trainer(tmp_path, *ours(start), *callbacks, checkpoint, max_epochs=3, enable_checkpointing=True)
        made.fit(module(), ckpt_path=ckpt_path)
        return made

    plain = fit(Lit, without := Weights())
    averaged = fit(Seen, ema(), average := Average(), trained := Weights())
    assert equal(trained.seen, without.seen)
    (optimizer,), module = averaged.optimizers, averaged.lightning_module
    assert equal(optimizer.state_dict(), plain.optimizers[0].state_dict())
    expected = [a.float() for a in average.average]
    left = [p.detach().clone() for p in module.parameters()]
    saved = Seen.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    for found in module.validated, left, [p.detach() for p in saved.parameters()]:
        assert largest_difference(found, expected) < 1e-5
    # Off the manifolds until it is projected, in the fit's own optimizer or in one that a checkpoint is loaded into.
    assert worst(optimizer) > 1e-3
    optimizer.project()
    assert on_manifolds(optimizer)
    other = FGSGD(pom_param_groups(saved, start=start), momentum=0.9)
    other.load_state_dict(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["optimizer_states"][0])
    assert largest_difference([p.detach() for p in saved.parameters()], left) == 0
    other.project()
    assert equal([p.detach() for p in saved.parameters()], [p.detach() for p in module.parameters()])
    # A fit that is resumed goes on with the trained weights.
    resumed = fit(Seen, ema(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert equal(resumed.optimizers[0].state_dict(), plain.optimizers[0].state_dict())
    assert equal([p.detach() for p in resumed.lightning_module.parameters()], left)


# Freezing and accumulating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_while_the_head_alone_is_trained_nothing_is_constrained_and_then_the_backbone_is(tmp_path, start):
    grouping, rescaling, monitor = *ours(start), NormBoundMonitor()
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, verbose=False)
    fit = trainer(tmp_path, unfreeze, grouping, rescaling, monitor, max_epochs=4)
    fit.fit(LitBackbone(), images())
    (optimizer,) = fit.optimizers
    assert len(optimizer.poms) == len(grouping._groups.plan.weights) == 15
    assert on_manifolds(optimizer)
    assert [row["epoch"] for row in rescaling.history] == [1, 2, 3]
    assert [len(row["layers"]) for row in monitor.history] == [0, 0, 15, 15, 15]
    radii = [row["radius"] for row in rescaling.history[-1]["layers"].values()]
    assert max(abs(r - 1) for r in radii) > 1e-3
    monitor.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_the_scheduler_of_accumulation_steps_as_a_plain_loop_does_bit_for_bit(tmp_path):
    module, twin = lit(), lit()
    trainer(tmp_path, POMGrouping(), GradientAccumulationScheduler({1: 3}), limit_val_batches=0).fit(module)
    twin.train()
    optimizer = FGSGD(pom_param_groups(twin), lr=0.05, momentum=0.9)
    for every in 1, 3:
        for i, (x, y) in enumerate(twin.train_dataloader(), 1):
            (cross_entropy(twin.model(x), y) / every).backward()
            if i % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert same(module, twin)


FINETUNING_SCHEDULER = """
import copy, sys, warnings
import lightning.pytorch as pl
import timm, torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from lightning_fgsgd import FeatureStdRescaling, FGSGDMixin, NormBoundMonitor, POMGrouping

warnings.filterwarnings("error", message=".*left their manifolds.*")

class Lit(FGSGDMixin, pl.LightningModule):
    def __init__(self, lr=0.05, momentum=0.9):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model("test_resnet", num_classes=4)
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("score", abs(self.current_epoch - 2.0))  # the third epoch is the best one

def images(count):
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(count) % 4), batch_size=8)

class Watch(pl.Callback):
    def __init__(self):
        self.started, self.trained = [], []
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # before anything is rescaled
        if batch_idx == 0:
            self.started.append(copy.deepcopy(pl_module.state_dict()))
    def on_train_epoch_end(self, trainer, pl_module):
        self.trained.append(copy.deepcopy(pl_module.state_dict()))
        (optimizer,) = trainer.optimizers
        constrained = {name for name, p in pl_module.named_parameters() if p in optimizer.poms}
        self.constrained = [*getattr(self, "constrained", []), constrained]
        for p in optimizer.poms:
            assert p.requires_grad and optimizer.distance(p) < 1e-5

torch.manual_seed(0)
start = sys.argv[1]
module, watch, grouping = Lit(), Watch(), POMGrouping(start=start)
before = copy.deepcopy(module.state_dict())
rescaling = FeatureStdRescaling(every_n_batches=1)
phases = FinetuningScheduler(ft_schedule="phases.yaml", epoch_transitions_only=True)
checkpoint = FTSCheckpoint(monitor="score", dirpath=".", filename="{epoch}")
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[phases, watch, grouping, rescaling, NormBoundMonitor(), checkpoint])
trainer.fit(module, images(24), images(8))

(optimizer,) = trainer.optimizers
plan = grouping._groups.plan
last = {n for n, p in module.named_parameters() if p in plan.weights and "layer4" in n}
every = {n for n, p in module.named_parameters() if p in plan.weights}
assert watch.constrained == [set(), set(), last, last, every, every], watch.constrained
for p, planned in plan.weights.items():  # the index sets are those that were drawn for all weights at the start
    assert torch.equal(planned.index_sets.manifold, optimizer.poms[p].sets.manifold)
    assert torch.equal(planned.index_sets.group, optimizer.poms[p].sets.group)
for epoch in range(6):  # frozen weights stay bit for bit
    for name in every - (watch.constrained[epoch]):
        assert torch.equal(watch.trained[epoch][name], before[name]), (epoch, name)
# The third phase starts from the best checkpoint, that of the third epoch.
restored, best = watch.started[4], watch.trained[2]
same = {name for name in best if torch.equal(restored[name], best[name])}
moved = set(best) - same  # what is put onto its manifolds when it joins
assert not moved if start == "preserve" else moved <= every, moved
assert [len(row["layers"]) for row in rescaling.history] == [3, 3, 15, 15]
assert any((pom.radius != 1).any() for pom in optimizer.poms.values())
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["preserve", "project"])
def test_the_phases_of_finetuning_scheduler_constrain_what_they_thaw(tmp_path, start):
    pytest.importorskip("finetuning_scheduler")
    phases = {
        0: {"params": ["model.fc.*"], "max_transition_epoch": 2},
        1: {"params": ["model.layer4.*"], "max_transition_epoch": 4},
        2: {"params": ["model.(conv1|bn1|layer[123]).*"], "max_transition_epoch": 6},
    }
    (tmp_path / "phases.yaml").write_text(yaml.safe_dump(phases))
    (tmp_path / "script.py").write_text(FINETUNING_SCHEDULER)
    command = [sys.executable, "-W", "ignore", "script.py", start]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


# Progress and logs ------------------------------------------------------------------------------------------------------


def test_the_rich_progress_bar_shows_a_fit_and_changes_nothing(tmp_path, capsys):
    def fit(*callbacks):
        made = trainer(tmp_path, *ours(verbose=True), *callbacks)
        made.fit(lit())
        return made

    plain = fit()
    capsys.readouterr()
    trainer_with_bar = Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[*ours(verbose=True), RichProgressBar(leave=True)],
    )
    trainer_with_bar.fit(lit())
    shown = capsys.readouterr().out
    assert "Weights on products of manifolds" in shown
    assert "Epoch 1/1" in shown
    assert "6/6" in shown
    assert equal(state(trainer_with_bar), state(plain))


def test_what_is_logged_is_in_tensorboard_and_csv_as_in_the_histories(tmp_path):
    tensorboard, table = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    rescaling, monitor = FeatureStdRescaling(every_n_batches=1), NormBoundMonitor()
    fit = trainer(tmp_path, POMGrouping(), rescaling, monitor, max_epochs=3, logger=[tensorboard, table])
    fit.fit(lit())
    expected = {}
    for row in rescaling.history:
        for layer, found in row["layers"].items():
            for key in "std", "radius":
                expected.setdefault(f"{key}/{layer}", {})[6 * (row["epoch"] + 1)] = found[key]
    for row in monitor.history:
        for layer, found in row["layers"].items():
            for key, value in found.items():
                expected.setdefault(f"norms/{layer}/{key}", {})[row["step"]] = value
        for key, value in row["network"].items():
            expected.setdefault(f"bounds/{key}", {})[row["step"]] = value
    events = EventAccumulator(tensorboard.log_dir, size_guidance={"scalars": 0}).Reload()
    with open(f"{table.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(expected) > 100
    for name, values in expected.items():
        in_events = {event.step: event.value for event in events.Scalars(name)}
        in_table = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert in_events == pytest.approx(values, rel=1e-6)
        assert in_table == pytest.approx(values, rel=1e-6)
    assert "val_loss" in events.Tags()["scalars"]
    # They are not among the metrics that EarlyStopping and ModelCheckpoint can monitor.
    assert set(fit.callback_metrics) == {"val_loss"}


def test_the_learning_rate_monitor_has_a_curve_for_every_group_also_for_one_that_joins_later(tmp_path):
    class Decaying(Lit):
        def configure_lr_scheduler(self, optimizer):
            return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}

    def read(table):
        with open(f"{table.log_dir}/metrics.csv") as file:
            return list(csv.DictReader(file))

    table = CSVLogger(tmp_path)
    watch = LearningRateMonitor(logging_interval="step", log_momentum=True, log_weight_decay=True)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    fit = trainer(tmp_path, POMGrouping(layer_decay=0.5), watch, logger=table, **options)
    fit.fit(Decaying("test_vit"))
    rows, groups = read(table), fit.optimizers[0].param_groups
    assert len({group["initial_lr"] for group in groups}) > 2
    for group in groups:
        name = f"lr-FGSGD/{group['name']}"
        assert [float(r[name]) for r in rows] == pytest.approx([group["initial_lr"] * 0.5**step for step in range(6)])
        assert {float(row[f"{name}-momentum"]) for row in rows} == {0.9}
        assert {float(row[f"{name}-weight_decay"]) for row in rows} == {0.0}

    table, watch = CSVLogger(tmp_path), LearningRateMonitor(logging_interval="step")
    unfreeze = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=lambda epoch: 1.0, verbose=False
    )
    fit = trainer(tmp_path, unfreeze, POMGrouping(), watch, logger=table, log_every_n_steps=1)
    fit.fit(LitBackbone(), images())
    joined = len(fit.optimizers[0].param_groups)
    rows = read(table)
    names = [name for name in rows[-1] if name.startswith("lr-FGSGD/")]
    assert len(names) == joined
    last = sorted(float(row[name]) for row in rows for name in names if row[name] and int(row["step"]) == 5)
    assert last == pytest.approx(sorted(group["lr"] for group in fit.optimizers[0].param_groups))
    assert 0.02 in last


# Schedulers -------------------------------------------------------------------------------------------------------------

STEPS, EPOCHS = 12, 3
BY_STEP = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.02], STEPS),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=5),
    "RobbinsMonroLR": lambda o: RobbinsMonroLR(o, tau=3, warmup=2),
    "timm CosineLRScheduler by step": lambda o: timm.scheduler.CosineLRScheduler(
        o, STEPS, warmup_t=3, warmup_lr_init=1e-3, t_in_epochs=False
    ),
}
BY_EPOCH = {
    "CosineLRScheduler": lambda o: timm.scheduler.CosineLRScheduler(o, EPOCHS, warmup_t=1, warmup_lr_init=1e-3),
    "MultiStepLRScheduler": lambda o: timm.scheduler.MultiStepLRScheduler(o, [1, 2], decay_rate=0.3),
    "PlateauLRScheduler": lambda o: timm.scheduler.PlateauLRScheduler(o, patience_t=0, decay_rate=0.2),
    "PolyLRScheduler": lambda o: timm.scheduler.PolyLRScheduler(o, EPOCHS),
    "StepLRScheduler": lambda o: timm.scheduler.StepLRScheduler(o, 1, decay_rate=0.4),
    "TanhLRScheduler": lambda o: timm.scheduler.TanhLRScheduler(o, EPOCHS),
}
if hasattr(timm.scheduler, "WSDLRScheduler"):  # of a newer timm
    BY_EPOCH["WSDLRScheduler"] = lambda o: timm.scheduler.WSDLRScheduler(o, EPOCHS, decay_t=2)
PARAMETERS = "lr", "momentum"


def rates_of_sgd(make):
    """Learning rate and momentum of two groups in every step of torch's SGD, in a plain loop."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler, found = make(optimizer), []
    for step in range(1, STEPS + 1):
        found.append([[group[key] for key in PARAMETERS] for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
            scheduler.step_update(step, metric=1.0)
            if step % (STEPS // EPOCHS) == 0:
                scheduler.step(step // (STEPS // EPOCHS), metric=1.0)
        elif isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return found


def two_groups(module):
    groups = pom_param_groups(module)
    assert len(groups) == 2
    groups[1]["lr"] = 0.02
    return FGSGD(groups, lr=0.1, momentum=0.9)


def trained_in_a_plain_loop(rates):
    torch.manual_seed(0)
    module = LitTiny()
    optimizer, rates = two_groups(module), iter(rates)
    for _ in range(EPOCHS):
        for x, y in loader():
            for group, values in zip(optimizer.param_groups, next(rates), strict=True):
                group.update(zip(PARAMETERS, values, strict=True))
            optimizer.zero_grad()
            cross_entropy(module.model(x), y).backward()
            optimizer.step()
    assert worst(optimizer) < 1e-5
    return module


@pytest.mark.parametrize("name", [*BY_STEP, *BY_EPOCH])
def test_every_scheduler_gives_the_rates_that_it_gives_sgd_and_each_step_is_taken_at_them(tmp_path, name):
    by_epoch = name in BY_EPOCH
    make = BY_EPOCH[name] if by_epoch else BY_STEP[name]
    found = []

    class Scheduled(LitTiny):
        def configure_optimizers(self):
            optimizer = two_groups(self)
            settings = {"scheduler": make(optimizer), "interval": "epoch" if by_epoch else "step"}
            if "Plateau" in name:
                settings |= {"monitor": "score", "reduce_on_plateau": True}
            return {"optimizer": optimizer, "lr_scheduler": settings}

        def training_step(self, batch, batch_idx):
            self.log("score", 1.0)  # never better than before
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            found.append([[group[key] for key in PARAMETERS] for group in optimizer.param_groups])

        def lr_scheduler_step(self, scheduler, metric):
            if not isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
                super().lr_scheduler_step(scheduler, metric)
            elif by_epoch:
                scheduler.step(self.current_epoch + 1, metric)
            else:
                scheduler.step_update(self.global_step, metric)

    torch.manual_seed(0)
    module = Scheduled()
    trainer(tmp_path, max_epochs=EPOCHS).fit(module, loader())
    expected = rates_of_sgd(make)
    assert found == expected
    assert len({row[0][0] for row in found}) > 1
    assert same(module, trained_in_a_plain_loop(expected))
    constant = trained_in_a_plain_loop([[(0.1, row[0][1]), row[1]] for row in expected])
    assert not torch.equal(module.model.conv.weight, constant.model.conv.weight)


def test_no_scheduler_of_torch_or_timm_is_missing():
    of_torch = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert of_torch - {"LRScheduler"} <= BY_STEP.keys()
    base = timm.scheduler.scheduler.Scheduler
    of_timm = {
        name for name, found in vars(timm.scheduler).items() if inspect.isclass(found) and issubclass(found, base)
    }
    assert of_timm - {"Scheduler"} == BY_EPOCH.keys()


@pytest.mark.parametrize("how", ["add the weight", "add groups", "constrain"])
def test_what_lightnings_handle_of_the_optimizer_is_given_holds_for_the_one_that_steps(tmp_path, how):
    class Thaws(LitTiny if how == "add the weight" else LitBase):
        def configure_optimizers(self):
            if how == "add the weight":
                return super().configure_optimizers()
            return FGSGD(self.model.head.parameters() if how == "add groups" else self.parameters(), lr=0.1)

        def on_train_start(self):
            handle = self.optimizers()
            assert handle is not self.trainer.optimizers[0]
            if how == "constrain":
                return handle.constrain(pom_param_groups(self.model).plan)
            if how == "add groups":  # which bring their plan
                handle.add_param_group(pom_param_groups(self.model)[0])
            handle.add_param_group({"params": [self.model.conv.weight]})  # frozen still

        def on_train_epoch_start(self):
            self.model.conv.weight.requires_grad_(self.current_epoch > 0)

    module = Thaws()
    module.model.conv.weight.requires_grad_(False)
    fit = trainer(tmp_path, *([POMGrouping()] if how == "add the weight" else []), max_epochs=2)
    fit.fit(module, loader())
    weight = module.model.conv.weight
    assert fit.optimizers[0].pom(weight) is not None
    assert fit.optimizers[0].distance(weight) < 1e-5
    assert weight in module.optimizers().poms


@pytest.mark.parametrize("how", ["add the weight", "constrain"])
def test_the_same_goes_for_fabrics(how):
    from lightning_fabric import Fabric

    model = TinyNet()
    model.conv.weight.requires_grad_(False)
    groups = pom_param_groups(model)
    inner = FGSGD(groups if how == "add the weight" else model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    ready, optimizer = fabric.setup(model, inner)
    assert optimizer is not inner
    if how == "add the weight":
        optimizer.add_param_group({"params": [model.conv.weight]})
    else:
        optimizer.constrain(groups.plan)
    model.conv.weight.requires_grad_(True)
    ready(next(iter(loader()))[0]).square().mean().backward()
    optimizer.step()
    assert inner.pom(model.conv.weight) is not None
    assert inner.distance(model.conv.weight) < 1e-5

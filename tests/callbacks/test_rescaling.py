import itertools
import logging

import pytest
import timm
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint, ModelPruning
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_fgsgd import (
    FGSGD,
    FeatureStd,
    FeatureStdRescaling,
    FGSGDMixin,
    NormBoundMonitor,
    POMGrouping,
    pom_param_groups,
)
from lightning_fgsgd.scaling import gamma
from tests.conftest import TinyNet
from tests.lit import LitBase, LitTiny, loader, trainer

pytestmark = pytest.mark.usefixtures("quickly_compiled")


class Frozen(LitTiny):
    """Learning rate 0: the weights move by rescaling only, so what must come out can be computed by hand."""

    def __init__(self):
        super().__init__(lr=0.0, momentum=0.0)


def first_layer_std():
    return loader().dataset.tensors[0].double().transpose(0, 1).flatten(1).std(1, correction=0)


def test_projected_manifolds_are_rescaled_to_gamma_over_lambda(tmp_path):
    rescaling = FeatureStdRescaling(clamp=False, every_n_batches=1)
    fit = trainer(tmp_path, POMGrouping(start="project"), rescaling, max_epochs=2)
    module = Frozen()
    fit.fit(module, loader())
    (optimizer,) = fit.optimizers
    p = module.model.conv.weight
    pom = optimizer.poms[p]
    expected = gamma(pom.cutting) / first_layer_std()[pom.cutting.input_channel()]  # per input channel
    torch.testing.assert_close(pom.radius, expected.float())
    assert optimizer.distance(p) < 1e-5
    # The first epoch was at R = 1, the second at γ/λ.
    conv = [row["layers"]["model.conv"] for row in rescaling.history]
    assert (conv[0]["radius_min"], conv[0]["radius_max"]) == (1.0, 1.0)
    assert conv[1]["radius"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert conv[0]["std"] == pytest.approx(first_layer_std().mean().item(), rel=1e-5)


def test_gamma_read_literally_has_the_size_of_the_output_feature_map_from_the_hooks(tmp_path):
    rescaling = FeatureStdRescaling(gamma="literal", clamp=False, every_n_batches=1)
    fit = trainer(tmp_path, POMGrouping(start="project"), rescaling, max_epochs=2)
    module = Frozen()
    fit.fit(module, loader())
    pom = fit.optimizers[0].poms[module.model.conv.weight]
    expected = (4 * 9 + 6 * 36) ** -0.5 / first_layer_std()[pom.cutting.input_channel()]  # a 6 x 6 map of 6 channels
    torch.testing.assert_close(pom.radius, expected.float())
    linear = fit.optimizers[0].poms[module.model.linear.weight]
    lam = rescaling.history[0]["layers"]["model.linear"]["std"]
    torch.testing.assert_close(linear.radius, torch.full_like(linear.radius, (4 + 9) ** -0.5 / lam), rtol=1e-4, atol=0)


class Sequences(FGSGDMixin, LightningModule):
    """Layers whose output no hook of a Linear layer sees, and a Linear layer that is called on one vector."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = torch.nn.LSTM(16, 16, batch_first=True)
        self.vector = torch.nn.Parameter(torch.randn(16))
        self.condition = torch.nn.Linear(16, 16)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)[:, :144].reshape(-1, 9, 16)
        x = self.lstm(input=self.attention(x, x, x)[0])[0] * self.condition(self.vector)
        return x.square().mean()


def test_gamma_read_literally_is_had_wherever_features_are_read(tmp_path):
    fit = trainer(
        tmp_path, POMGrouping(start="project"), FeatureStdRescaling("literal", every_n_batches=1), max_epochs=2
    )
    module = Sequences()
    fit.fit(module, loader())
    poms = fit.optimizers[0].poms
    for weight, outputs, tokens in (
        (module.attention.in_proj_weight, 48, 9),
        (module.lstm.weight_ih_l0, 64, 9),
        (module.condition.weight, 16, 1),
    ):
        largest = (16 + outputs * tokens) ** -0.5  # at λ = 1, to which it is raised
        assert poms[weight].radius.max() <= largest * 1.0001
        assert poms[weight].radius.max() > 0.2 * largest


def test_a_block_has_one_lambda_over_its_fan_in(tmp_path):
    seen = []

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.linear.register_forward_hook(lambda m, x, y: seen.append(x[0].detach().clone()))

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    rescaling = FeatureStdRescaling(every_n_batches=1)
    trainer(tmp_path, rescaling, Spy(), max_epochs=1).fit(Frozen(), loader())
    expected = torch.cat(seen).double().std(correction=0).item()
    assert rescaling.history[0]["layers"]["model.linear"]["std"] == pytest.approx(expected, rel=1e-5)


def test_preserved_manifolds_are_rescaled_by_the_ratio_of_lambdas(tmp_path):
    class Louder(Callback):
        """Twice as loud from the second epoch on."""

        def on_train_epoch_start(self, trainer, pl_module):
            trainer.train_dataloader.dataset.tensors[0].mul_(2 if trainer.current_epoch == 1 else 1)

    fit = trainer(tmp_path, Louder(), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    module = Frozen()
    before = module.model.conv.weight.detach().clone()
    fit.fit(module, loader())
    torch.testing.assert_close(fit.optimizers[0].pom(module.model.conv.weight).radius, torch.full((24,), 0.5))
    torch.testing.assert_close(module.model.conv.weight.detach(), before / 2)


class FrozenNorms(LitTiny):
    """Its batch norms keep their running statistics while training, but for those of the names in ``live``."""

    def __init__(self, live=(), frozen_class=False):
        super().__init__(lr=0.05)
        self.live = live
        self.model.up = nn.Sequential(self.model.up, nn.BatchNorm2d(4))
        if frozen_class:
            self.model.up[1] = timm.layers.freeze_batch_norm_2d(self.model.up[1])
            self.model.norm = timm.layers.freeze_batch_norm_2d(self.model.norm)

    def on_train_epoch_start(self):
        for name, layer in self.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and name not in self.live:
                layer.eval()


@pytest.mark.parametrize("frozen_class", [False, True])
def test_with_frozen_norms_preserved_manifolds_keep_their_radius_and_that_is_said_once(tmp_path, frozen_class):
    rescaling = FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, POMGrouping(start="preserve"), rescaling, max_epochs=3)
    with pytest.warns(UserWarning, match="all batch norms are frozen .* stays as it is") as record:
        fit.fit(FrozenNorms(frozen_class=frozen_class), loader())
    assert sum("batch norms are frozen" in str(w.message) for w in record) == 1
    poms = fit.optimizers[0].poms
    assert len(poms) > 5
    assert all(torch.equal(pom.radius, torch.ones_like(pom.radius)) for pom in poms.values())
    assert len(rescaling.history) == 3  # λ is gathered all the same


@pytest.mark.parametrize(
    ("start", "live"), [("preserve", ["model.norm"]), ("preserve", ["model.norm", "model.up.1"]), ("project", [])]
)
def test_with_a_norm_that_follows_or_another_start_manifolds_are_rescaled(tmp_path, recwarn, start, live):
    fit = trainer(tmp_path, POMGrouping(start=start), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    module = FrozenNorms(live)
    fit.fit(module, loader())
    radius = fit.optimizers[0].pom(module.model.linear.weight).radius
    assert (radius != 1).all()
    assert not any("batch norms are frozen" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("followed", [True, False])
def test_the_norms_of_another_network_do_not_tell_whether_radii_can_follow(tmp_path, followed, together):
    class WithATeacher(FrozenNorms):
        """The student's norms, or the teacher's, are frozen, and the other's are not."""

        def __init__(self):
            super().__init__(live=["model.norm", "model.up.1"] if followed else ["nets.teacher.norm"])
            nets = {"teacher": TinyNet().requires_grad_(False)} | ({"student": self.model} if together else {})
            self.nets = nn.ModuleDict(nets)
            self.stem = nn.Identity()

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.nets["teacher"](batch[0])
            return super().training_step(batch, batch_idx)

    module = WithATeacher()
    if followed:  # nothing of the student says so either
        module.model.up[1] = module.model.norm = nn.Identity()
    fit = trainer(tmp_path, POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    fit.fit(module, loader())
    moved = (fit.optimizers[0].pom(module.model.linear.weight).radius != 1).all()
    assert bool(moved) == followed


@pytest.mark.parametrize("held_twice", [False, True])
def test_frozen_norms_that_are_a_child_of_their_own_hold_radii(tmp_path, held_twice):
    class Norms(FrozenNorms):
        """Its norms are in a list beside the layers, as where they are kept at hand to be frozen, or there alone."""

        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([self.model.norm, self.model.up[1]])
            self.norms.requires_grad_(False)
            if not held_twice:
                plain = self.model
                del plain.norm, plain.up[1]
                norm, after = self.norms
                plain.norm = nn.Identity()
                plain.up.register_forward_hook(lambda module, args, out: norm(after(out)))

    fit = trainer(tmp_path, POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    module = Norms()
    with pytest.warns(UserWarning, match="all batch norms are frozen"):
        fit.fit(module, loader())
    assert (fit.optimizers[0].pom(module.model.linear.weight).radius == 1).all()


def test_a_frozen_norm_that_is_called_by_keyword_holds_radii(tmp_path):
    class ByKeyword(FrozenNorms):
        def __init__(self):
            super().__init__()
            self.norm, self.model.norm = self.model.norm, nn.Identity()
            self.model.up[1] = nn.Identity()
            self.model.norm.register_forward_hook(lambda module, args, out: self.norm(input=out))

    fit = trainer(tmp_path, POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    with pytest.warns(UserWarning, match="all batch norms are frozen"):
        fit.fit(ByKeyword(), loader())


@pytest.mark.parametrize("apart", [False, True])
def test_frozen_norms_behind_what_is_trained_hold_radii_wherever_they_are(tmp_path, apart):
    class Adapted(FrozenNorms):
        """A layer that is trained before a frozen network, in one module with it or beside it."""

        def __init__(self):
            super().__init__()
            self.model.requires_grad_(False)
            adapter = nn.Conv2d(4, 4, 3, padding=1)
            if apart:
                self.adapter = adapter
                self.model.register_forward_pre_hook(lambda module, args: adapter(args[0]))
            else:
                self.model.adapter = adapter
                self.model.conv.register_forward_pre_hook(lambda module, args: adapter(args[0]))

    fit = trainer(tmp_path, POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    with pytest.warns(UserWarning, match="all batch norms are frozen"):
        fit.fit(Adapted(), loader())
    poms = fit.optimizers[0].poms
    assert [pom.name for pom in poms.values()] == ["adapter.weight" if apart else "model.adapter.weight"]
    assert all((pom.radius == 1).all() for pom in poms.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_norms_in_checkpointed_blocks_hold_radii(tmp_path, reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(FrozenNorms):
        def training_step(self, batch, batch_idx):
            return cross_entropy(checkpoint(self.model, batch[0].requires_grad_(), use_reentrant=reentrant), batch[1])

    fit = trainer(tmp_path, POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    with pytest.warns(UserWarning, match="all batch norms are frozen"):
        fit.fit(Checkpointed(), loader())
    assert all((pom.radius == 1).all() for pom in fit.optimizers[0].poms.values())


def test_norms_that_lightnings_own_finetuning_freezes_hold_radii(tmp_path):
    class FreezeNorms(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze([m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)], train_bn=False)

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    callbacks = FreezeNorms(), POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, *callbacks, max_epochs=3)
    module = LitTiny(lr=0.05)
    assert module.model.norm.running_mean is not None
    with pytest.warns(UserWarning, match="all batch norms are frozen"):
        fit.fit(module, loader())
    assert all((pom.radius == 1).all() for pom in fit.optimizers[0].poms.values())


@pytest.mark.parametrize("told", [True, False])
def test_whether_norms_are_frozen_is_known_to_a_fit_that_is_resumed_between_epochs(tmp_path, told):
    def run(max_epochs, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = POMGrouping(start="preserve"), FeatureStdRescaling(every_n_batches=1), checkpoint
        fit = trainer(tmp_path, *callbacks, max_epochs=max_epochs, enable_checkpointing=True)
        module = FrozenNorms()
        with pytest.warns(UserWarning, match="all batch norms are frozen"):
            fit.fit(module, loader(), ckpt_path=ckpt_path)
        return fit

    run(2)
    path = tmp_path / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)
    (state,) = (state for name, state in saved["callbacks"].items() if "FeatureStdRescaling" in name)
    assert state["behind"] == ["model.norm", "model.up.1"]
    if not told:  # of a version that did not tell: all norms count
        del state["behind"]
        torch.save(saved, path)
    assert all((pom.radius == 1).all() for pom in run(3, path).optimizers[0].poms.values())


def test_a_fit_that_goes_on_without_it_and_then_with_it_keeps_the_radii_that_it_had_set(tmp_path):
    class Louder(Callback):
        """Three times as loud from the second epoch on."""

        def on_train_epoch_start(self, trainer, pl_module):
            trainer.train_dataloader.dataset.tensors[0].mul_(3 if trainer.current_epoch == 1 else 1)

    def run(max_epochs, data, *callbacks, ckpt_path=None):
        fit, module = trainer(tmp_path, POMGrouping(), *callbacks, max_epochs=max_epochs), Frozen()
        fit.fit(module, data, ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        pom = fit.optimizers[0].pom(module.model.conv.weight)
        return pom.radius, pom.components

    data, last = loader(), tmp_path / "last.ckpt"
    first, weights = run(3, data, Louder(), FeatureStdRescaling(every_n_batches=1))
    torch.testing.assert_close(first, torch.full((24,), 1 / 3))
    run(4, data, ckpt_path=last)
    for epochs in (6, 7):
        found = run(epochs, data, FeatureStdRescaling(every_n_batches=1), ckpt_path=last)
        for mine, expected in zip(found, (first, weights), strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_layer_that_lightning_prunes_in_the_middle_of_a_fit_is_read_on(tmp_path):
    class Later(ModelPruning):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.apply_pruning(0.3)

    rescaling, module = FeatureStdRescaling(every_n_batches=1), LitTiny(lr=0.01)
    pruning = Later("l1_unstructured", [(module.model.conv, "weight")], amount=0.3, make_pruning_permanent=False)
    fit = trainer(tmp_path, POMGrouping(), rescaling, pruning, max_epochs=3)
    fit.fit(module, loader())
    assert "weight_orig" in dict(module.model.conv.named_parameters())
    expected = first_layer_std().mean().item()
    assert [len(row["layers"]) for row in rescaling.history] == [len(fit.optimizers[0].poms)] * 3
    found = [std["std"] for row in rescaling.history for name, std in row["layers"].items() if "model.conv" in name]
    assert found == pytest.approx([expected] * 3, rel=1e-5)


class Marked(torch.Tensor):
    """As other libraries have them, with something of their own beside the numbers."""


def test_features_of_a_class_of_their_own_leave_plain_radii_and_a_checkpoint_that_is_read_without_it(tmp_path):
    class WithMarks(LitTiny):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].as_subclass(Marked), batch[1]), batch_idx)

    fit = trainer(tmp_path, POMGrouping(), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    fit.fit(WithMarks(lr=0.05), loader())
    assert {type(pom.radius) for pom in fit.optimizers[0].poms.values()} == {torch.Tensor}
    fit.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]


def test_a_channel_that_is_dead_at_first_has_its_first_lambda_from_when_it_lives(tmp_path):
    class Waking(Callback):
        """Channel 0 is 0 in the first epoch; from the third on all channels are twice as loud."""

        def on_train_epoch_start(self, trainer, pl_module):
            x = trainer.train_dataloader.dataset.tensors[0]
            if trainer.current_epoch == 0:
                self.kept = x[:, 0].clone()
                x[:, 0] = 0
            if trainer.current_epoch == 1:
                x[:, 0] = self.kept
            if trainer.current_epoch == 2:
                x.mul_(2)

    fit = trainer(tmp_path, Waking(), FeatureStdRescaling(every_n_batches=1), max_epochs=4)
    module = Frozen()
    fit.fit(module, loader())
    pom = fit.optimizers[0].poms[module.model.conv.weight]
    torch.testing.assert_close(pom.radius, torch.full((24,), 0.5))


def test_what_was_validated_is_what_was_trained(tmp_path):
    radii = []

    class Validated(Frozen):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                radii.append(self.trainer.optimizers[0].pom(self.model.conv.weight).radius.clone())

    fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(), max_epochs=1)
    fit.fit(Validated(), loader(), loader(8))
    assert len(radii) == 1
    assert torch.equal(radii[0], torch.ones(24))
    assert torch.equal(fit.optimizers[0].pom(fit.model.model.conv.weight).radius, torch.ones(24))


def test_only_training_is_read(tmp_path):
    # Validation images are a hundred times louder: reading them would show.
    for every, read in ((1, 4), (3, 2)):
        rescaling = FeatureStdRescaling(every_n_batches=every)
        fit = trainer(tmp_path, rescaling, max_epochs=1, num_sanity_val_steps=2, val_check_interval=0.5)
        counts = []

        class Count(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, r=rescaling, c=counts):
                c.append(r._metrics["model.conv"].moments[0, 0].item())

        fit.callbacks.append(Count())
        fit.fit(Frozen(), loader(), loader(8, scale=100.0))
        assert counts[-1] == read * 8 * 36  # batches, images, pixels
        assert rescaling.history[0]["layers"]["model.conv"]["std"] < 2


@pytest.mark.parametrize("end", ["normal", "error", "interrupt", "stop"])
def test_hooks_are_gone_whatever_ends_the_fit(tmp_path, end):
    class Ending(LitTiny):
        def training_step(self, batch, batch_idx):
            assert self.model.conv._forward_hooks  # they are there in training
            if end == "error" and batch_idx == 2:
                raise RuntimeError("boom")
            if end == "interrupt" and batch_idx == 2:
                raise KeyboardInterrupt
            if end == "stop":
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    module = Ending()
    fit = trainer(tmp_path, FeatureStdRescaling(every_n_batches=1), max_epochs=1)
    if end == "error":
        with pytest.raises(RuntimeError, match="boom"):
            fit.fit(module, loader())
    elif end == "interrupt":
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit.fit(module, loader())
    else:
        fit.fit(module, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_it_works_without_the_mixin_and_without_the_grouping_callback(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(pom_param_groups(self, start="project"), lr=0.1)

    rescaling = FeatureStdRescaling()
    trainer(tmp_path, rescaling, max_epochs=2).fit(Own(), loader())
    assert len(rescaling.history) == 2
    assert rescaling.history[1]["layers"]["model.conv"]["radius"] < 1


def test_it_may_come_before_the_grouping_callback(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1)

    rescaling = FeatureStdRescaling()
    trainer(tmp_path, rescaling, POMGrouping(), max_epochs=1).fit(Own(), loader())
    assert len(rescaling.history[0]["layers"]) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda self: torch.optim.SGD(self.parameters(), lr=0.1), "returned SGD; inherit from FGSGDMixin"),
        (
            lambda self: FGSGD(self.parameters(), lr=0.1),
            "no weight of the FGSGD is on a product .*; add POMGrouping",
        ),
        (lambda self: None, "returned no optimizer|returned _MockOptimizer"),
    ],
)
def test_an_optimizer_without_manifolds_is_refused_before_training(tmp_path, make, message):
    class Own(LitBase):
        configure_optimizers = make

        def training_step(self, batch, batch_idx):
            raise AssertionError("training started")

    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, FeatureStdRescaling()).fit(Own(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": "he"}, "gamma: unknown reading 'he'"),
        ({"every_n_batches": 0}, "every_n_batches: 0 is not"),
        ({"limit": 0.5}, "limit: 0.5 is not"),
    ],
    ids=["gamma", "every", "limit"],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureStdRescaling(**options)


def test_the_clamp_says_once_that_it_acts(tmp_path, caplog):
    # The logger's own level too: an experiment that ran in this process before may have made it quiet.
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "pytorch_lightning"):
        logging.getLogger("pytorch_lightning").propagate = True
        fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(), max_epochs=4)
        fit.fit(Frozen(), loader(scale=0.1))
    assert sum("λ < 1 in" in record.getMessage() for record in caplog.records) == 1
    pom = fit.optimizers[0].poms[fit.model.model.conv.weight]
    torch.testing.assert_close(pom.radius, torch.full((24,), gamma(pom.cutting)))


def test_a_layer_that_is_never_used_keeps_its_radius_and_is_named_once(tmp_path):
    class Idle(LitTiny):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Linear(5, 4)

    fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(), max_epochs=3)
    with pytest.warns(UserWarning, match=r"the input of idle was not seen .* its R stays") as record:
        fit.fit(Idle(), loader())
    assert sum("idle" in str(w.message) for w in record) == 1
    radius = fit.optimizers[0].pom(fit.model.idle.weight).radius
    assert torch.equal(radius, torch.ones_like(radius))


@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_a_fit_stopped_after_an_epoch_and_resumed_ends_like_one_that_was_not(tmp_path, start):
    def run(folder, max_epochs, ckpt_path=None):
        torch.manual_seed(7)
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callbacks = POMGrouping(start=start, seed=4), FeatureStdRescaling(every_n_batches=2), checkpoint
        fit = trainer(tmp_path, *callbacks, max_epochs=max_epochs, enable_checkpointing=True)
        module = LitTiny()
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return fit, module

    whole, module = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    resumed, again = run(tmp_path / "part", 4, tmp_path / "part" / "epoch=1.ckpt")
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    (mine,), (theirs,) = whole.optimizers, resumed.optimizers
    for p, q in zip(mine.poms, theirs.poms, strict=True):
        a, b = mine.pom(p), theirs.pom(q)
        for x, y in itertools.chain(zip(a[:2], b[:2], strict=True), zip(a[3:6], b[3:6], strict=True)):
            assert torch.equal(x, y)
        assert torch.equal(mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    histories = [
        next(c for c in fit.callbacks if isinstance(c, FeatureStdRescaling)).history for fit in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    assert torch.load(tmp_path / "part" / "epoch=1.ckpt", weights_only=True)


class Twins(LightningModule):
    """Two networks with the same names of layers, each with groups of its own; the second's images are ten times larger."""

    def __init__(self, optimizers):
        super().__init__()
        self.automatic_optimization = False
        self.number = optimizers
        torch.manual_seed(0)
        self.first, self.second = TinyNet(), TinyNet()

    def configure_optimizers(self):
        groups = [pom_param_groups(net, start="project") for net in (self.first, self.second)]
        if self.number == 1:
            return FGSGD([*groups[0], *groups[1]], lr=0.01)
        return [FGSGD(each, lr=0.01) for each in groups]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = sum(cross_entropy(net(x), batch[1]) for net, x in ((self.first, batch[0]), (self.second, 10 * batch[0])))
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("optimizers", [1, 2])
def test_networks_with_the_same_names_of_layers_have_each_its_own_lambda_and_radius(tmp_path, optimizers):
    callback, monitor = FeatureStdRescaling(every_n_batches=1), NormBoundMonitor(every_n_steps=3)
    module = Twins(optimizers)
    fit = trainer(tmp_path, callback, monitor, max_epochs=2)
    fit.fit(module, loader())
    layers = callback.history[0]["layers"]
    named = {f"{net}.{layer}" for net in ("first", "second") for layer in ("conv", "linear")}
    assert named <= set(layers) == set(monitor.latest)
    assert layers["second.conv"]["std"] == pytest.approx(10 * layers["first.conv"]["std"], rel=1e-5)
    for net in (module.first, module.second):
        (look,) = (o.pom(net.conv.weight) for o in fit.optimizers if o.pom(net.conv.weight) is not None)
        assert bool((look.radius < 1).all())  # γ/λ of that network
    assert (
        callback.history[1]["layers"]["second.conv"]["radius"]
        < 0.2 * callback.history[1]["layers"]["first.conv"]["radius"]
    )
    # Two optimizers count two steps a batch: no look is skipped, whatever number divides the count.
    steps = [row["step"] for row in monitor.history]
    assert steps == ([0, 3, 6] if optimizers == 1 else [0, 4, 6, 10, 12, 16])


def test_a_second_fit_starts_anew(tmp_path):
    rescaling, module = FeatureStdRescaling(every_n_batches=1), Frozen()
    trainer(tmp_path, rescaling, max_epochs=2).fit(module, loader())
    again = trainer(tmp_path, rescaling, max_epochs=2)
    again.fit(module, loader(scale=3.0))  # λ is three times larger, but so is λ¹
    assert len(rescaling.history) == 2
    radius = again.optimizers[0].pom(module.model.conv.weight).radius
    torch.testing.assert_close(radius, torch.ones_like(radius))


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 8])
def test_lambda_of_every_nth_batch_is_as_near_to_that_of_all_as_is_stated(every):
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    generator = torch.Generator().manual_seed(0)
    digits = digits[torch.randperm(len(digits), generator=generator)[:1792]].expand(-1, 3, -1, -1)
    batches = torch.nn.functional.interpolate(digits, size=64, mode="bilinear").split(64)
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    found: dict[int, dict[nn.Module, FeatureStd]] = {every: {}, 1: {}}
    reading: list[int] = []

    def read(module, args):
        for n in reading:
            found[n].setdefault(module, FeatureStd(args[0].shape[1])).update(args[0])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(read)
    with torch.no_grad():
        for i, batch in enumerate(batches):
            reading[:] = [1, every] if i % every == 0 else [1]
            model(batch)
    pairs = zip(found[every].values(), found[1].values(), strict=True)
    errors = torch.cat([(some.compute() / full.compute() - 1).abs() for some, full in pairs])
    assert errors.quantile(0.95) <= 0.5 / (64 * len(batches[::every])) ** 0.5


def test_checkpointed_blocks_are_read_once(tmp_path):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(LitTiny):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(checkpoint(self.model, batch[0], use_reentrant=False), batch[1])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            counts.append(rescaling._metrics["model.conv"].moments[0, 0].item())

    counts, rescaling = [], FeatureStdRescaling(every_n_batches=1)
    trainer(tmp_path, rescaling, max_epochs=1).fit(Checkpointed(), loader(16))
    assert counts[-1] == 16 * 36  # images, pixels: not once more when they are run again in the backward pass


def test_gamma_read_literally_is_resumed_between_epochs(tmp_path):
    def run(max_epochs, ckpt_path=None):
        torch.manual_seed(7)
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = POMGrouping(start="project"), FeatureStdRescaling("literal", every_n_batches=1), checkpoint
        fit = trainer(tmp_path, *callbacks, max_epochs=max_epochs, enable_checkpointing=True)
        module = LitTiny()
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return fit.optimizers[0].pom(module.model.conv.weight).radius

    whole = run(2)
    assert torch.equal(run(2, tmp_path / "epoch=0.ckpt"), whole)


def test_blocks_of_a_grouped_convolution_have_the_lambda_of_their_group(tmp_path):
    class Spy(LitTiny):
        def __init__(self):
            super().__init__(lr=0.0)
            self.model.grouped.register_forward_hook(lambda m, x, y: seen.append(x[0].detach().clone()))

    seen = []
    rescaling = FeatureStdRescaling(every_n_batches=1, clamp=False)
    fit = trainer(tmp_path, POMGrouping(start="project", cutting="filter", block_size=2), rescaling, max_epochs=2)
    module = Spy()
    fit.fit(module, loader())
    x = torch.cat(seen[:4]).double().transpose(0, 1)
    lam = torch.stack([x[:3].std(correction=0), x[3:].std(correction=0)])  # of the fan-in of each conv group
    pom = fit.optimizers[0].poms[module.model.grouped.weight]
    torch.testing.assert_close(pom.radius, (gamma(pom.cutting) / lam).repeat_interleave(2).float(), rtol=1e-4, atol=0)


def test_what_was_said_is_said_again_in_the_next_fit(tmp_path):
    class Idle(LitTiny):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Linear(5, 4)

    rescaling = FeatureStdRescaling()
    for _ in range(2):
        with pytest.warns(UserWarning, match="the input of idle was not seen"):
            trainer(tmp_path, rescaling, max_epochs=1).fit(Idle(), loader())


def test_a_norm_without_statistics_holds_no_rescale_back(tmp_path):
    # A norm that never keeps statistics has none that could not follow.
    class Own(LitTiny):
        def __init__(self):
            super().__init__(lr=0.05)
            self.model.norm = nn.BatchNorm2d(4, track_running_stats=False)

        def on_train_epoch_start(self):
            self.model.norm.eval()

    fit = trainer(tmp_path, FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    module = Own()
    fit.fit(module, loader())
    assert (fit.optimizers[0].pom(module.model.linear.weight).radius != 1).all()


def test_an_epoch_that_the_module_ends_before_a_batch_leaves_no_hook_behind(tmp_path):
    class Ends(LitTiny):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.trainer.current_epoch == 1 and batch_idx == 1 else None

        def on_train_epoch_end(self):
            self.model(1000 * torch.ones(1, 4, 6, 6))  # nothing that is trained on

    rescaling = FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, rescaling, max_epochs=4)
    module = Ends(lr=0.0)
    fit.fit(module, loader())
    for row in rescaling.history:
        assert row["layers"]["model.conv"]["std"] < 2


def test_a_history_that_was_kept_outlives_the_next_fit(tmp_path):
    rescaling = FeatureStdRescaling()
    trainer(tmp_path, rescaling, max_epochs=2).fit(LitTiny(), loader())
    kept = rescaling.history
    trainer(tmp_path, rescaling, max_epochs=1).fit(LitTiny(), loader())
    assert (len(kept), len(rescaling.history)) == (2, 1)

"""What users do when they fine-tune, each in a real Trainer run: freeze, unfreeze, tie, export, mix up, average."""

import warnings

import pytest
import timm
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import BackboneFinetuning
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fgsgd import FGSGD, FeatureStdRescaling, FGSGDMixin, NormBoundMonitor, POMGrouping, export_timm
from tests.lit import trainer


class LitTimm(FGSGDMixin, LightningModule):
    """A small timm model on random images."""

    def __init__(self, name="test_resnet", lr=0.1, momentum=0.9, **options):
        super().__init__()
        self.save_hyperparameters(ignore=["options"])
        self.model = timm.create_model(name, num_classes=4, **options)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])


def images(count=24, size=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(4, (count,), generator=generator)), batch_size=8)


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def on_manifolds(optimizer):
    return max(optimizer.distance(p) for p in optimizer.poms) < 1e-5


class LitOwn(LitTimm):
    """The optimizer made by hand, of all parameters: POMGrouping constrains it."""

    def configure_optimizers(self):
        return FGSGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("lit", [LitTimm, LitOwn])
@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_frozen_weights_stay_as_they_are_bit_for_bit(tmp_path, start, lit):
    module = lit()
    for name, p in module.named_parameters():
        p.requires_grad = "layer1" not in name
    before = snapshot(module)
    fit = trainer(
        tmp_path, POMGrouping(start=start), FeatureStdRescaling(every_n_batches=1), NormBoundMonitor(), max_epochs=3
    )
    fit.fit(module, images())
    (optimizer,) = fit.optimizers
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == ("layer1" in name), name
        assert ("layer1" not in name) or optimizer.pom(p) is None
    assert on_manifolds(optimizer)


def test_weights_that_are_frozen_in_the_middle_of_a_fit_are_not_rescaled(tmp_path):
    class Freeze(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                pl_module.model.layer1.requires_grad_(False)
                for p in pl_module.model.layer1.parameters():
                    p.grad = None
                self.kept = snapshot(pl_module.model.layer1)

    freeze, module = Freeze(), LitTimm()
    fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(every_n_batches=1), freeze, max_epochs=3)
    fit.fit(module, images())
    for name, p in module.model.layer1.named_parameters():
        assert torch.equal(p, freeze.kept[name])
    pom = fit.optimizers[0].pom(module.model.layer2[0].conv1.weight)
    assert not torch.equal(pom.radius, torch.ones_like(pom.radius))


class LitBackbone(LitTimm):
    """Lightning's BackboneFinetuning wants a ``backbone``."""

    @property
    def backbone(self):
        return torch.nn.Sequential(*[layer for name, layer in self.model.named_children() if name != "fc"])


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_a_backbone_that_is_unfrozen_later_gets_the_index_sets_that_were_drawn_for_it_at_the_start(tmp_path, start):
    class Watch(Callback):
        frozen = None

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.frozen = snapshot(pl_module.backbone)
                self.poms = len(trainer.optimizers[0].poms)

    watch, module, grouping = Watch(), LitBackbone(), POMGrouping(start=start, include=["model.*"], exclude=())
    before = snapshot(module.backbone)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, verbose=False)
    rescaling = FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, unfreeze, grouping, rescaling, watch, max_epochs=3)
    fit.fit(module, images())
    (optimizer,) = fit.optimizers
    # Lightning leaves the batch norms trainable.
    assert all(torch.equal(p, before[name]) for name, p in watch.frozen.items() if p.ndim > 1)
    assert watch.poms == 1  # the head alone
    backbone = [p for p in module.backbone.parameters() if p.ndim > 1]
    plan = grouping._groups.plan
    for p in backbone:
        planned, live = plan.weights[p].index_sets, optimizer.poms[p].sets
        assert torch.equal(planned.group, live.group)
        assert torch.equal(planned.manifold, live.manifold)
        assert not torch.equal(p, before[next(n for n, q in module.backbone.named_parameters() if q is p)])
    assert on_manifolds(optimizer)
    assert len(rescaling.history[0]["layers"]) == 1
    assert len(rescaling.history[-1]["layers"]) == 1 + len(backbone)


def test_a_fit_may_start_with_all_that_is_to_be_constrained_frozen(tmp_path):
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    rescaling, monitor = FeatureStdRescaling(every_n_batches=1), NormBoundMonitor()
    fit, module = trainer(tmp_path, unfreeze, POMGrouping(), rescaling, monitor, max_epochs=3), LitBackbone()
    fit.fit(module, images())
    convolutions = sum(p.ndim == 4 for p in module.parameters())
    assert len(fit.optimizers[0].poms) == convolutions
    assert [len(record["layers"]) for record in rescaling.history] == [convolutions] * 2  # of epochs 1 and 2
    assert [len(look["layers"]) for look in monitor.history] == [0, 0, convolutions, convolutions]
    assert on_manifolds(fit.optimizers[0])


def test_tied_weights_are_stepped_and_rescaled_once(tmp_path):
    class Tied(LitTimm):
        def __init__(self):
            super().__init__("test_vit", img_size=32)
            for block in self.model.blocks[1:]:
                block.mlp.fc1.weight = self.model.blocks[0].mlp.fc1.weight

    module = Tied()
    fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(every_n_batches=1), max_epochs=3)
    fit.fit(module, images())
    shared = module.model.blocks[0].mlp.fc1.weight
    assert all(block.mlp.fc1.weight is shared for block in module.model.blocks)
    (optimizer,) = fit.optimizers
    assert sum(p is shared for group in optimizer.param_groups for p in group["params"]) == 1
    assert on_manifolds(optimizer)
    radius = optimizer.pom(shared).radius
    assert (radius < 1).all()
    assert len(radius.unique()) == 1


def test_what_was_trained_is_exported_and_loads_into_timm(tmp_path):
    module = LitTimm()
    trainer(tmp_path, POMGrouping(), FeatureStdRescaling(), max_epochs=2).fit(module, images())
    path = export_timm(module, tmp_path / "w.safetensors")
    plain = timm.create_model("test_resnet", num_classes=4, checkpoint_path=str(path)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), module.model.eval()(x))


def test_mixup_and_timms_ema_work_beside_it(tmp_path):
    class Mixed(LitTimm):
        def __init__(self):
            super().__init__()
            self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)

        def on_train_start(self):
            self.ema = ModelEmaV3(self.model, decay=0.8)

        def training_step(self, batch, batch_idx):
            x, y = self.mixup(*batch)
            return SoftTargetCrossEntropy()(self.model(x), y)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.ema.update(self.model, step=self.global_step)

    module = Mixed()
    fit = trainer(tmp_path, POMGrouping(), FeatureStdRescaling(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left their manifolds.*")
        fit.fit(module, images())
    assert on_manifolds(fit.optimizers[0])
    # The average itself is off the manifolds, and an ordinary timm model.
    average = dict(module.ema.module.named_parameters())
    assert any(not torch.equal(p, average[name]) for name, p in module.model.named_parameters())


def test_lightnings_weight_averaging_works_beside_it(tmp_path):
    # It swaps the average in for validation and the trained weights back in after it: no step sees an average.
    newer = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="of a newer Lightning")
    averaging = newer.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
    module = LitTimm()
    fit = trainer(tmp_path, POMGrouping(start="project"), FeatureStdRescaling(), averaging, max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left their manifolds.*")
        fit.fit(module, images(), images(8))
    # What is left in the end is the average, which is near the manifolds and not on them.
    distances = [fit.optimizers[0].distance(p) for p in fit.optimizers[0].poms]
    assert max(distances) > 1e-5
    fit.optimizers[0].project()
    assert on_manifolds(fit.optimizers[0])


def test_layer_decay_and_no_weight_decay_reach_the_optimizer_through_the_callback(tmp_path):
    grouping = POMGrouping(layer_decay=0.5, no_weight_decay=True)
    module = LitTimm("test_vit", img_size=32)
    module.weight_decay = 0.1
    fit = trainer(tmp_path, grouping, FeatureStdRescaling(), max_epochs=1)
    fit.fit(module, images())
    rates = {p: group["lr"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    net = module.model
    assert rates[net.head.weight] == pytest.approx(0.1)
    assert rates[net.blocks[-1].mlp.fc1.weight] == pytest.approx(0.05)
    assert rates[net.patch_embed.proj.weight] == pytest.approx(0.1 * 0.5 ** (len(net.blocks) + 1))
    decays = {p: group["weight_decay"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert (decays[net.pos_embed], decays[net.head.bias], decays[net.head.weight]) == (0.0, 0.0, 0.1)


def test_after_an_update_of_r_with_an_unchanged_lambda_the_network_computes_the_same(tmp_path):
    class Seeing(LitTimm):
        """Sees the same images in each epoch, and takes no step: λ does not change."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = Seeing()
    x = images().dataset.tensors[0]
    with torch.no_grad():
        before = module.model.train()(x)
    rescaling = FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, POMGrouping(), rescaling, max_epochs=3)
    fit.fit(module, images())
    assert len(rescaling.history) == 3
    for pom in fit.optimizers[0].poms.values():
        torch.testing.assert_close(pom.radius, torch.ones_like(pom.radius), atol=1e-6, rtol=0)
    with torch.no_grad():
        after = module.model.train()(x)
    assert (after - before).abs().max() <= 1e-5 * (before.max() - before.min())

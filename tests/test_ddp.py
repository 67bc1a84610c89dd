"""Two processes with DistributedDataParallel train as one does, with the same weights in both, bit by bit."""

import hashlib
import itertools

import pytest
import timm
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_fgsgd import (
    FGSGD,
    FeatureStdRescaling,
    FGSGDMixin,
    NormBoundMonitor,
    POMGrouping,
    POMProjection,
    pom_param_groups,
)
from lightning_fgsgd.scaling import gamma
from tests import lit, processes
from tests.test_checkpoints import Resumable, differences
from tests.test_sharding import Net

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EPOCHS, IMAGES, BATCH = 3, 48, 8

MODELS = {
    "conv net": (Net, 6),  # without batch norm
    "test_vit": (lambda: timm.create_model("test_vit", num_classes=3, img_size=32), 32),  # neither
    "test_resnet": (lambda: timm.create_model("test_resnet", num_classes=3), 32),  # with batch norm
}


class Lit(FGSGDMixin, LightningModule):
    def __init__(self, model, lr=0.1, momentum=0.9):
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.model = model

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])


class Watch(Callback):
    """Notes the start, the weights after every step, and all that enters Linear layers and convolutions."""

    def __init__(self):
        self.start, self.digests, self.inputs = {}, [], []

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.start = {name: x.clone() for name, x in pl_module.named_parameters()}
        for p, pom in optimizer.poms.items():
            look = optimizer.pom(p)
            self.start |= {
                f"{pom.name} {name}": getattr(look, name) for name in ("manifold", "group", "radius", "scale")
            }
        for name, module in pl_module.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_pre_hook(
                    lambda _, x, name=name: self.inputs[-1].setdefault(name, []).append(x[0])
                )

    def on_train_epoch_start(self, trainer, pl_module):
        self.inputs.append({})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.digests.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())


def features(inputs, name, axis):
    """All the values of each channel, (channels, values), in double precision."""
    return torch.cat([x.detach().double().movedim(axis, 0).flatten(1) for x in inputs[name]], 1)


def fit(folder, model, start, devices, rank=0, strategy="auto", **settings):
    create, pixels = MODELS[model]
    torch.manual_seed(rank)  # of every process another model: DDP sends round that of the first
    module = Lit(create())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, pixels, pixels, generator=generator)
    data = TensorDataset(x, torch.randint(3, (IMAGES,), generator=generator))
    watch, rescaling = Watch(), FeatureStdRescaling(every_n_batches=1)
    callbacks = POMGrouping(start=start, **settings), rescaling, NormBoundMonitor(), watch
    options = {"max_epochs": EPOCHS, "devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    trainer = lit.trainer(folder, *callbacks, **options)
    sampler = DistributedSampler(data, devices, rank)  # together they take the batches of one process
    trainer.fit(module, DataLoader(data, batch_size=BATCH // devices, sampler=sampler))
    (optimizer,) = trainer.optimizers
    axes = {name: -1 if isinstance(m, nn.Linear) else 1 for name, m in module.named_modules()}
    return {
        "watch": watch.start,
        "digests": watch.digests,
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "state": optimizer.state_dict(),
        "lambda": rescaling.state_dict(),
        "bounds": callbacks[2].history,
        "radius": {pom.name.removesuffix(".weight"): (pom.radius, pom.reads()) for pom in optimizer.poms.values()},
        "features": [{name: features(x, name, axes[name]) for name in x} for x in watch.inputs],
        "distance": max(map(optimizer.distance, optimizer.poms)),
    }


CASES = [*itertools.product(["conv net"], ["preserve", "project", "random"]), ("test_vit", "preserve")]


def in_two(rank, folder, cases):
    return [
        fit(
            *(folder, model, start, 2, rank),
            strategy=DDPStrategy(gradient_as_bucket_view=True, static_graph=True) if i % 2 else "ddp",
            scheme=("pio", "pi", "po")[i % 3],
        )
        for i, (model, start) in enumerate(cases)
    ]


def brute_force(found, radius):
    """The standard deviation of each channel that the weights read, over both processes; over all channels for blocks."""
    std = torch.cat(found, 1).std(1, correction=0)
    return std if len(radius[1].unique()) > 1 else torch.cat(found, 1).std(correction=0).expand(1)


@pytest.mark.slow
def test_two_processes_start_and_step_alike_bit_by_bit_read_lambda_together_and_train_as_one(tmp_path):
    cases = [*CASES, ("test_resnet", "random")]
    for i, (case, first, second) in enumerate(zip(cases, *processes.run(tmp_path, in_two, 2, cases), strict=True)):
        for what in ("watch", "weights", "state", "lambda", "bounds"):
            assert differences(first[what], second[what]) == [], (case, what)
        assert len(first["digests"]) == EPOCHS * IMAGES // BATCH
        assert first["digests"] == second["digests"], case
        assert len(set(first["digests"])) == len(first["digests"])
        assert first["distance"] < 1e-5

        # λ of every epoch, and what R became with it.
        model, start = case
        history = first["lambda"]["history"]
        assert [epoch["epoch"] for epoch in history] == list(range(EPOCHS))
        for epoch in range(EPOCHS):
            for name, row in history[epoch]["layers"].items():
                read = [found["features"][epoch][name] for found in (first, second)]
                std = brute_force(read, first["radius"][name])
                assert row["std"] == pytest.approx(float(std.mean()), rel=1e-5), (case, name)
        layers = history[0]["layers"]
        assert len(layers) >= 6, layers
        for name in layers if start == "preserve" else ():
            radius, reads = first["radius"][name]
            one, two = (
                brute_force([found["features"][epoch][name] for found in (first, second)], first["radius"][name])
                for epoch in (0, EPOCHS - 2)
            )
            expected = (one / two).clamp(0.1, 10)[reads].float()
            torch.testing.assert_close(radius, expected, rtol=1e-4, atol=0, msg=lambda m, at=(case, name): f"{at}: {m}")

        if model != "test_resnet":
            alone = fit(tmp_path, model, start, 1, scheme=("pio", "pi", "po")[i % 3])
            largest = max(float(w.abs().max()) for w in alone["weights"].values())
            for name, weight in alone["weights"].items():
                assert float((first["weights"][name] - weight).abs().max()) < 1e-5 * max(1, largest), (case, name)
            for mine, theirs in zip(history, alone["lambda"]["history"], strict=True):
                for name, row in theirs["layers"].items():
                    assert mine["layers"][name] == pytest.approx(row, rel=1e-4), (case, name)


# Processes that do not do the same ------------------------------------------------------------------------------------


class Uneven(Lit):
    """The first process uses one layer and the second another, on larger images."""

    def __init__(self):
        super().__init__(nn.ModuleDict({name: nn.Conv2d(3, 4, 3) for name in ("a", "b", "both")}))
        self.head = nn.Linear(4, 3)
        self.read = []

    def get_classifier(self):
        return self.head

    def training_step(self, batch, batch_idx):
        x = batch[0] if self.global_rank else batch[0][..., :5, :5] + 2
        self.read.append(x)
        own = self.model["b" if self.global_rank else "a"]
        return cross_entropy(self.head((own(x) + self.model["both"](x)).mean((2, 3))), batch[1])


def uneven(rank, folder, start):
    torch.manual_seed(rank)
    module, rescaling = Uneven(), FeatureStdRescaling(gamma="literal", clamp=False, every_n_batches=1)
    strategy = DDPStrategy(find_unused_parameters=True)
    fit = lit.trainer(folder, POMGrouping(start=start), rescaling, max_epochs=3, devices=2, strategy=strategy)
    data = TensorDataset(torch.randn(16, 3, 9, 9), torch.randint(3, (16,)))
    fit.fit(module, DataLoader(data, batch_size=4))
    radius = {pom.name.split(".")[1]: pom.radius for pom in fit.optimizers[0].poms.values()}
    pixels = {"a": 3 * 3, "b": 7 * 7, "both": 7 * 7}
    size = {
        name: gamma(fit.optimizers[0].poms[module.model[name].weight].cutting, "literal", pixels[name])
        for name in radius
    }
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return weights, rescaling.state_dict(), radius, size, torch.cat(module.read[2:4])


@pytest.mark.slow
def test_a_layer_that_one_process_uses_and_images_of_another_size_neither_stop_the_others_nor_part_the_weights(
    tmp_path,
):
    (one, state, radius, size, first), (two, other, _, _, second) = processes.run(tmp_path, uneven, 2, "project")
    assert differences(one, two) == []
    assert differences(state, other) == []
    read = {"a": [first], "b": [second], "both": [first, second]}
    for name, parts in read.items():
        channels = torch.cat([x.double().movedim(1, 0).flatten(1) for x in parts], 1)
        expected = size[name] / channels.std(1, correction=0)
        torch.testing.assert_close(radius[name].view(4, 3), expected.float().expand(4, 3))


class UnevenNorms(Uneven):
    """Images grow louder; a norm that is frozen follows what both processes do, one that is not the second's alone."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"both": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})

    def on_train_epoch_start(self):
        self.norms["both"].eval()

    def training_step(self, batch, batch_idx):
        x = (1 + self.current_epoch) * batch[0]
        out = self.norms["both"](self.model["both"](x))
        if self.global_rank:
            out = out + self.norms["b"](self.model["b"](x))
        return cross_entropy(self.head(out.mean((2, 3))), batch[1])


def uneven_norms(rank, folder):
    torch.manual_seed(0)
    module, rescaling = UnevenNorms(), FeatureStdRescaling(every_n_batches=1)
    strategy = DDPStrategy(find_unused_parameters=True)
    fit = lit.trainer(folder, POMGrouping(), rescaling, max_epochs=3, devices=2, strategy=strategy)
    data = TensorDataset(torch.randn(16, 3, 9, 9), torch.randint(3, (16,)))
    fit.fit(module, DataLoader(data, batch_size=4))
    return fit.optimizers[0].pom(module.model["both"].weight).radius, rescaling.state_dict()["behind"]


@pytest.mark.slow
def test_a_norm_that_one_process_uses_lets_the_radii_of_all_follow(tmp_path):
    for radius, behind in processes.run(tmp_path, uneven_norms, 2):
        torch.testing.assert_close(radius, torch.full((12,), 1 / 2))
        assert behind == ["norms.b", "norms.both"]


class ByAdam(Lit):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def held(rank, folder):
    torch.manual_seed(rank)  # of every process another model: DDP sends round that of the first
    module, projection = ByAdam(Net()), POMProjection()
    fit = lit.trainer(folder, projection, max_epochs=2, devices=2, strategy="ddp")
    data = TensorDataset(torch.randn(16, 3, 6, 6), torch.randint(3, (16,)))
    fit.fit(module, DataLoader(data, batch_size=4))
    distance = max(map(projection.held.distance, projection.held.poms))
    return [p.detach() for p in module.parameters()], distance


@pytest.mark.slow
def test_weights_that_another_optimizer_steps_are_held_alike_in_two_processes(tmp_path):
    (first, distance), (second, _) = processes.run(tmp_path, held, 2)
    assert distance < 1e-5
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def resumable(folder, devices, rank=0, ckpt_path=None):
    torch.manual_seed(0)
    module = Lit(Net())
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 3, 6, 6, generator=generator), torch.randint(3, (40,), generator=generator))
    sampler = DistributedSampler(data, devices, rank, seed=5)  # shuffles by its seed and the epoch
    rescaling, monitor = FeatureStdRescaling(every_n_batches=2), NormBoundMonitor()
    saved = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit = lit.trainer(
        folder,
        *(POMGrouping(start="project"), rescaling, monitor),
        *(() if ckpt_path else (saved,)),
        **{"max_epochs": 3, "devices": devices, "use_distributed_sampler": False, "enable_checkpointing": True},
        strategy="ddp" if devices > 1 else "auto",
    )
    fit.fit(module, Resumable(data, batch_size=BATCH // devices, sampler=sampler), ckpt_path=ckpt_path)
    callbacks = [rescaling.state_dict(), monitor.state_dict()]
    return [dict(module.state_dict()), fit.optimizers[0].state_dict(), callbacks]


def every_checkpoint(rank, folder):
    whole = resumable(folder, 2, rank)
    dist.barrier()
    paths = sorted(folder.glob("step=*.ckpt"))
    return whole, {path.name: differences(resumable(folder, 2, rank, path), whole) for path in paths}


@pytest.mark.slow
def test_a_fit_goes_on_bit_for_bit_from_any_of_its_checkpoints_and_in_one_process_to_rounding(tmp_path):
    for _, found in processes.run(tmp_path, every_checkpoint):
        assert len(found) == 15
        assert not any(found.values()), found
    (whole, _), _ = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for step in (3, 8, 10):
        weights, _, (rescaling, _) = resumable(tmp_path, 1, ckpt_path=tmp_path / f"step={step}.ckpt")
        for name, weight in whole[0].items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
        for mine, theirs in zip(rescaling["history"], whole[2][0]["history"], strict=True):
            for name, row in theirs["layers"].items():
                assert mine["layers"][name] == pytest.approx(row, rel=1e-5), (step, name)


# A plain loop ---------------------------------------------------------------------------------------------------------


def plain(rank, folder, processes, bad=False):
    torch.manual_seed(rank)
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    optimizer = FGSGD(pom_param_groups(model, start="random"), lr=0.1, momentum=0.9)  # after the model was wrapped
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(wrapped(x[rank::processes]), y[rank::processes]).backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped(torch.full((2, 3, 6, 6), torch.nan if rank == processes - 1 else 1.0)).sum().backward()
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    return before, differences({name: p.detach() for name, p in model.named_parameters()}, before)


@pytest.mark.slow
def test_a_plain_loop_trains_as_one_process_and_a_nan_in_one_stops_both_before_anything_moves(tmp_path):
    (one, moved), (two, moved_too) = processes.run(tmp_path, plain, 2, 2)
    assert differences(one, two) == moved == moved_too == []
    for name, weight in plain(0, tmp_path, 1)[0].items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-5)

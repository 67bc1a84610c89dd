"""Weights that are spread over processes take the steps that one process takes with whole weights."""

import functools

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fgsgd import (
    FGSGD,
    FeatureStdRescaling,
    FGSGDMixin,
    NormBoundMonitor,
    POMGrouping,
    POMProjection,
    describe,
    pom_param_groups,
)
from tests import processes

COUNTS = ("name", "shape", "components", "groups", "sphere", "oblique", "stiefel", "start")
pytestmark = pytest.mark.usefixtures("quickly_compiled")  # as the other processes
# In torch 2.6, fully_shard needs a GPU.
fsdp2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="fully_shard runs on a CPU from torch 2.7 on")


class Net(nn.Module):
    """Layers that 2 or 3 processes cut between components, and layers that they do not: 9 or 10 outputs, 4 conv groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.up = nn.ConvTranspose2d(10, 6, 2)
        self.narrow = nn.Linear(6, 9)
        self.wide = nn.Linear(9, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        for layer in (self.conv, self.depthwise, self.grouped, self.pointwise, self.up):
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.wide(torch.tanh(self.narrow(x.mean((2, 3)))))))

    def get_classifier(self):
        return self.head


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 3, 6, 6, generator=generator), torch.randint(3, (24,), generator=generator)


def net(shard=None):
    torch.manual_seed(0)
    model = Net()
    if shard is not None:
        shard(model)
    return model


def whole(x):
    return x.full_tensor().detach() if hasattr(x, "full_tensor") else x.detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def most(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def fully_sharded(model, mesh=None):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.conv, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_along(model, mesh_shape, placements):
    """Every weight as a DTensor, in a plain loop: its gradient is that of the whole weight, given by hand."""
    mesh = init_device_mesh("cpu", mesh_shape)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements(p))))


def train(model, steps=4, part=slice(None), groups=None, **options):
    """A plain loop on every process's part of a batch of six."""
    optimizer = FGSGD(pom_param_groups(model, **groups or {}), **{"lr": 0.3, "momentum": 0.9, **options})
    x, y = images()
    for i in range(steps):
        batch = slice(6 * i, 6 * i + 6)
        optimizer.zero_grad()
        cross_entropy(model(x[batch][part]), y[batch][part]).backward()
        optimizer.step()
    return optimizer


CASES = {
    **{
        f"{scheme} {start}": ({"scheme": scheme, "start": start}, {})
        for scheme in ("pi", "po", "pio")
        for start in ("preserve", "project", "random")
    },
    "blocks": ({"cutting": "filter"}, {}),
    "few groups": ({"groups": 1, "manifolds": ("sphere", "stiefel", "euclidean"), "start": "project"}, {}),
    "euclidean": ({"manifolds": ("euclidean",)}, {"weight_decay": 0.1, "dampening": 0.5}),
    "average": ({}, {"rho": "average"}),
    "no normaliser": ({}, {"rho": None, "nesterov": True}),
    "embedded": ({"start": "project"}, {"metric": "embedded", "momentum": 0.0}),
    "torch's operations": ({}, {"fused": False}),
    "long steps": ({"start": "project"}, {"lr": 300.0, "rho": None}),
}


def compare(rank, folder, count):
    part = slice(rank * 6 // count, (rank + 1) * 6 // count)
    found = {}
    for name, (groups, options) in CASES.items():
        model, alone = net(fully_sharded), net()
        sharded, one = (
            train(model, part=part, groups=groups, **options),
            train(alone, groups=groups, **options),
        )
        size = max(float(p.abs().max()) for p in alone.parameters())
        same_sets = all(
            mine is theirs is None or all(torch.equal(mine[key], theirs[key]) for key in ("manifold", "slot"))
            for group, other in zip(sharded.state_dict()["param_groups"], one.state_dict()["param_groups"], strict=True)
            for mine, theirs in zip(group["pom"], other["pom"], strict=True)
        )
        distances = max((sharded.distance(p) for p in sharded.poms), default=0.0)
        held = [(pom.shard.gathered, pom.shard.spread) for pom in sharded.poms.values()]
        found[name] = (most(weights(model), weights(alone)) / max(size, 1), same_sets, distances, held)
    return found


@fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_fully_sharded_weights_take_the_steps_of_one_process(tmp_path, count):
    for found in processes.run(tmp_path, compare, count, count):
        for name, (difference, same_sets, distance, held) in found.items():
            assert difference < 1e-5, name
            assert same_sets, name
            assert distance < 1e-5, name
            assert {gathered for gathered, _ in held} == {True, False}, name  # both ways were taken
        assert {spread for _, spread in found["pi preserve"][3]} == {True, False}


def by_hand(rank, folder):
    layouts = {
        "along the inputs": ((2,), lambda p: [Shard(p.ndim - 1) if p.ndim > 1 else Replicate()]),
        "replicated and split": ((1, 2), lambda p: [Replicate(), Shard(0)]),
        "replicated": ((2,), lambda p: [Replicate()]),
        "gradients to be summed": ((2,), lambda p: [Shard(0)]),
    }
    found = {}
    for name, (shape, placements) in layouts.items():
        model, alone = net(functools.partial(split_along, mesh_shape=shape, placements=placements)), net()
        options = {"lr": 0.3, "momentum": 0.9}
        mine, one = (FGSGD(pom_param_groups(m, start="project"), **options) for m in (model, alone))
        for step in range(3):
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
                if name == "gradients to be summed" and p in mine.poms:
                    p.grad = DTensor.from_local(q.grad / 2, p.device_mesh, [Partial()])
            mine.step()
            one.step()
        found[name] = most(weights(model), weights(alone))
    return found


@pytest.mark.slow
def test_other_placements_take_them_too(tmp_path):
    for found in processes.run(tmp_path, by_hand):
        assert max(found.values()) < 1e-5, found


@torch.no_grad()
def faults(rank, folder):
    def sharded():
        mesh = init_device_mesh("cpu", (2,))
        model = net(functools.partial(split_along, mesh_shape=(2,), placements=lambda p: [Shard(0)]))
        optimizer = FGSGD(pom_param_groups(model), lr=0.1)
        for p in model.parameters():
            p.grad = distribute_tensor(torch.ones(p.shape), mesh, p.placements)
        return model, optimizer

    found = {}
    for rho in (1.0, None):
        model, optimizer = sharded()
        optimizer.param_groups[0]["rho"] = rho
        if rank == 1:
            model.wide.weight.grad.to_local()[0, 0] = torch.nan
        before = weights(model)
        try:
            optimizer.step()
        except FloatingPointError as error:
            found[f"gradient, rho={rho}"] = str(error)
        found[f"moved, rho={rho}"] = most(weights(model), before)
    model, optimizer = sharded()
    if rank == 1:
        model.wide.weight.to_local().mul_(2)
    found["distance"] = optimizer.distance(model.wide.weight)
    optimizer.step()
    found["after"] = optimizer.distance(model.wide.weight)
    model, optimizer = sharded()
    if rank == 1:
        model.wide.weight.to_local()[0, 0] = torch.inf
    try:
        optimizer.step()
    except FloatingPointError as error:
        found["weight"] = str(error)
    return found


@pytest.mark.slow
def test_what_is_wrong_in_one_process_is_noticed_in_all(tmp_path):
    for found in processes.run(tmp_path, faults):
        assert "are not finite" in found["gradient, rho=1.0"]
        assert "are not finite" in found["gradient, rho=None"]
        assert found["moved, rho=1.0"] == found["moved, rho=None"] == 0
        assert found["distance"] > 0.9
        assert found["after"] < 1e-5
        assert "wide.weight" in found["weight"]


def flattened(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        pom_param_groups(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_fsdp_of_the_first_kind_is_refused_with_the_one_to_use(tmp_path):
    (message,) = processes.run(tmp_path, flattened, 1)
    assert "fully_shard" in message
    assert "ModelParallelStrategy" in message


# Under Lightning ------------------------------------------------------------------------------------------------------


class Lit(FGSGDMixin, LightningModule):
    def __init__(self, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = None

    def configure_model(self):
        if self.model is None:
            mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
            self.model = net(None if mesh is None else functools.partial(fully_sharded, mesh=mesh))

    def train_dataloader(self):
        rank, count = self.trainer.global_rank, self.trainer.world_size
        x, y = images()
        return DataLoader(TensorDataset(x[rank::count], y[rank::count]), batch_size=8 // count)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])


def fitted(module, callbacks, folder, epochs, strategy="auto", devices=1, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, **options)
    return trainer


def fit(*args, **options):
    rescaling, monitor, module = FeatureStdRescaling(every_n_batches=1), NormBoundMonitor(samples=24), Lit()
    trainer = fitted(module, [POMGrouping(), rescaling, monitor], *args, **options)
    return trainer, {
        "weights": weights(module),
        "history": {
            (epoch["epoch"], name, key): value
            for epoch in rescaling.history
            for name, row in epoch["layers"].items()
            for key, value in row.items()
        },
        "bounds": monitor.history[-1]["network"],
        "described": [
            (*map(row.get, COUNTS), row["change"]) for row in describe(trainer.optimizers[0], quiet=True).rows
        ],
        "distance": max(map(trainer.optimizers[0].distance, trainer.optimizers[0].poms)),
    }


def parallel(distributed, devices=2):
    return ModelParallelStrategy(
        data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )


def save(rank, folder, fit=fit):
    for distributed in (True, False):
        trainer, found = fit(folder, 3, parallel(distributed), devices=2)
        trainer.save_checkpoint(folder / f"{distributed}.ckpt")
    return found


def resume(rank, folder, devices, fit=fit):
    resumed = {}
    for distributed in (True, False):
        options = {"ckpt_path": folder / f"{distributed}.ckpt", "weights_only": False}
        resumed[distributed] = fit(folder, 5, parallel(distributed, devices), devices, **options)[1]
    return resumed


def check(found, alone):
    assert most(found["weights"], alone["weights"]) < 1e-5
    assert found["described"] == alone["described"]
    assert found["distance"] < 1e-5
    assert found["history"] == pytest.approx(alone["history"], rel=1e-5)
    assert found["bounds"] == pytest.approx(alone["bounds"], rel=1e-4, abs=1e-4)


@fsdp2
@pytest.mark.slow
def test_a_fit_with_model_parallel_strategy_is_that_of_one_process_and_is_resumed_by_one_or_two(tmp_path):
    _, three_epochs = fit(tmp_path, 3)
    first, second = processes.run(tmp_path, save)
    assert first["history"] == second["history"]
    for found in (first, second):
        check(found, three_epochs)
    _, five_epochs = fit(tmp_path, 5)
    for devices in (2, 1):
        for resumed in processes.run(tmp_path, resume, devices, devices):
            check(resumed[True], five_epochs)
            check(resumed[False], five_epochs)
    # A checkpoint that is not distributed needs no strategy at all.
    check(fit(tmp_path, 5, ckpt_path=tmp_path / "False.ckpt", weights_only=False)[1], five_epochs)


class Adam(Lit):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def held(*args, **options):
    callback, module = POMProjection(), Adam()
    trainer = fitted(module, [callback], *args, **options)
    return trainer, {"weights": weights(module), "distance": max(map(callback.held.distance, callback.held.poms))}


@fsdp2
@pytest.mark.slow
def test_weights_that_another_optimizer_steps_are_held_as_in_one_process_and_resumed_by_one_or_two(tmp_path):
    def check(found, alone):
        assert most(found["weights"], alone["weights"]) < 1e-5
        assert found["distance"] < 1e-5

    _, three_epochs = held(tmp_path, 3)
    for found in processes.run(tmp_path, save, 2, held):
        check(found, three_epochs)
    _, five_epochs = held(tmp_path, 5)
    assert most(five_epochs["weights"], three_epochs["weights"]) > 1e-2
    for devices in (2, 1):
        for resumed in processes.run(tmp_path, resume, devices, devices, held):
            check(resumed[True], five_epochs)
            check(resumed[False], five_epochs)

import csv
from statistics import fmean
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from pytorch_lightning import Callback
from torch import nn
from torch.nn.functional import cross_entropy

from recipes.experiments import training
from recipes.experiments.__main__ import main
from recipes.experiments.conditioning import CONDITIONING, Conditioning, evenness, rows_given, rows_read
from recipes.experiments.methods import constrainable
from recipes.experiments.networks import cifar_resnet, with_gains
from recipes.experiments.report import write
from recipes.experiments.runner import keep
from recipes.experiments.spec import Run, load
from recipes.experiments.summary import conditioned
from recipes.experiments.training import train
from tests.recipes.test_experiments_runner import SMALL


def test_evenness_is_1_for_equal_eigenvalues_and_1_over_d_for_a_single_one():
    assert evenness(3 * torch.eye(7)) == pytest.approx(1)
    row = torch.randn(1, 7)
    assert evenness(row.mT @ row) == pytest.approx(1 / 7, rel=1e-5)
    drawn = torch.randn(30, 7).double()
    eigenvalues = torch.linalg.eigvalsh(drawn.mT @ drawn)
    assert evenness(drawn.mT @ drawn) == pytest.approx(float(eigenvalues.sum() ** 2 / (7 * (eigenvalues**2).sum())))


def test_that_of_a_kronecker_product_is_the_product():
    a, g = (x.mT @ x for x in (torch.randn(9, 4).double(), torch.randn(5, 3).double()))
    assert evenness(torch.kron(a, g)) == pytest.approx(evenness(a) * evenness(g))


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 3), nn.Conv2d(4, 3, 3, padding=1, stride=2, bias=False), nn.Conv2d(4, 6, (1, 3), dilation=2)]
)
def test_rows_are_those_that_make_up_the_output_and_the_gradient_of_the_weight(layer):
    features = torch.randn(2, 7, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 9)
    output = layer(features)
    read, given = rows_read(layer, features), rows_given(layer, output)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(read @ layer.weight.flatten(1).mT + bias, given)
    grad = torch.randn_like(output)
    (by_autograd,) = torch.autograd.grad(output, layer.weight, grad)
    torch.testing.assert_close(rows_given(layer, grad).mT @ read, by_autograd.flatten(1), rtol=1e-4, atol=1e-5)


class Weights(Callback):
    """The network and the batches of the last steps of every epoch, before those steps."""

    def __init__(self, batches):
        self.batches, self.epochs = batches, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.epochs.append([])
        if batch_idx >= trainer.num_training_batches - self.batches:
            state = {name: x.clone() for name, x in pl_module.state_dict().items()}
            self.epochs[-1].append((state, [x.clone() for x in batch], pl_module))


@pytest.mark.parametrize("method", [{"method": "sgd"}, {"method": "fgsgd", "rescale": False}], ids=["sgd", "fgsgd"])
def test_what_a_run_measures_is_what_its_last_batches_have_by_hand(monkeypatch, method):
    kept = Weights(batches=Conditioning().batches)
    real = training.Trainer
    monkeypatch.setattr(
        training, "Trainer", lambda *args, callbacks, **others: real(*args, callbacks=[*callbacks, kept], **others)
    )
    options = {**SMALL, **method, "lr": 0.1}
    found = train({**options, "conditioning": True}, 0, test=False, root="")
    plain = train(options, 0, test=False, root="")
    assert [row["train_loss"] for row in found.epochs] == [row["train_loss"] for row in plain.epochs]
    rows = found.measured["conditioning"]
    assert [set(row) for row in rows] == [{"epoch", *CONDITIONING}] * len(rows)
    for row, steps in zip(rows, kept.epochs[: len(rows)], strict=True):
        read: dict = {}
        for state, (images, labels), module in steps:
            module.load_state_dict(state)
            module.train()
            layers = constrainable(module.net)
            outputs: dict = {}

            def look(layer, args, output, outputs=outputs):
                outputs[layer] = args[0], output

            hooks = [layer.register_forward_hook(look) for layer in layers]
            loss = cross_entropy(module(images), labels)
            for hook in hooks:
                hook.remove()
            given = [outputs[layer][1] for layer in layers]
            for layer, grad in zip(layers, torch.autograd.grad(loss, given), strict=True):
                pair = rows_read(layer, outputs[layer][0].detach()), rows_given(layer, grad)
                read.setdefault(layer, []).append(pair)
        by_layer = []
        for pairs in read.values():
            spectra = [torch.linalg.svdvals(torch.cat(side).double()) ** 2 for side in zip(*pairs, strict=True)]
            dims = [side.shape[1] for side in pairs[0]]
            by_layer.append([float(s.sum() ** 2 / (d * (s**2).sum())) for s, d in zip(spectra, dims, strict=True)])
        assert row["inputs"] == pytest.approx(fmean(a for a, _ in by_layer), rel=1e-3)
        assert row["gradients"] == pytest.approx(fmean(g for _, g in by_layer), rel=1e-3)
        assert row["curvature"] == pytest.approx(fmean(a * g for a, g in by_layer), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mobilenetv3_small_050", "for layers that read all channels, got Conv2d with groups"),
        ("tf_efficientnet_lite0", "for nn.Linear and nn.Conv2d with a padding in numbers, got Conv2dSame"),
    ],
)
def test_layers_that_it_would_read_wrongly_are_refused(name, told):
    module = type("Module", (), {"net": timm.create_model(name)})
    with pytest.raises(ValueError, match=f"conditioning: {told}"):
        Conditioning().on_train_start(None, module)


def test_gradients_are_those_of_the_layer_not_of_a_gain_after_it():
    net = with_gains(cifar_resnet(10, (1, 1, 1), (4, 4, 4)))
    module, trainer = SimpleNamespace(net=net), SimpleNamespace(num_training_batches=1, current_epoch=0)
    with torch.no_grad():
        net.conv1.gain.copy_(torch.tensor([1.0, 10.0, 0.1, 3.0]))
    conditioning = Conditioning()
    conditioning.on_train_start(trainer, module)
    conditioning.on_train_batch_start(trainer, module, None, 0)
    images = torch.randn(3, 1, 8, 8)
    net(images).square().sum().backward()
    conditioning.on_train_batch_end(trainer, module, None, None, 0)
    moments = {name: conditioning._moments[net.conv1, name] for name in ("inputs", "gradients")}
    gained = []
    net.conv1.register_forward_hook(lambda layer, args, output: output.register_hook(gained.append) and None)
    net(images).square().sum().backward()
    rows = rows_given(net.conv1, gained[0] * net.conv1.gain.detach().view(-1, 1, 1)).double()
    torch.testing.assert_close(moments["gradients"], rows.mT @ rows)
    assert float(moments["inputs"].trace()) > 0


def test_layers_that_are_frozen_or_not_called_have_no_part():
    net = cifar_resnet(10, (1, 1, 1), (4, 4, 4))
    net.conv1.weight.requires_grad_(False)
    nn.init.ones_(net.layer1[0].bn2.weight)  # 0 at the start, with which no gradient reaches the branch
    module, trainer = SimpleNamespace(net=net), SimpleNamespace(num_training_batches=1, current_epoch=0)
    conditioning = Conditioning()
    conditioning.on_train_start(trainer, module)
    conditioning.on_train_batch_start(trainer, module, None, 0)
    net.layer1(torch.randn(3, 4, 8, 8)).square().sum().backward()
    conditioning.on_train_batch_end(trainer, module, None, None, 0)
    conditioning.on_train_epoch_end(trainer, module)
    called = {layer for layer, _ in conditioning._moments}
    assert called == {m for m in net.layer1.modules() if isinstance(m, nn.Conv2d)}
    assert 0 < conditioning.epochs[0]["curvature"] <= 1


def test_of_the_epochs_of_a_run_the_first_the_middle_and_the_last_are_told():
    rows = [dict.fromkeys(CONDITIONING, float(i)) for i in range(5)]
    found = conditioned([rows, [{name: x + 2 for name, x in row.items()} for row in rows]])
    assert {name: found[f"curvature_{name}"] for name in ("first", "middle", "last")} == {
        "first": 1.0,
        "middle": 3.0,
        "last": 5.0,
    }


def test_an_experiment_reports_how_even_the_curvature_is_where_that_was_asked_for(tmp_path):
    arms = {"SGD": {"method": "sgd", "lr": 0.1, "conditioning": True}, "Plain": {"method": "sgd", "lr": 0.05}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"name": "small", "seeds": [0, 1], "common": SMALL, "arms": arms}))
    written = main(str(file), output=str(tmp_path))
    with (tmp_path / "small" / "conditioning.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == ("key", "epoch", *CONDITIONING)
    section = (
        (tmp_path / "small" / "report.md").read_text().partition("## How even the curvature is")[2].partition("![")[0]
    )
    (line,) = (x for x in section.splitlines() if x.startswith("| SGD"))
    first, last = (100 * fmean(float(row["inputs"]) for row in rows if row["epoch"] == e) for e in "12")
    assert line.split(" | ")[1:4] == [f"{x:.2f}" for x in (first, first, last)]
    assert "| Plain" not in section
    assert any(path.name == "conditioning.png" for path in written)


def test_of_runs_that_diverge_nothing_is_told(tmp_path, monkeypatch):
    def lost(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and pl_module.options["lr"] == 0.1:
            raise training.Diverged("epoch 2")

    monkeypatch.setattr(training.Curve, "on_train_batch_end", lost)
    common = {**SMALL, "method": "sgd", "conditioning": True}
    spec = {"name": "small", "seeds": [0], "common": common, "arms": {"Lost": {"lr": 0.1}, "Kept": {"lr": 0.05}}}
    for arm, options in spec["arms"].items():
        run = Run("final", arm, 0, {**common, **options})
        keep(tmp_path, run, train(run.config, 0, test=True, root=""), {"commit": "", "versions": "{}", "device": "cpu"})
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(spec))
    write(tmp_path, load(file))
    section = (tmp_path / "report.md").read_text().partition("## How even the curvature is")[2]
    assert "| Kept" in section
    assert "| Lost" not in section.partition("![")[0]

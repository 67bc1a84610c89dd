import math
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from pytorch_lightning import Callback

from recipes import finetune
from tests.recipes.test_data import idx_folder, image_folder

ROOT = Path(finetune.__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def run(*args, module="recipes.finetune"):
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def saved_in(folder):
    return f"--trainer.logger.init_args.save_dir={folder}"


@pytest.mark.slow
def test_the_default_run_ends_on_the_manifolds_with_an_accuracy_of_97_percent(tmp_path):
    text = run("fit", saved_in(tmp_path))
    assert float(re.search(r"test accuracy\s+│ (\S+)", text)[1]) >= 0.97
    assert float(re.search(r"largest relative distance\s+│ (\S+)", text)[1]) <= 1e-5
    assert re.search(r"range of R\s+│ \S+ to \S+", text)
    assert re.search(
        r"conv_head\.weight\s+│ 1280x320x1x1\s+│ filter\s+│ 320 x 16\s+│\s+80 │\s+3 │ 2\d sphere, 2\d oblique, 2\d stiefel",
        text,
    )
    folder = tmp_path / "digits" / "version_0"
    plots = "learning_curve.png", "feature_std.png", "R.png", "norms.png"
    for name in (*plots, "config.yaml", "model.safetensors", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 1000, name
    assert list(folder.glob("events.out.tfevents.*"))

    # Out the other side: a checkpoint exported by the command, and the weights that the run left, are plain timm weights.
    exported = tmp_path / "exported.safetensors"
    run(str(folder / "checkpoints" / "last.ckpt"), str(exported), module="recipes.export")
    x = torch.randn(5, 3, 64, 64)
    trained = finetune.LitClassifier.load_from_checkpoint(
        folder / "checkpoints/last.ckpt", pretrained=False
    ).model.eval()
    for path in (exported, folder / "model.safetensors"):
        plain = timm.create_model("tf_efficientnet_lite0", num_classes=10, checkpoint_path=str(path)).eval()
        plain.to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.equal(plain(x), trained(x))


@pytest.mark.slow
def test_one_argument_gives_the_same_run_with_plain_sgd(tmp_path):
    text = run("fit", "--model.optimizer", "sgd", "--trainer.max_epochs=1", saved_in(tmp_path))
    assert re.search(r"optimizer\s+│ SGD", text)
    assert "sphere" not in text
    assert (tmp_path / "digits" / "version_0" / "learning_curve.png").exists()


@pytest.mark.slow
def test_a_run_is_resumed_through_the_command_line(tmp_path):
    small = "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"
    finetune.main(["fit", "--trainer.max_epochs=1", *small, saved_in(tmp_path)])
    last = tmp_path / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    finetune.main(["fit", "--trainer.max_epochs=2", f"--ckpt_path={last}", *small, saved_in(tmp_path)])
    a, b = (torch.load(p, weights_only=True) for p in (last, tmp_path / "digits/version_1/checkpoints/last.ckpt"))
    first, second = (s["optimizer_states"][0]["param_groups"][0]["pom"] for s in (a, b))
    assert len(first) == 49
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x["slot"], y["slot"])
        assert torch.equal(x["manifold"], y["manifold"])
        assert (x["upper"] is None) == (y["upper"] is None)
        assert x["upper"] is None or torch.equal(x["upper"], y["upper"])
    with pytest.raises(
        ValueError, match=r"model\.lr: 0\.7 was given, but a fit goes on as its checkpoint began, with 0\."
    ):
        finetune.main(["fit", "--model.lr=0.7", f"--ckpt_path={last}", saved_in(tmp_path)])
    other = "--model.model=resnet10t", "--model.pretrained=false"
    with pytest.raises(ValueError, match="model='tf_efficientnet_lite0', this run has model='resnet10t'"):
        finetune.main(["fit", *other, f"--ckpt_path={last}", saved_in(tmp_path)])


@pytest.mark.slow
def test_a_run_in_two_processes_ends_with_one_report(tmp_path):
    small = "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"
    network = "--model.model=resnet10t", "--model.pretrained=false", "--data.batch_size=8", "--data.num_workers=0"
    two = "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"
    text = run("fit", *two, *small, *network, saved_in(tmp_path))
    assert len(re.findall(r"test accuracy\s+│", text)) == 1
    assert (tmp_path / "digits" / "version_0" / "model.safetensors").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted_and_pretrained(config, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    if config.stem not in ("digits", "few_images"):
        assert "pretrained: true" in printed
    assert "lightning_fgsgd.POMGrouping" in printed
    assert ("lightning_fgsgd.FeatureStdRescaling" in printed) == (config.stem != "few_images")


@pytest.mark.parametrize("config", ["fashion_mnist", "image_folder"])
def test_ready_configs_train_on_real_files(tmp_path, config):
    data = tmp_path / "data"
    data.mkdir()
    root = idx_folder(data) if config == "fashion_mnist" else image_folder(data)
    classes = [] if config == "fashion_mnist" else ["--data.num_classes=3"]
    cli = finetune.main(
        [
            "fit",
            "--config",
            str(ROOT / "recipes" / "configs" / f"{config}.yaml"),
            f"--data.root={root}",
            *classes,
            "--data.batch_size=8",
            "--data.image_size=32",
            "--data.num_workers=0",
            "--model.model=resnet10t",
            "--model.pretrained=false",
            "--trainer.max_epochs=2",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.limit_train_batches=2",
            "--trainer.limit_val_batches=1",
            saved_in(tmp_path / "runs"),
        ]
    )
    optimizer = cli.trainer.optimizers[0]
    assert len(optimizer.poms) == 14  # stem 3, blocks 8, downsampling 3
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5


def test_few_images_turns_filters_on_spheres_of_their_own_and_leaves_norms_as_they_are(tmp_path):
    config = ROOT / "recipes" / "configs" / "few_images.yaml"
    network = "--model.model=resnet10t", "--model.pretrained=false", "--data.image_size=32", "--data.batch_size=8"
    small = "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"
    cpu = "--trainer.accelerator=cpu", "--trainer.devices=1"
    cli = finetune.main(["fit", "--config", str(config), *network, *small, *cpu, saved_in(tmp_path)])
    optimizer, net = cli.trainer.optimizers[0], cli.model.model
    for pom in optimizer.poms.values():
        assert pom.cutting.count == pom.num_groups == pom.cutting.shape[0]  # one group an output channel
        assert {m.name for m in pom.manifolds.values()} == {"sphere"}
    assert len(optimizer.poms) == 14
    decayed = {p for group in optimizer.param_groups for p in group["params"] if group["weight_decay"]}
    assert decayed.difference(optimizer.poms) == {net.get_classifier().weight}  # on manifolds it does nothing
    rates = {group["initial_lr"] for group in optimizer.param_groups if not optimizer.pom(group["params"][0])}
    assert sorted(rates) == [pytest.approx(0.004)]
    assert float(net.bn1.running_mean.abs().max()) == 0.0
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.lr=-1"], "lr: -1.0 is not a finite number of at least 0"),
        (["--model.lr=.nan"], "lr: nan is not"),
        (["--model.metric=other"], "metric: unknown metric 'other'"),
        (["--data=IDXFolder", "--data.root=/nowhere"], "data.root: there is no folder '/nowhere'"),
    ],
    ids=["negative lr", "nan lr", "metric", "folder"],
)
def test_wrong_input_stops_the_command_before_training(tmp_path, args, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        finetune.main(["fit", saved_in(tmp_path), *args])
    printed = capsys.readouterr()
    assert getattr(stop.value, "code", 1) != 0
    assert message in re.sub(r"\s+", " ", f"{printed.err} {stop.value}")
    assert "Epoch 0" not in printed.out


SMALL = (
    *("--data=Digits", "--data.image_size=32", "--model.model=test_resnet", "--model.pretrained=false"),
    *("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"),
)


def test_a_run_that_is_resumed_to_more_epochs_goes_on_along_the_half_cosine_of_all(tmp_path, recwarn):
    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    def fit(epochs, *args):
        seen.clear()
        with patch.object(finetune.LitClassifier, "configure_callbacks", lambda self: [Rates()]):
            finetune.main(["fit", f"--trainer.max_epochs={epochs}", saved_in(tmp_path), *SMALL, *args])
        return list(seen)

    seen = []
    rate = 0.04
    first = fit(1, "--model.lr=0.04")
    assert first == pytest.approx([rate * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    rest = fit(2, f"--ckpt_path={tmp_path / 'digits/version_0/checkpoints/last.ckpt'}")
    assert rest == pytest.approx([rate * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)])
    said = [str(w.message) for w in recwarn if "ckpt_path: the fit goes on" in str(w.message)]
    assert len(said) == 1
    assert "lr=0.04" in said[0]  # the default configuration has another


def test_a_run_that_tests_nothing_ends_with_its_report(tmp_path, capsys):
    finetune.main(["fit", "--trainer.max_epochs=1", "--trainer.limit_test_batches=0", saved_in(tmp_path), *SMALL])
    assert re.search(r"test accuracy\s+│ not tested", capsys.readouterr().out)


def test_a_run_without_an_end_is_refused_for_its_learning_rate(tmp_path):
    endless = "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:05"
    with pytest.raises(ValueError, match=r"trainer\.max_epochs: -1 has no end"):
        finetune.main(["fit", *endless, saved_in(tmp_path), *SMALL])

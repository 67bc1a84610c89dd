import csv
import math
from statistics import fmean

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback

from recipes.experiments import training
from recipes.experiments.__main__ import main
from recipes.experiments.methods import constrainable
from recipes.experiments.summary import turned
from recipes.experiments.training import train
from recipes.experiments.turning import TURNING, angle, channels, directions, rank
from tests.recipes.test_experiments_runner import SMALL

FILTERS = {
    "method": "fgsgd",
    "cutting": "filter",
    "block_size": 1,
    "groups": "each",
    "manifolds": ["sphere"],
    "rho": 1e4,
    "lr": 100.0,
    "momentum": 0.9,
    "start": "project",
}


# With an R for each input channel, which a rescale changes: it turns filters, and is no step.
KERNELS = {**FILTERS, "cutting": "kernel", "groups": 1, "clamp": False, "euclidean_lr": 0.05}


def test_an_angle_is_exact_where_its_cosine_is_1_in_float32():
    turn = 1e-5
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    b = torch.tensor([[math.cos(turn), math.sin(turn), 0.0], [0.0, -1.0, 0.0]])
    assert b[0, 0] == 1
    assert angle(a, b).tolist() == pytest.approx([turn, math.pi], rel=1e-5)


def test_channels_are_the_share_of_kernels_that_a_filter_uses():
    weight = torch.zeros(3, 4, 3, 3)
    weight[0] = torch.randn(4, 3, 3)
    weight[0] /= weight[0].flatten(1).norm(dim=1).view(-1, 1, 1)
    weight[1, 2] = 5.0
    weight[2, :2] = 0.1
    assert channels(weight).tolist() == pytest.approx([1.0, 1 / 4, 2 / 4])
    assert channels(7 * weight).tolist() == pytest.approx(channels(weight).tolist())


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_rank_is_1_for_orthonormal_filters_and_the_least_for_equal_ones(shape):
    orthogonal = torch.linalg.qr(torch.randn(20, 6))[0]
    filters = directions(orthogonal.mT if shape == (6, 20) else orthogonal)
    drawn = directions(torch.randn(shape))
    squares = np.linalg.svd(drawn.double().numpy(), compute_uv=False) ** 2
    assert rank(drawn) == pytest.approx(squares.sum() ** 2 / (6 * (squares**2).sum()), rel=1e-5)
    assert rank(drawn[:1].expand(shape)) == pytest.approx(1 / 6, rel=1e-5)
    if shape == (6, 20):
        assert rank(filters) == pytest.approx(1, rel=1e-5)


class Kept(Callback):
    """All weights before and after every step, as they are: the last of the callbacks, so after a rescale."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.epochs.append([])
        self.epochs[-1].append([self.weights(pl_module)])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.epochs[-1][-1].append(self.weights(pl_module))

    @staticmethod
    def weights(module):
        flat = [layer.weight.detach().double().flatten(1).numpy() for layer in constrainable(module.net)]
        return [w / np.linalg.norm(w, axis=1, keepdims=True) for w in flat]


@pytest.mark.parametrize(
    "options", [{"method": "sgd", "lr": 0.1, "weight_decay": 0.01}, FILTERS, KERNELS], ids=["sgd", "filters", "kernels"]
)
def test_turns_are_those_of_the_weights_in_every_step(monkeypatch, options):
    kept = Kept()

    def with_it(*args, callbacks, **others):
        return real(*args, callbacks=[*callbacks, kept], **others)

    real = training.Trainer
    monkeypatch.setattr(training, "Trainer", with_it)
    found = train({**SMALL, **options, "turning": True}, 0, test=False, root="").measured["turning"]
    assert [set(row) for row in found] == [{"epoch", *TURNING}] * 2
    for row, steps in zip(found, kept.epochs, strict=True):
        angles = [
            np.arccos(np.clip([(a * b).sum(1) for a, b in zip(before, after, strict=True)], -1, 1))
            for before, after in zip(*(zip(*side, strict=True) for side in zip(*steps, strict=True)), strict=True)
        ]
        medians = [np.sort(x.mean(0))[(x.shape[1] - 1) // 2] for x in angles]
        travels = [np.arccos(np.clip((a * b).sum(1), -1, 1)) for a, b in zip(steps[0][0], steps[-1][1], strict=True)]
        assert row["turn"] == pytest.approx(math.degrees(fmean(medians)), rel=1e-3)
        assert row["layers"] == pytest.approx(max(medians) / min(medians), rel=1e-2)
        assert row["filters"] == pytest.approx(fmean(x.mean(0).std() / x.mean() for x in angles), rel=1e-2)
        assert row["unsteady"] == pytest.approx(fmean(x.std(0).mean() / x.mean() for x in angles), rel=1e-2)
        halfway = [np.sort(x)[(len(x) - 1) // 2] for x in travels]
        assert row["travel"] == pytest.approx(math.degrees(fmean(halfway)), rel=1e-3)


def test_filters_with_a_group_each_and_a_large_rho_turn_alike_and_by_the_rate_over_rho():
    still = {
        **FILTERS,
        "rescale": False,
        "metric": "unit",
        "euclidean_lr": 0.05,
        "momentum": 0.0,
        "lr": 20.0,
        "warmup": 0.0,
        "power": 0.0,
    }
    outcome = train({**SMALL, **still, "turning": True}, 0, test=False, root="")
    _, row = outcome.measured["turning"]  # timm's branches start at 0
    # 𝔤 = R_g (2ρ + R_g), and half the cosine to the power 0 is 1: each step is lr / (2ρ + R_g) long.
    assert row["turn"] == pytest.approx(math.degrees(20 / 2e4), rel=0.01)
    assert row["filters"] < 0.05


def test_an_experiment_reports_how_filters_turn_where_that_was_asked_for(tmp_path):
    arms = {"SGD": {"method": "sgd", "lr": 0.1, "turning": True}, "Plain": {"method": "sgd", "lr": 0.05}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"name": "small", "seeds": [0, 1], "common": SMALL, "arms": arms}))
    written = main(str(file), output=str(tmp_path))
    with (tmp_path / "small" / "turning.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["epoch"] for row in rows] == ["1", "2"] * 2
    assert tuple(rows[0]) == ("key", "epoch", *TURNING)
    report = (tmp_path / "small" / "report.md").read_text()
    section = report.partition("## How filters turn")[2].partition("![")[0]
    (line,) = (x for x in section.splitlines() if x.startswith("| SGD"))
    first, last = (fmean(float(row["turn"]) for row in rows if row["epoch"] == e) for e in "12")
    middle = fmean([first, last])  # of two epochs there is none between: all of them
    assert line.split(" | ")[1:4] == [f"{x:.2f}" for x in (first, middle, last)]
    assert "| Plain" not in section
    assert any(path.name == "turning.png" for path in written)


def test_a_run_that_diverges_keeps_how_its_filters_turned_until_then(monkeypatch):
    def lost_in_the_second(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise training.Diverged("epoch 2")

    monkeypatch.setattr(training.Curve, "on_train_batch_end", lost_in_the_second)
    outcome = train({**SMALL, "method": "sgd", "lr": 0.1, "turning": True}, 0, test=True, root="")
    assert math.isnan(outcome.numbers["test_error"])
    assert [row["epoch"] for row in outcome.measured["turning"]] == [1]


def test_of_the_epochs_of_a_run_the_quarters_and_the_end_are_told():
    rows = [dict.fromkeys(TURNING, float(i)) for i in range(8)]
    rows[-2]["layers"], rows[-1]["layers"] = math.inf, 1e4  # epochs in which a layer stands still
    found = turned([rows, [{name: x + 2 for name, x in row.items()} for row in rows]])
    assert found["turn_first"] == 0.5 + 1
    assert found["turn_middle"] == 3.5 + 1
    assert found["turn_last"] == 6.5 + 1
    assert found["filters"] == 3.5 + 1
    assert found["layers"] == 4.5
    assert found["still"] == 4 / 16
    assert found["channels"] == found["rank"] == 7 + 1


def test_constrained_weights_have_a_power_of_their_own(monkeypatch):
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (optimizer,) = trainer.optimizers
            seen.append({g["name"].split(",")[0]: g["lr"] for g in optimizer.param_groups})

    real = training.Trainer
    monkeypatch.setattr(
        training, "Trainer", lambda *args, callbacks, **others: real(*args, callbacks=[*callbacks, Rates()], **others)
    )
    options = {**FILTERS, "euclidean_lr": 0.5, "power": 1.0, "constrained_power": 0.25, "warmup": 0.0}
    train({**SMALL, **options}, 0, test=False, root="")
    for step, rates in enumerate(seen):
        cosine = (1 + math.cos(math.pi * step / len(seen))) / 2
        names = sorted(rates, key=lambda name: name.startswith("euclidean"))
        assert [rates[name] for name in names] == pytest.approx(
            [100 * cosine**0.25] + [0.5 * cosine] * (len(names) - 1)
        )


def test_a_power_of_constrained_weights_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match="constrained_power: 'sgd' constrains nothing"):
        train({**SMALL, "method": "sgd", "lr": 0.1, "constrained_power": 0.5}, 0, test=False, root="")

"""The benchmarks run, and compute what they say."""

import json
import math
import subprocess
import sys
import time

import pytest
import timm
import torch
from pytorch_lightning import Callback

from benchmarks import epoch, harness, memory, scaling, step


def test_ratios_are_taken_round_by_round():
    times = {"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}
    found = harness.rows(times, "a", model="m")
    assert [r["ratio"] for r in found] == [1.0, 2.0]
    assert found[1]["ms"] == 4000.0
    assert found[0]["model"] == "m"


def test_arms_take_turns_after_a_warm_up():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = harness.interleaved(arms, 3, torch.device("cpu"))
    assert "".join(calls) == "aabb" + "ab" * 3
    assert [len(t) for t in times.values()] == [3, 3]


def test_the_exponent_is_the_slope_of_a_power_law():
    sizes = [1.0, 3.0, 10.0, 100.0]
    assert math.isclose(scaling.exponent(sizes, [5 * s**1.3 for s in sizes]), 1.3)


def test_the_roofline_counts_five_passes_for_sgd_and_seven_for_ours():
    model = torch.nn.Linear(1000, 1000, bias=False)
    assert math.isclose(step.roofline(model, "torch SGD", 1e9), 20.0)
    assert math.isclose(step.roofline(model, "FGSGD mix, project", 1e9), 28.0)
    assert step.roofline(model, "torch Muon", 1e9) is None


@pytest.mark.parametrize(("start", "bound"), [("project", 1.05), ("random", 1.05), ("preserve", 1.4)])
def test_state_and_what_a_step_holds_stay_within_their_bounds(start, bound):
    # What is kept: two bytes a component, R by channel, and for preserve the factors; ResNet-50 as users have it.
    torch.manual_seed(0)
    found = memory.measure(timm.create_model("resnet50"), start, fused=True)
    assert found["state"] <= bound
    assert found["transient"] <= 1.0


def test_an_epoch_is_timed_with_what_callbacks_do_at_its_end(monkeypatch):
    slow = 0.2

    class Slow(Callback):
        def on_train_epoch_end(self, *_):
            time.sleep(slow)

    monkeypatch.setattr(epoch, "NormBoundMonitor", Slow)
    module = epoch.classifier("resnet10t", "fgsgd")
    images = torch.rand(4, 3, 32, 32)
    loader = torch.utils.data.DataLoader(list(zip(images, [0, 1, 2, 3], strict=True)), 2)
    by_epoch, by_step = (epoch.Clock(torch.device("cpu"), epochs=e) for e in (True, False))
    for clock in (by_epoch, by_step):
        epoch._fit(module, loader, clock, [epoch.POMGrouping()], 2)
    assert len(by_epoch.times()) == 2
    assert min(by_epoch.times()) > slow
    assert len(by_step.times()) == 3  # from the first of four batches to the last


@pytest.mark.slow
def test_the_step_is_measured_and_written_down(tmp_path):
    command = [sys.executable, "-m", "benchmarks.step", "--models", "resnet10t", "--rounds", "2", "--no-kernels"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "| resnet10t | channels_last | FGSGD mix, project |" in done.stdout
    found = json.loads((tmp_path / "step.json").read_text())
    assert {r["layout"] for r in found["rows"]} == {"channels_last", "contiguous"}
    assert found["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "step.png").stat().st_size > 1000

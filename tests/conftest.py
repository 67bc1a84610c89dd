"""Small things that many tests share."""

import functools
import os

import hypothesis
import pytest
import torch
from torch import nn

from lightning_fgsgd import fused

hypothesis.settings.register_profile("ci", derandomize=True)  # a change is judged by the same examples every time
if "CI" in os.environ:
    hypothesis.settings.load_profile("ci")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers, and the commands that they run, share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as ``record_property("report", text)``."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "report" and report.when == "call":
                    terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


_quick_kernels = functools.cache(fused._kernel.__wrapped__)  # apart from everyone's


@pytest.fixture
def quickly_compiled(monkeypatch):
    """For many variants on small weights: compiled in a third of the time or less, and of the same source the same results
    but for rounding."""
    monkeypatch.setattr(fused, "_FLAGS", (*fused._FLAGS, "-O0"))
    monkeypatch.setattr(fused, "_kernel", _quick_kernels)


class TinyNet(nn.Module):
    """One layer of every shape that matters: 3x3, depthwise, wide 1x3, grouped, transposed, 1x1 and Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, (2, 3), padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 8, (1, 3), groups=2)
        self.pointwise = nn.Conv2d(8, 10, 1)
        self.up = nn.ConvTranspose2d(10, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.conv, self.depthwise, self.grouped, self.pointwise, self.up, self.norm):
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.linear(x.mean((2, 3)))))

    def get_classifier(self) -> nn.Module:
        return self.head


@pytest.fixture
def tiny() -> TinyNet:
    return TinyNet()

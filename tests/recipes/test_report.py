"""Plots of a run, whatever its history holds."""

import math

import pytest

from recipes.report import plot_layers


def row(epoch, **std):
    return {"epoch": epoch, "layers": {name: {"std": value} for name, value in std.items()}}


@pytest.mark.parametrize(
    "history",
    [
        [row(0, a=1.0, b=2.0), row(1, a=0.5, b=2.5)],
        [row(0, a=1.0, b=2.0), row(1, a=math.nan, b=math.inf), row(2, a=1.0, b=1.0)],
        [row(0, a=1.0, b=2.0), row(1, b=2.0), row(2, a=1.0, b=1.0)],
        [row(0, a=1.0), row(1, b=2.0)],
        [row(0, a=math.nan)],
        [row(0, a=0.0)],
    ],
    ids=["finite", "nan", "unseen once", "never together", "nothing finite", "zero"],
)
def test_layers_are_plotted_where_some_of_their_numbers_are_missing(tmp_path, history):
    path = plot_layers(history, "std", "feature std", tmp_path / "std.png")
    assert path.stat().st_size > 1000

"""The figures of an experiment: errors by arm, learning curves, and a watched run's norms, bounds, λ and R."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning_fgsgd import NormBoundMonitor
from recipes.experiments.summary import Row, interval
from recipes.report import figure_of, plot_layers

MOST_CURVES = 8


def plot_errors(errors: Mapping[str, Mapping[int, float]], reference: str, path: Path) -> Path:
    """Test error of every run, one line an arm, with the mean and its 95 % interval; the reference's mean as a line.

    Args:
        errors: by arm and seed, in %; of runs that diverged only the number is told, beside the arm's name. Those of more
            than twice the median are arrows at the edge, with their number: they would leave no room for the others.
        reference: the arm that is drawn through.
        path: where to save.
    """
    ended = {arm: [e for e in runs.values() if e is not None and math.isfinite(e)] for arm, runs in errors.items()}
    lost = {arm: len(errors[arm]) - len(runs) for arm, runs in ended.items()}
    names = [arm + (f" ({lost[arm]} diverged)" if lost[arm] else "") for arm in ended]
    names_width = 0.065 * max(map(len, names))  # in inches, at the size of 8 points below
    figure, (axis,) = figure_of(1, width=max(8.0, 5.0 + names_width), height=1.2 + 0.28 * len(ended))
    for y, (arm, runs) in enumerate(ended.items()):
        if not runs:
            continue
        colour = "C1" if arm == reference else "C0"
        axis.plot(runs, [y] * len(runs), "o", color=colour, alpha=0.4, markersize=4)
        low, high = interval(runs)
        if math.isfinite(low):
            axis.plot([low, high], [y, y], color=colour, linewidth=1.5)
        axis.plot([fmean(runs)], [y], "|", color=colour, markersize=12, markeredgewidth=2)
    if ended.get(reference):
        axis.axvline(fmean(ended[reference]), color="C1", linewidth=0.8, linestyle="--")
    every = [e for runs in ended.values() for e in runs]
    near = [e for e in every if e <= 2 * median(every)]
    if len(near) < len(every):
        room = 0.1 * (max(near) - min(near)) or 1.0
        edge = max(near) + 2 * room
        axis.set_xlim(min(near) - room, edge + room)
        for y, runs in enumerate(ended.values()):
            far = sorted(e for e in runs if e > 2 * median(every))
            if far:
                axis.plot([edge], [y], ">", color="C3", markersize=5)
                told = ", ".join(f"{e:.3g}" for e in far)
                axis.annotate(told, (edge, y), (-6, 3), textcoords="offset points", ha="right", fontsize=7)
    axis.set(xlabel="test error, % (a dot a seed; mean and its 95 % interval)", ylim=(len(ended) - 0.5, -0.5))
    axis.set_yticks(range(len(ended)), names, fontsize=8)
    axis.grid(axis="x", linewidth=0.3)
    figure.savefig(path)
    return path


def plot_curves(
    curves: Mapping[str, Sequence[Sequence[Row]]],
    summary: Sequence[Row],
    reference: str,
    path: Path,
    most: int = MOST_CURVES,
) -> Path:
    """Training loss and validation error over epochs, means over seeds: the reference and the best arms.

    Args:
        curves: by arm, those of its runs.
        summary: of the arms, for which ones are the best.
        reference: the arm that is always drawn.
        path: where to save.
        most: arms that are drawn.
    """
    best = sorted(
        summary, key=lambda row: row["test_error_mean"] if math.isfinite(row["test_error_mean"]) else math.inf
    )
    names = [row["arm"] for row in best if row["arm"] != reference][: most - 1]
    figure, axes = figure_of(2, width=12.0, height=4.5)
    shown = [name for name in curves if name in (reference, *names)]
    for arm in shown:
        for axis, column in zip(axes, ("train_loss", "val_error"), strict=True):
            points = _mean_by_epoch(curves[arm], column)
            style = {"color": "black", "linewidth": 2} if arm == reference else {"linewidth": 1}
            axis.plot(list(points), list(points.values()), label=arm, marker=".", **style)
    for axis, label in zip(axes, ("training loss, nats", "validation error, %"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _logarithmic(axis)
    if len(shown) < len(curves):
        axes[0].set_title(f"{len(shown)} of {len(curves)} arms: {reference}, and those of least test error", fontsize=9)
    axes[1].legend(fontsize=7)
    figure.savefig(path)
    return path


# What is drawn of what arms were asked to measure, see :data:`~recipes.experiments.training.MEASURED`.
MEASURED = {
    "turning": {
        "turn": "median filter's turn, ° a step",
        "channels": "share of channels used",
        "rank": "share of dimensions used",
    },
    "conditioning": {
        "curvature": "share of the curvature's dimensions used",
        "inputs": "share of the inputs' dimensions used",
        "gradients": "share of the gradients' dimensions used",
    },
}


def plot_measured(
    measured: Mapping[str, Sequence[Sequence[Row]]],
    labels: Mapping[str, str],
    reference: str,
    path: Path,
    most: int = MOST_CURVES,
) -> Path:
    """What was measured over epochs, means over seeds, an arm a line: the reference and the first arms.

    Args:
        measured: by arm, the rows of ``turning.csv`` or ``conditioning.csv`` of its runs.
        labels: what is drawn, by column; the first has a logarithmic axis.
        reference: the arm that is drawn in black.
        path: where to save.
        most: arms that are drawn.
    """
    figure, axes = figure_of(len(labels), width=15.0, height=4.5)
    names = [arm for arm in measured if arm != reference][: most - 1]
    for arm, curves in ((arm, curves) for arm, curves in measured.items() if arm in (reference, *names)):
        for axis, column in zip(axes, labels, strict=True):
            points = _mean_by_epoch(curves, column)
            style = {"color": "black", "linewidth": 2} if arm == reference else {"linewidth": 1}
            axis.plot(list(points), list(points.values()), label=arm, marker=".", **style)
    for axis, label in zip(axes, labels.values(), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _logarithmic(axes[0])
    shown = sum(arm in (reference, *names) for arm in measured)
    if shown < len(measured):
        axes[0].set_title(f"{shown} of {len(measured)} arms, the first of the report", fontsize=9)
    axes[-1].legend(fontsize=7)
    figure.savefig(path)
    return path


def plot_history(history: Mapping[str, Any], title: str, file: Path) -> list[Path]:
    """Norms and bounds, λ and R by layer and epoch of one run, beside the file that they were read from.

    Args:
        history: what a watched run left, see :func:`~recipes.experiments.training.train`.
        title: names the run.
        file: ``history/<key>.json``.
    """
    drawn = []
    if history.get("norms", {}).get("history"):
        monitor = NormBoundMonitor()
        monitor.load_state_dict({**history["norms"], "epoch": None})
        figure = monitor.plot()
        figure.suptitle(title)
        for axis in figure.axes[1:]:
            axis.set_xlabel("norm")
        drawn.append(file.with_name(f"{file.stem}_norms.png"))
        figure.savefig(drawn[-1])
        # The first look is at the start; those after it are one an epoch.
        if epochs := history["norms"]["history"][1:]:
            label = f"largest spectral norm of a component: {title}"
            drawn.append(plot_layers(epochs, "spectral", label, file.with_name(f"{file.stem}_spectral.png")))
    if history.get("rescaling"):
        for key, label in (("std", "feature std λ"), ("radius", "R")):
            path = file.with_name(f"{file.stem}_{key}.png")
            drawn.append(plot_layers(history["rescaling"], key, f"{label}: {title}", path))
    return drawn


def _logarithmic(axis: Any) -> None:
    """A logarithmic scale of y with plain numbers at it; a linear one where a value is 0 (out of sight) or all are close."""
    values = [y for line in axis.get_lines() for y in line.get_ydata()]
    if not values or min(values) <= 0 or max(values) < 2 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    # Within less than a decade the powers of ten alone are one tick or two.
    wide = max(values) > 10 * min(values)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _mean_by_epoch(curves: Sequence[Sequence[Row]], column: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for row in curve:
            if row[column] is not None and math.isfinite(row[column]):
                values.setdefault(int(row["epoch"]), []).append(row[column])
    return {epoch: fmean(values[epoch]) for epoch in sorted(values)}

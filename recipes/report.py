"""What a run leaves behind: a table on the screen, and plots beside its logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lightning_fgsgd import FGSGD


class LearningCurve(Callback):
    """Keeps the training loss and the validation loss and accuracy of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch, **metrics})

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.epochs = list(state_dict["epochs"])


def print_summary(
    console: Console, optimizer: Any, accuracy: float | None, files: Mapping[str, Sequence[Path | str]]
) -> None:
    """Accuracy, constraints and where things lie."""
    table = Table(title="Result", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_row("test accuracy", "not tested" if accuracy is None else f"{accuracy:.4f}")
    table.add_row("optimizer", type(optimizer).__name__)
    if isinstance(optimizer, FGSGD):
        params = list(optimizer.poms)
        total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        share = sum(p.numel() for p in params) / total
        radii = [optimizer.poms[p].radius for p in params]
        low, high = min(float(r.min()) for r in radii), max(float(r.max()) for r in radii)
        table.add_row("constrained weights", f"{share:.1%} of {total:,}, in {len(params)} layers")
        table.add_row("largest relative distance", f"{max(optimizer.distance(p) for p in params):.1e}")
        table.add_row("range of R", f"{low:.4g} to {high:.4g}")
    for name, paths in files.items():
        table.add_row(name, "\n".join(map(str, paths)))
    console.print(table)


def plot_learning_curve(epochs: list[dict[str, float]], path: Path) -> Path:
    """Losses and validation accuracy by epoch."""
    figure, axes = figure_of(2)
    for axis, names, label in zip(
        axes, (("train_loss", "val_loss"), ("val_accuracy",)), ("cross entropy", "accuracy"), strict=True
    ):
        for name in names:
            points = [(row["epoch"] + 1, row[name]) for row in epochs if name in row]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
    figure.savefig(path)
    return path


def plot_layers(history: list[dict[str, Any]], key: str, label: str, path: Path) -> Path:
    """A value by layer (from input to output) and epoch, as an image with a logarithmic colour scale."""
    from matplotlib.colors import LogNorm

    layers = list(dict.fromkeys(layer for row in history for layer in row["layers"]))
    # A layer may not have been seen in an epoch, and its features may not have been finite: such fields stay empty.
    read = [[row["layers"].get(layer, {}).get(key, math.nan) for row in history] for layer in layers]
    values = [[max(v, 1e-12) if math.isfinite(v) else math.nan for v in row] for row in read]
    figure, (axis,) = figure_of(1, height=max(3.0, 0.16 * len(layers)))
    first, last = history[0]["epoch"] + 0.5, history[-1]["epoch"] + 1.5
    flat = [v for row in values for v in row if math.isfinite(v)] or [1.0]
    norm = LogNorm(min(flat), max(max(flat), min(flat) * 1.001))
    extent = (first, last, len(layers) - 0.5, -0.5)
    image = axis.imshow(values, aspect="auto", norm=norm, extent=extent, interpolation="none")
    axis.set(xlabel="epoch", title=label)
    axis.set_yticks(range(len(layers)), [layer.removeprefix("model.") for layer in layers], fontsize=6)
    figure.colorbar(image, ax=axis)
    figure.savefig(path)
    return path


def figure_of(columns: int, height: float = 3.5, width: float | None = None) -> tuple[Any, Any]:
    """A figure with so many axes side by side, in inches; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or 4.5 * columns + 1.5, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]

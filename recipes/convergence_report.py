"""Tables and figures of :mod:`recipes.convergence`, from the rows of its CSV files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = [
    "REACHED",
    "STATIONARY",
    "SUMMARY",
    "TRAINED",
    "VERDICT",
    "judge",
    "plot_convergence",
    "plot_sweep",
    "summarise",
]

Row = dict[str, Any]

STATIONARY = 1e-6  # a run has settled where the gradient is no longer than this
REACHED = 1e-6  # and at the known minimum if this share of the initial excess is left
TRAINED = 0.2  # a network of the sweep, whose runs are short, is trained where this share is left


# Tables ---------------------------------------------------------------------------------------------------------------

SUMMARY = (
    "problem",
    "minimum",
    "contained",
    "seeds that reach it",
    "excess at start",
    "at the end",
    "worst seed",
    "constant lr",
    "gradient norm",
    "others settle at",
    "Eq. 4",
)
VERDICT = (
    "network",
    "trained with 𝔤",
    "trained without",
    "only without 𝔤 diverged",
    "only with 𝔤 diverged",
    "least excess with 𝔤",
    "without",
)


def summarise(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What the rows of :func:`converge` show, a line a problem, as in ``SUMMARY``. Medians over the seeds."""
    lines: list[tuple[str, ...]] = []
    for name, runs in _runs(rows, "Eq. 4").items():
        first, last = [run[0] for run in runs], [run[-1] for run in runs]
        constant = [run[-1] for run in _runs(rows, "constant").get(name, [])]
        settled = [run[-1] for run in _runs(rows, "exact gradients")[name]]
        elsewhere = [b for a, b in zip(first, settled, strict=True) if b["excess"] > REACHED * a["excess"]]
        minima = sorted({f"{row['minimum']:.4g}" for row in last})
        norms = [statistics.median(row["gradient_norm"] for row in when) for when in (first, last)]
        lines.append(
            (
                name,
                " or ".join(minima),
                "yes" if last[0]["contained"] else "no",
                f"{len(settled) - len(elsewhere)} of {len(settled)}",
                f"{statistics.median(row['excess'] for row in first):.1e}",
                f"{statistics.median(row['excess'] for row in last):.1e}",
                f"{max(row['excess'] for row in last):.1e}",
                f"{statistics.median(row['excess'] for row in constant):.1e}" if constant else "",
                f"{norms[0]:.1e} to {norms[1]:.1e}",
                ", ".join(f"{row['excess']:.1e} ({row['gradient_norm']:.0e})" for row in elsewhere),
                "yes" if all(row["eq4"] for row in last) else "no",
            )
        )
    return lines


def judge(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What the rows of :func:`sweep` show, a line a network, as in ``VERDICT``. It counts what all seeds share."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["network"] for row in rows):
        verdicts: dict[tuple[Any, float], set[str]] = {}
        left: dict[tuple[Any, float], list[float]] = {}
        for row in rows:
            if row["network"] == name:
                verdicts.setdefault((row["rho"], row["lr"]), set()).add(row["verdict"])
                left.setdefault((row["rho"], row["lr"]), []).append(row["excess_left"])
        lrs = sorted({lr for _, lr in verdicts})
        trained = {rho: [lr for lr in lrs if verdicts[rho, lr] == {"trained"}] for rho in (1.0, "none")}
        diverged = {rho: [lr for lr in lrs if verdicts[rho, lr] == {"diverged"}] for rho in (1.0, "none")}
        best = {rho: min((statistics.median(left[rho, lr]), lr) for lr in lrs) for rho in (1.0, "none")}
        lines.append(
            (
                name,
                _range(trained[1.0], lrs),
                _range(trained["none"], lrs),
                _range([lr for lr in diverged["none"] if "diverged" not in verdicts[1.0, lr]], lrs),
                _range([lr for lr in diverged[1.0] if "diverged" not in verdicts["none", lr]], lrs),
                *(f"{share:.0e} at {lr:g}" for share, lr in best.values()),
            )
        )
    return lines


def _runs(rows: Sequence[Row], schedule: str) -> dict[str, list[list[Row]]]:
    """The runs of each problem, with their rows in order."""
    runs: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row["schedule"] == schedule:
            runs.setdefault(row["problem"], {}).setdefault(row["seed"], []).append(row)
    return {name: list(of_seed.values()) for name, of_seed in runs.items()}


def _range(some: Sequence[float], lrs: Sequence[float]) -> str:
    """Learning rates as ranges of neighbours out of ``lrs``."""
    ranges: list[list[float]] = []
    for lr in some:
        if ranges and lrs.index(lr) == lrs.index(ranges[-1][-1]) + 1:
            ranges[-1].append(lr)
        else:
            ranges.append([lr])
    return ", ".join(f"{r[0]:g}" if len(r) == 1 else f"{r[0]:g} to {r[-1]:g}" for r in ranges) or "nowhere"


# Figures --------------------------------------------------------------------------------------------------------------


def plot_convergence(rows: Sequence[Row], path: Path) -> None:
    """Excess and gradient norm by step: the median over the seeds, their range, and a constant step size dashed."""
    panels: dict[str, list[str]] = {}
    for name, runs in _runs(rows, "Eq. 4").items():
        kind = "minimum above 0" if runs[0][0]["minimum"] > 0 else f"{name.split(',')[0]}, minimum 0"
        panels.setdefault(kind, []).append(name)
    figure, axes = _figure(2, len(panels))
    for column, (title, names) in enumerate(panels.items()):
        for i, name in enumerate(names):
            for schedule, style in (("Eq. 4", "-"), ("constant", ":")):
                runs = _runs(rows, schedule).get(name, [])
                for line, key in enumerate(("excess", "gradient_norm") if runs else ()):
                    steps = [row["step"] + 1 for row in runs[0]]
                    values = [[max(row[key], 1e-16) for row in at] for at in zip(*runs, strict=True)]
                    axis, label = axes[line][column], name if schedule == "Eq. 4" else None
                    axis.plot(steps, list(map(statistics.median, values)), style, color=f"C{i}", label=label)
                    if schedule == "Eq. 4":
                        least, most = list(map(min, values)), list(map(max, values))
                        axis.fill_between(steps, least, most, color=f"C{i}", alpha=0.15)
        axes[0][column].set(title=title, ylabel="excess over the minimum")
        axes[1][column].set(xlabel="step + 1", ylabel="norm of the Riemannian gradient")
        axes[1][column].legend(fontsize=7, loc="lower left")
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
    _save(figure, path)


def plot_sweep(rows: Sequence[Row], path: Path) -> None:
    """Excess left against the learning rate, with 𝔤 and without; × where a run gave up on a number that is not finite."""
    ceiling = 1e4
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = _figure(math.ceil(len(names) / 3), min(len(names), 3))
    for axis, name in zip(axes.flat, names, strict=False):
        for rho, label, color in ((1.0, "rho=1", "C0"), ("none", "rho=None", "C3")):
            mine = [row for row in rows if row["network"] == name and row["rho"] == rho]
            lrs = sorted({row["lr"] for row in mine})
            medians = [statistics.median(row["excess_left"] for row in mine if row["lr"] == lr) for lr in lrs]
            axis.plot(lrs, [min(max(m, 1e-16), ceiling) for m in medians], "-", color=color, label=label)
            for marker, lost in (("o", False), ("x", True)):
                points = [(r["lr"], min(max(r["excess_left"], 1e-16), ceiling)) for r in mine]
                shown = [p for p, r in zip(points, mine, strict=True) if math.isinf(r["excess_left"]) == lost]
                axis.plot(*(zip(*shown, strict=True) if shown else ([], [])), marker, color=color, markersize=4)
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.axhline(TRAINED, color="grey", linewidth=0.5, linestyle="--")
        axis.set(xscale="log", yscale="log", title=name, xlabel="learning rate r0", ylabel="share of the excess left")
        axis.legend(fontsize=7)
    _save(figure, path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256)
    small.save(path, optimize=True)

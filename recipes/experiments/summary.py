"""The numbers of an experiment's tables: means over seeds, and paired differences with their confidence intervals."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scipy.stats import t as student

from recipes.experiments.conditioning import CONDITIONING
from recipes.experiments.spec import choose, tuning_runs

Row = dict[str, Any]

FORGETTING = ("agreement", "agreement_recalibrated", "divergence", "drift", "drift_task")
TEXT = ("key", "stage", "arm", "commit", "device")


def read(folder: Path) -> list[Row]:
    """The rows of ``runs.csv``, with their numbers as numbers and what is JSON read; none where there is no file."""
    file = folder / "runs.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{name: _parse(name, value) for name, value in row.items()} for row in csv.DictReader(lines)]


def read_curves(folder: Path, name: str = "curves.csv") -> dict[str, list[Row]]:
    """The rows of ``curves.csv``, or of what was measured, by run: the last of each epoch, should a run have been cut off
    and run again."""
    file = folder / name
    if not file.is_file():
        return {}
    found: dict[str, dict[int, Row]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            epoch = {name: _parse(name, value) for name, value in row.items()}
            found.setdefault(row["key"], {})[int(epoch["epoch"])] = epoch
    return {key: [epochs[n] for n in sorted(epochs)] for key, epochs in found.items()}


def finals(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    """The final runs of an arm, by seed."""
    return {int(row["seed"]): row for row in rows if row["stage"] == "final" and row["arm"] == arm}


def turned(curves: Sequence[Sequence[Row]]) -> Row:
    """How filters turned in the runs of one arm, means over runs, see :class:`~recipes.experiments.turning.Turning`.

    Args:
        curves: the rows of ``turning.csv`` of each run.

    Returns:
        ``turn`` over the first quarter of the epochs, the half in the middle and the last quarter, as ``turn_first``,
        ``turn_middle`` and ``turn_last``; ``channels`` and ``rank`` after the last epoch; the others over all epochs.
        ``layers`` is a median over epochs and runs, and ``still`` the share of the epochs in which it is above a thousand.
    """
    found: dict[str, list[float]] = {}
    for rows in curves:
        n = len(rows)
        quarter = max(n // 4, 1)
        parts = {"first": rows[:quarter], "middle": rows[quarter : n - quarter] or rows, "last": rows[n - quarter :]}
        for part, epochs in parts.items():
            found.setdefault(f"turn_{part}", []).append(fmean(row["turn"] for row in epochs))
        for name in ("unsteady", "filters", "travel"):
            found.setdefault(name, []).append(fmean(row[name] for row in rows))
        for name in ("channels", "rank"):
            found.setdefault(name, []).append(rows[-1][name])
    layers = [row["layers"] for rows in curves for row in rows]
    uneven = {"layers": median(layers), "still": fmean(ratio > 1000 for ratio in layers)}
    return {name: fmean(values) for name, values in found.items()} | uneven


def conditioned(curves: Sequence[Sequence[Row]]) -> Row:
    """How even the curvature was in the runs of one arm, means over runs: after the first epoch, half of them and the last.

    Args:
        curves: the rows of ``conditioning.csv`` of each run, see :class:`~recipes.experiments.conditioning.Conditioning`.
    """
    of_run = [{"first": rows[0], "middle": rows[(len(rows) - 1) // 2], "last": rows[-1]} for rows in curves]
    return {
        f"{name}_{part}": fmean(epochs[part][name] for epochs in of_run)
        for name in CONDITIONING
        for part in ("first", "middle", "last")
    }


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a mean by Student's t; NaN for fewer than two values."""
    if len(differences) < 2:
        return math.nan, math.nan
    half = float(student.ppf((1 + level) / 2, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    middle = fmean(differences)
    return middle - half, middle + half


def summarise(rows: Sequence[Row], spec: Mapping[str, Any], metric: str = "test_error") -> list[Row]:
    """One row an arm that has final runs, in the order of the experiment.

    Args:
        rows: of :func:`read`.
        spec: of the experiment.
        metric: the column that arms are compared by.

    Returns:
        ``arm``; ``seeds``, those that ended; ``diverged``, those that did not; mean and standard deviation (ddof 1) of
        ``val_error``, ``test_error``, ``train_loss`` and what there is of :data:`FORGETTING` over the seeds that ended, as
        ``<name>_mean`` and ``<name>_std``; the median of their ``seconds``; and against the reference arm, over the seeds
        that both ended, ``shared`` (their number), ``difference`` (mean, in the metric's unit), ``low``, ``high`` (95 %
        interval of it) and ``relative`` (of the reference's mean, in %).
    """
    reference = _ended(finals(rows, spec["reference"]), metric)
    table = []
    for arm in spec["arms"]:
        all_runs = finals(rows, arm)
        if not all_runs:
            continue
        runs = _ended(all_runs, metric)
        row: Row = {"arm": arm, "seeds": sorted(runs), "diverged": sorted(set(all_runs) - set(runs))}
        row["seconds"] = median([run["seconds"] for run in runs.values()] or [math.nan])
        for name in ("val_error", "test_error", "train_loss", *FORGETTING):
            values = [run[name] for run in runs.values() if isinstance(run[name], float)]
            row[f"{name}_mean"] = fmean(values) if values else math.nan
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else math.nan
        shared = sorted(set(runs) & set(reference)) if arm != spec["reference"] else []
        differences = [runs[seed][metric] - reference[seed][metric] for seed in shared]
        row["shared"] = len(shared)
        row["difference"] = fmean(differences) if shared else math.nan
        row["low"], row["high"] = interval(differences)
        base = fmean([reference[seed][metric] for seed in shared]) if shared else math.nan
        row["relative"] = 100 * row["difference"] / base if base else math.nan
        table.append(row)
    return table


def tuned(rows: Sequence[Row], spec: Mapping[str, Any]) -> list[Row]:
    """What arms with a grid chose.

    Returns:
        ``arm``, ``grid``, the number of ``runs`` that there are; and once it is decided ``chosen``, its mean ``val_error``
        (with the experiment's ``keep``, its mean of that too), and ``edges``, the options whose choice is the first or last
        of several values.
    """
    table = []
    found = {row["key"]: row for row in rows if row["stage"] == "tune"}
    for arm, options in spec["arms"].items():
        grid = options.get("grid")
        if not grid:
            continue
        runs = [run for run in tuning_runs(spec, arm) if run.key in found]
        row: Row = {"arm": arm, "grid": grid, "runs": len(runs)}
        chosen = choose(spec, arm, rows)
        if chosen is not None:
            here = [found[run.key] for run in runs if all(_at(run.config, n) == v for n, v in chosen.items())]
            row["chosen"] = chosen
            for name in ("val_error", spec.get("keep")):
                if name:
                    row[name] = fmean(run[name] for run in here)
            row["edges"] = [n for n, v in chosen.items() if len(grid[n]) > 1 and v in (grid[n][0], grid[n][-1])]
        table.append(row)
    return table


def _ended(runs: Mapping[int, Row], metric: str) -> dict[int, Row]:
    return {seed: run for seed, run in runs.items() if isinstance(run[metric], float) and math.isfinite(run[metric])}


def _at(config: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _parse(name: str, value: str) -> Any:
    if name in TEXT:
        return value
    if name in ("config", "versions"):
        return json.loads(value)
    return float(value) if value else None

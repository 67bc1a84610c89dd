r"""Draw arms of several experiments in one figure, each beside plain SGD and beside the best other method.

    python -m recipes.experiments.overview docs/experiments/overview.yaml

The YAML file has headings, and under each its rows: ``task`` (its label), ``experiment``, ``arm``, ``reference`` (the arm of
SGD) and, where there is one, ``other``, the arm of the other method, with ``name``, what the figure calls it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from recipes.experiments.spec import asked_for, load
from recipes.experiments.summary import Row, finals, interval, read
from recipes.report import figure_of

FIELDS = ("task", "experiment", "arm", "reference")
OTHER = ("other", "name")
EDGES = (-62.0, 38.0)  # in %; what lies beyond is an arrow at the edge, so that the rest can be told apart


def main(
    overview: str,
    configs: str = "recipes/configs/experiments",
    output: str = "docs/experiments",
    figure: str | None = None,
) -> Path:
    """The figure's file.

    Args:
        overview: the YAML file.
        configs: folder of the experiments' YAML files.
        output: folder of all experiments.
        figure: where to save; beside ``overview``, as PNG, by default.

    Raises:
        FileNotFoundError: an experiment that there is not.
        ValueError: a row with other fields, or an arm of which there is no run.
    """
    path = Path(overview)
    headings: Mapping[str, Sequence[Mapping[str, str]]] = yaml.safe_load(path.read_text())
    compared = {
        heading: [compare(row, Path(configs), Path(output)) for row in rows] for heading, rows in headings.items()
    }
    return plot(compared, Path(figure) if figure else path.with_suffix(".png"))


def compare(row: Mapping[str, str], configs: Path, output: Path) -> Row:
    """One row of the figure: ``label``, ``name``, and (difference, low, high) in % beside ``reference`` and ``other``.

    Differences are paired by seed, over the seeds that both arms ended, and told in % of the other's mean error; the
    interval is that of 95 %.
    """
    asked = FIELDS + OTHER if set(OTHER) & set(row) else FIELDS
    if missing := [name for name in asked if name not in row]:
        raise ValueError(f"overview: {dict(row)} has no {missing[0]}")
    if unknown := [name for name in row if name not in asked]:
        raise ValueError(
            f"overview: {row['task']}: unknown field {unknown[0]!r}; choose from {', '.join(FIELDS + OTHER)}"
        )
    spec = load(configs / f"{row['experiment']}.yaml")
    rows = asked_for(spec, read(output / row["experiment"]))
    return {
        "label": row["task"],
        "name": row.get("name", ""),
        **{
            name: _relative(rows, row["arm"], row[name], row["experiment"])
            for name in ("reference", "other")
            if name in row
        },
    }


def plot(headings: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draw the rows of :func:`compare` under their headings, and save them.

    What is drawn stands as JSON in the PNG's ``Description``, so that a figure which its rows have left behind can be told.
    """
    styles = {"reference": ("C0", -0.15, "beside SGD"), "other": ("C1", 0.15, "beside the other named")}
    figure, (axis,) = figure_of(1, width=10.0, height=1.2 + 0.3 * sum(len(rows) + 1 for rows in headings.values()))
    labels: dict[int, str] = {}
    y = -1
    for heading, rows in headings.items():
        y += 1
        axis.text(EDGES[0] + 1, y, heading, va="center", weight="bold", fontsize=9)
        for row in rows:
            y += 1
            labels[y] = row["label"]
            for name, (colour, shift, _) in styles.items():
                if name in row:
                    _draw(axis, row[name], y + shift, colour)
            if "other" in row:
                right = max(row["other"][2], 0.0)
                axis.annotate(
                    row["name"], (right, y + 0.15), (5, 0), textcoords="offset points", va="center", fontsize=7
                )
    for colour, _, label in styles.values():
        axis.plot([], [], "o-", color=colour, markersize=5, label=label)
    axis.plot([], [], "o", color="grey", markerfacecolor="white", markersize=5, label="hollow: the interval holds zero")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(
        "errors more (+) or fewer (−) than the other's, % (mean and 95 % interval, paired by seed)", fontsize=9
    )
    axis.set(xlim=EDGES, ylim=(y + 0.6, -0.6))
    axis.set_yticks(list(labels), list(labels.values()), fontsize=8)
    axis.grid(axis="x", linewidth=0.3)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Description": json.dumps(headings)})
    return path


def _draw(axis: Any, compared: tuple[float, float, float], y: float, colour: str) -> None:
    middle, low, high = compared
    axis.plot([low, high], [y, y], color=colour, linewidth=1.5)
    for beyond, edge, marker in ((low < EDGES[0], EDGES[0], "<"), (high > EDGES[1], EDGES[1], ">")):
        if beyond:
            axis.plot([edge], [y], marker, color=colour, markersize=6, clip_on=False)
    if EDGES[0] <= middle <= EDGES[1]:
        axis.plot(
            [middle], [y], "o", color=colour, markersize=5, markerfacecolor=colour if low > 0 or high < 0 else "white"
        )
    else:
        place = "left" if middle < 0 else "right"
        at = (min(max(middle, EDGES[0]), EDGES[1]), y)
        axis.annotate(
            f"{middle:+.0f}",
            at,
            (8 if middle < 0 else -8, 5),
            textcoords="offset points",
            ha=place,
            va="center",
            fontsize=7,
        )


def _relative(rows: Sequence[Row], arm: str, other: str, experiment: str) -> tuple[float, float, float]:
    runs, others = finals(rows, arm), finals(rows, other)
    for name, found in ((arm, runs), (other, others)):
        if not found:
            raise ValueError(f"overview: {experiment} has no run of {name!r}")
    pairs = [(runs[seed]["test_error"], others[seed]["test_error"]) for seed in sorted(set(runs) & set(others))]
    ended = [(a, b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    base = fmean(b for _, b in ended) / 100
    differences: list[float] = [a - b for a, b in ended]
    low, high = interval(differences)
    return fmean(differences) / base, low / base, high / base


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(auto_cli(main))

"""The report of an experiment: its tables in Markdown, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fgsgd.choices import DEFAULT_MANIFOLDS
from recipes.experiments import figures
from recipes.experiments.conditioning import CONDITIONING
from recipes.experiments.spec import asked_for, tuning_runs
from recipes.experiments.summary import (
    FORGETTING,
    Row,
    conditioned,
    finals,
    read,
    read_curves,
    summarise,
    tuned,
    turned,
)

SHORT = {"sphere": "Sp", "oblique": "Ob", "stiefel": "St", "euclidean": "Euc"}
MEASURED = {
    "test_error": "test error, %",
    "val_error": "validation error, %",
    "agreement": "agreement, %",
    "agreement_recalibrated": "agreement, norms recalibrated, %",
    "divergence": "divergence, nats",
    "drift": "drift, photographs",
    "drift_task": "drift, task",
}
PAIRED = ("agreement", "agreement_recalibrated", "divergence", "drift", "drift_task")


def write(folder: Path, spec: Mapping[str, Any]) -> list[Path]:
    """Write ``report.md`` and the figures of what has been run; an experiment that is not finished has a report too.

    Args:
        folder: with ``runs.csv`` and what else the runner wrote.
        spec: of the experiment, see :mod:`~recipes.experiments.spec`.

    Returns:
        The files, none where nothing has been run.
    """
    rows = asked_for(spec, read(folder))
    if not rows:
        return []
    summary = summarise(rows, spec)
    drawn = _figures(folder, spec, rows, summary)
    parts = [f"# {spec['name']}", _origin(spec, rows)]
    if summary:
        parts += ["## Test error", table(summary, spec), paper_table(summary, spec)]
        parts += ["## What training came to", training_table(summary)]
    against = tuple(spec.get("against", ()))
    if any(isinstance(row["agreement"], float) for row in rows):
        parts += ["## What is forgotten", forgetting_table(summary)]
        against = (spec["reference"], *against)
    if turning := _measured(folder, "turning", spec, rows):
        parts += ["## How filters turn", turning_table(turning)]
    if conditioning := _measured(folder, "conditioning", spec, rows):
        parts += ["## How even the curvature is", conditioning_table(conditioning)]
    parts += [paired_table(rows, {**spec, "reference": arm}) for arm in against]
    if any(options.get("grid") for options in spec["arms"].values()):
        parts += ["## Tuning", tuning_table(rows, spec)]
    missing = [arm for arm in spec["arms"] if not finals(rows, arm)]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    parts += [f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in drawn]
    report = folder / "report.md"
    report.write_text("\n\n".join(part for part in parts if part) + "\n")
    return [report, *drawn]


def table(summary: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """Test error by arm, and its difference to the reference's on the same seeds."""
    reference = spec["reference"]
    lines = []
    for row in summary:
        compared = ["", "", ""]
        if row["shared"]:
            compared = [
                f"{row['difference']:+.2f}",
                f"{row['low']:+.2f} to {row['high']:+.2f}" if math.isfinite(row["low"]) else "-",
                f"{row['relative']:+.1f}",
            ]
        told = [f"{len(row['diverged'])} diverged"] if row["diverged"] else []
        if row["arm"] != reference and row["shared"] < len(row["seeds"]):
            told.append(f"{row['shared']} shared")  # the difference is over fewer seeds than the mean
        seeds = f"{len(row['seeds'])}" + (f" ({', '.join(told)})" if told else "")
        lines.append([row["arm"], _spread(row, "test_error"), *compared, _spread(row, "val_error"), seeds])
    head = ["arm", "test error, %", f"− {reference}", "95 % interval", "relative, %", "validation error, %", "seeds"]
    return _markdown(head, lines)


def paper_table(summary: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """Test error by set of manifolds and scheme, as the paper has it, of the arms that say ``layout: true``.

    Arms of one cell differ in something else: they are not mixed, each is there by its name.
    """
    cells: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in summary:
        options = {**spec["common"], **spec["arms"][row["arm"]]}
        if not options.get("layout"):
            continue
        unnamed = DEFAULT_MANIFOLDS if options.get("method") == "fgsgd" else ()
        manifolds = tuple(name for name in SHORT if name in options.get("manifolds", unnamed))
        column = "alone" if len(manifolds) < 2 else options.get("scheme", "pio").upper()
        entry = f"{_spread(row, 'test_error')} ({len(row['seeds'])})"
        cells.setdefault(manifolds, {}).setdefault(column, {})[row["arm"]] = entry
    columns = ("alone", "PI", "PO", "PIO")
    lines = [
        ["+".join(SHORT[m] for m in manifolds) or "Euclidean", *(_cell(cells[manifolds].get(c, {})) for c in columns)]
        for manifolds in sorted(cells, key=lambda m: (len(m), [list(SHORT).index(n) for n in m]))
    ]
    note = "The same by manifolds and scheme, test error in % (number of seeds):\n\n"
    return note + _markdown(["", *columns], lines) if lines else ""


def training_table(summary: Sequence[Row]) -> str:
    """How well each arm fits its training images, and how long it takes."""
    lines = [
        [row["arm"], _spread(row, "train_loss"), f"{row['seconds']:.0f}", str(len(row["seeds"]))]
        for row in summary
        if row["seeds"]
    ]
    note = (
        "Training loss, the mean of the last epoch's batches, and the median of the seconds that training and validation "
        "took. Runs went side by side, at times beside other work or on another machine: seconds tell of large differences "
        "only.\n\n"
    )
    return note + _markdown(["arm", "training loss", "seconds", "seeds"], lines)


def forgetting_table(summary: Sequence[Row]) -> str:
    """What the pretrained network has lost, by arm."""
    measured = [name for name in FORGETTING if any(math.isfinite(row[f"{name}_mean"]) for row in summary)]
    lines = [[row["arm"], *(_spread(row, name) for name in measured), str(len(row["seeds"]))] for row in summary]
    return _markdown(["arm", *(MEASURED[name] for name in measured), "seeds"], lines)


def turning_table(turning: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """How filters turn, by arm, from the epochs of its runs."""
    lines = []
    for arm, curves in turning.items():
        row = turned(curves)
        angles = [f"{row[name]:.2f}" for name in ("turn_first", "turn_middle", "turn_last")]
        layers = f"{row['layers']:.1f}" if row["layers"] <= 1000 else "> 1000"
        even = [f"{row['unsteady']:.2f}", f"{row['filters']:.2f}", layers, f"{100 * row['still']:.0f}"]
        lines.append([arm, *angles, *even, f"{row['travel']:.1f}", f"{row['channels']:.2f}", f"{row['rank']:.2f}"])
    angles = ["° a step, first quarter", "middle", "last quarter"]
    evenness = ["step to step", "filter to filter", "layer to layer", "a layer stands still, % of epochs"]
    head = ["arm", *angles, *evenness, "° an epoch", "channels used", "rank"]
    note = (
        "Angles by which the median filter of a layer turns, means over layers, epochs and seeds. From step to step and "
        "from filter to filter: deviation over mean; from layer to layer: largest over smallest, the median epoch's, and "
        "where that is above a thousand a layer stands still. Channels used and rank are shares, after the last epoch "
        "([turning.py](../../../recipes/experiments/turning.py)).\n\n"
    )
    return note + _markdown(head, lines)


def conditioning_table(conditioning: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """How even the spectra of the layers' curvature are, by arm, from the epochs of its runs."""
    lines = []
    for arm, curves in conditioning.items():
        row = conditioned(curves)
        shares = [[row[f"{name}_{part}"] for part in ("first", "middle", "last")] for name in CONDITIONING]
        lines.append([arm, *(f"{100 * share:.2f}" for parts in shares for share in parts)])
    head = ["arm", *(f"{name}, {part}" for name in CONDITIONING for part in ("first epoch", "middle", "last"))]
    note = (
        "Shares, in %, of the dimensions that the spectra of a layer's inputs, of its gradients, and of the Kronecker-"
        "factored curvature use, "
        "means over layers and seeds ([conditioning.py](../../../recipes/experiments/conditioning.py)).\n\n"
    )
    return note + _markdown(head, lines)


def paired_table(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """Error, and what is forgotten if it was measured, beside the reference's by seed; empty where no two can be paired."""
    kept = [name for name in PAIRED if any(isinstance(row[name], float) for row in rows)]
    columns = ("test_error", *kept)
    by_arm: dict[str, dict[str, str]] = {}
    shared: dict[str, int] = {}
    for column in columns:
        n = _digits(column)
        for row in summarise(rows, spec, column):
            if math.isfinite(row["low"]):
                told = f"{row['difference']:+.{n}f}, {row['low']:+.{n}f} to {row['high']:+.{n}f}"
                by_arm.setdefault(row["arm"], {})[column] = told
                shared[row["arm"]] = max(row["shared"], shared.get(row["arm"], 0))
    head = ["arm", *(MEASURED[column] for column in columns), "seeds"]
    lines = [[arm, *(told.get(c, "-") for c in columns), str(shared[arm])] for arm, told in by_arm.items()]
    note = f"Differences to {spec['reference']}, 95 % intervals:\n\n"
    return note + _markdown(head, lines) if lines else ""


def tuning_table(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """What was tried and what was chosen on the validation images of the tuning seeds."""
    lines = []
    keep = spec.get("keep")
    measured = ("val_error", keep) if keep else ("val_error",)
    for row in _tuned(rows, spec):
        grid = "; ".join(f"{name} {', '.join(map(_short, values))}" for name, values in row["grid"].items())
        chosen = "none: every point diverged" if row.get("lost") else "not decided"
        if "chosen" in row:
            chosen = "; ".join(
                f"{name} {_short(value)}" + (" (an end of its grid)" if name in row["edges"] else "")
                for name, value in row["chosen"].items()
            )
        numbers = [f"{row[name]:.2f}" if "chosen" in row else "" for name in measured]
        lines.append([row["arm"], grid, chosen, *numbers, str(row["runs"])])
    note = (
        "Chosen: of the points within one standard error of the least validation error, the one with the largest "
        f"{MEASURED[keep]}.\n\n"
        if keep
        else ""
    )
    return note + _markdown(["arm", "tried", "chosen", *(MEASURED[name] for name in measured), "runs"], lines)


def _tuned(rows: Sequence[Row], spec: Mapping[str, Any]) -> list[Row]:
    """As :func:`~recipes.experiments.summary.tuned`; an arm whose whole grid diverged has ``lost`` instead of an error."""
    found: list[Row] = []
    for arm, options in spec["arms"].items():
        try:
            found += tuned(rows, {**spec, "arms": {arm: options}})
        except ArithmeticError:  # the runner stops at it, and its report is what shows why
            runs = sum(1 for _ in tuning_runs(spec, arm))
            found.append({"arm": arm, "grid": options["grid"], "runs": runs, "lost": True})
    return found


def _cell(entries: Mapping[str, str]) -> str:
    if len(entries) < 2:
        return "".join(entries.values())
    return "<br>".join(f"{arm}: {entry}" for arm, entry in entries.items())


def _origin(spec: Mapping[str, Any], rows: Sequence[Row]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    versions = sorted({", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows})
    devices = ", ".join(sorted({row["device"] for row in rows}))
    budget = {name: value for name, value in spec["common"].items() if name != "validate_every"}
    tuning = f"; tuning seeds {', '.join(map(str, spec['tuning_seeds']))}" if spec["tuning_seeds"] else ""
    return (
        f"`python -m recipes.experiments recipes/configs/experiments/{spec['name']}.yaml --root <folder of IDX files>`\n\n"
        f"All arms: `{json.dumps(budget)}`. Seeds {', '.join(map(str, spec['seeds']))}{tuning}. Means ± standard deviations "
        f"over seeds; differences are paired by seed. {len(rows)} runs, {sum(r['seconds'] for r in rows) / 3600:.1f} hours, "
        f"on {devices}; commits {commits}; {'; '.join(versions)}."
    )


def _measured(folder: Path, name: str, spec: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """The rows of ``<name>.csv`` of the runs that count and did not diverge, by arm; of the arms that have some."""
    curves = read_curves(folder, f"{name}.csv")
    ended = [row for row in rows if isinstance(row["test_error"], float) and math.isfinite(row["test_error"])]
    by_arm = {
        arm: [curves[r["key"]] for r in finals(ended, arm).values() if r["key"] in curves] for arm in spec["arms"]
    }
    return {arm: found for arm, found in by_arm.items() if found}


def _figures(folder: Path, spec: Mapping[str, Any], rows: Sequence[Row], summary: Sequence[Row]) -> list[Path]:
    drawn = []
    if summary:
        errors = {row["arm"]: {s: r["test_error"] for s, r in finals(rows, row["arm"]).items()} for row in summary}
        drawn.append(figures.plot_errors(errors, spec["reference"], folder / "errors.png"))
        curves = read_curves(folder)
        by_arm = {arm: [curves[r["key"]] for r in finals(rows, arm).values() if r["key"] in curves] for arm in errors}
        drawn.append(figures.plot_curves(by_arm, summary, spec["reference"], folder / "curves.png"))
    for name, labels in figures.MEASURED.items():
        if measured := _measured(folder, name, spec, rows):
            drawn.append(figures.plot_measured(measured, labels, spec["reference"], folder / f"{name}.png"))
    for arm in spec["arms"]:
        for row in finals(rows, arm).values():
            file = folder / "history" / f"{row['key']}.json"
            if file.is_file():
                drawn += figures.plot_history(json.loads(file.read_text()), f"{arm}, seed {row['seed']:.0f}", file)
                break  # one of an arm is enough to look at
    return drawn


def _spread(row: Row, name: str) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    if not math.isfinite(mean):
        return "-"
    digits = _digits(name)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if math.isfinite(std) else "")


def _digits(name: str) -> int:
    return 3 if name in ("train_loss", "divergence", "drift", "drift_task") else 2


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

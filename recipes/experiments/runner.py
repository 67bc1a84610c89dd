"""Runs an experiment: over cores or devices, from where it was left, a row of a CSV file for each run that has ended."""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.experiments.conditioning import CONDITIONING
from recipes.experiments.spec import Run, final_runs, tuning_runs
from recipes.experiments.training import Outcome, provenance, train
from recipes.experiments.turning import TURNING

MEASURES = (
    "val_error",
    "test_error",
    "train_loss",
    "agreement",
    "agreement_recalibrated",
    "divergence",
    "drift",
    "drift_task",
    "seconds",
)
COLUMNS = ("key", "stage", "arm", "seed", *MEASURES, "commit", "versions", "device", "config")
EPOCH = ("key", "epoch", "train_loss", "val_error")
EPOCH_MEASURED = {"turning": ("key", "epoch", *TURNING), "conditioning": ("key", "epoch", *CONDITIONING)}


def run_all(spec: Mapping[str, Any], folder: Path, root: str, workers: int, devices: Sequence[str]) -> None:
    """Run what of an experiment has not been run yet.

    Args:
        spec: the experiment, see :mod:`~recipes.experiments.spec`.
        folder: where ``runs.csv``, ``curves.csv``, ``turning.csv``, ``conditioning.csv`` and ``history/`` are kept; what
            they hold is not run again.
        root: folder of the data.
        workers: processes that run side by side.
        devices: each of them takes its turn in these.

    Raises:
        RuntimeError: a run failed; it names the run. Those that had begun are finished and kept first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _mend(folder)
    done = {row["key"] for row in rows}
    origin = provenance()
    threads = max(1, (os.cpu_count() or 1) // workers)
    failed: list[tuple[Run, BaseException]] = []
    with (
        _progress() as progress,
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(threads,)) as pool,
    ):
        bar = progress.add_task(spec["name"], total=None)
        free = deque(devices[i % len(devices)] for i in range(workers))
        running: dict[Future[Outcome], tuple[Run, str]] = {}
        while True:
            try:
                runs = list(pending(spec, rows))
            except ValueError:  # of a choice among a grid, and of every later try; what is under way is kept before
                if not running:
                    raise
                runs = []
            progress.update(bar, total=_total(spec), completed=len({run.key for run in runs} & done))
            under_way = {run.key for run, _ in running.values()}
            waiting = [run for run in runs if run.key not in done | under_way] if not failed else []
            while waiting and free:
                run, device = waiting.pop(0), free.popleft()
                options: dict[str, Any] = {
                    "test": run.stage == "final",
                    "root": root,
                    "device": device,
                    "watch": run.watch,
                }
                task = pool.submit(train, dict(run.config), run.seed, **options)
                running[task] = run, device
            if not running:
                break
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                run, device = running.pop(task)
                free.append(device)
                error = task.exception()
                if error is not None:
                    failed.append((run, error))
                    continue
                row = keep(folder, run, task.result(), {**origin, "device": _name(device)})
                rows.append(row)
                done.add(run.key)
                shown = row["test_error"] if run.stage == "final" else row["val_error"]
                progress.console.print(f"{run.stage:5} {run.arm}, seed {run.seed}: {shown} %, {row['seconds']} s")
    if failed:
        run, error = failed[0]
        raise RuntimeError(f"{spec['name']}: {run.arm!r}, seed {run.seed}, {dict(run.config)} failed") from error


def pending(spec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """The runs whose configuration is known, in the order in which they are best run.

    First what chooses among grids; then the arms side by side, seed by seed: what has been run when time is up can be
    compared.
    """
    for arm in spec["arms"]:
        yield from tuning_runs(spec, arm)
    finals = [runs for arm in spec["arms"] if (runs := final_runs(spec, arm, rows))]
    for turn in range(max(map(len, finals), default=0)):
        yield from (runs[turn] for runs in finals if turn < len(runs))


def keep(folder: Path, run: Run, outcome: Outcome, origin: Mapping[str, str]) -> dict[str, Any]:
    """Write down what came out of a run; its row is written last, so that what has a row is whole."""
    _append(folder / "curves.csv", EPOCH, [{"key": run.key, **_rounded(epoch)} for epoch in outcome.epochs])
    for name, epochs in outcome.measured.items():
        _append(folder / f"{name}.csv", EPOCH_MEASURED[name], [{"key": run.key, **_rounded(epoch)} for epoch in epochs])
    if outcome.history is not None:
        (folder / "history").mkdir(exist_ok=True)
        (folder / "history" / f"{run.key}.json").write_text(json.dumps(outcome.history))
    row = {
        "key": run.key,
        "stage": run.stage,
        "arm": run.arm,
        "seed": run.seed,
        **_rounded(outcome.numbers),
        **origin,
        "config": json.dumps(run.config, sort_keys=True),
    }
    row = {name: row.get(name, "") for name in COLUMNS}
    _append(folder / "runs.csv", COLUMNS, [row])
    return row


def _begin(threads: int) -> None:
    """In each process that runs: so many threads, and an end as soon as the process that keeps the rows is gone."""
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _total(spec: Mapping[str, Any]) -> int:
    tuning = sum(1 for arm in spec["arms"] for _ in tuning_runs(spec, arm))
    return tuning + sum(len(options.get("seeds", spec["seeds"])) for options in spec["arms"].values())


def _rounded(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {name: f"{value:.6g}" for name, value in numbers.items()}


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _mend(folder: Path) -> list[dict[str, str]]:
    """Take off what a machine that stopped had not written to the end; the rows of the runs that are whole.

    That is a line without an end, and what other files have of a run whose row, which is written last, is not there.
    """
    ours = [folder / f"{name}.csv" for name in ("runs", "curves", *EPOCH_MEASURED)]
    for path in filter(Path.is_file, ours):
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if not whole:
            path.unlink()  # with its header gone
        elif whole != written:
            path.write_bytes(whole)
    rows = _read(folder / "runs.csv")
    done = {row["key"].encode() for row in rows}
    for path in filter(Path.is_file, ours[1:]):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines[1:] if line.partition(b",")[0] in done]
        if rows and len(kept) < len(lines) - 1:
            path.write_bytes(b"".join(lines[:1] + kept))
    return rows


def _append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )

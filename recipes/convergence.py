"""Does FG-SGD converge where theory says so, and where the step without 𝔤 does not? On networks with a known minimum.

    python -m recipes.convergence

First, networks whose least loss is known (:mod:`recipes.known_minima`) are trained by minibatch FG-SGD under Eq. 4; the
exact loss and the norm of its Riemannian gradient are written down along the way. Where minibatch gradients do not vanish
at the minimum, a constant step size is run beside it. In the end a run goes on with exact gradients, which shows what
stationary point it was converging to.

Then the learning rate is swept over decades, with the step of FG-SGD (``rho=1``) and without 𝔤 (``rho=None``), on the same
starts and batches. Two CSV files, two figures and two tables.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_fgsgd import FGSGD, RobbinsMonroLR, check_step_sizes
from recipes.convergence_report import (
    STATIONARY,
    SUMMARY,
    TRAINED,
    VERDICT,
    judge,
    plot_convergence,
    plot_sweep,
    summarise,
)
from recipes.known_minima import PROBLEMS, SWEPT, Problem

__all__ = ["SUMMARY", "VERDICT", "converge", "gradient_norm", "judge", "main", "read", "summarise", "sweep"]

Row = dict[str, Any]

LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)


# Training -------------------------------------------------------------------------------------------------------------


def gradient_norm(optimizer: FGSGD) -> float:
    """Norm of the Riemannian gradient over all groups (Theorem 1) and all unconstrained parameters."""
    squares = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            pom = optimizer.poms.get(p)
            if pom is None:
                squares += float(p.grad.square().sum())
                continue
            squares += float(pom.riemannian(p.detach(), p.grad, group["metric"]).square().sum())
    return squares**0.5


def checkpoints(steps: int) -> list[int]:
    """Steps at which a run is looked at: 0, then about five to a decade, and the last."""
    spaced = {round(10 ** (i / 5)) for i in range(5 * math.ceil(math.log10(max(steps, 2))))}
    return [0, *sorted(step for step in spaced if step < steps), steps]


def converge(name: str, seed: int, steps: int, constant: bool = False, settling: int = 2000) -> list[Row]:
    """Train one problem: a row at each checkpoint.

    Args:
        name: of the problem.
        seed: of its target, index sets, start and batches.
        steps: steps of FG-SGD.
        constant: keep the step size at r0, which Eq. 4 forbids.
        settling: steps with exact gradients, at most, that follow; see :func:`settle`.
    """
    problem = PROBLEMS[name](seed)
    r0, tau, kappa = problem.schedule
    optimizer = problem.optimizer(r0)
    scheduler = None if constant else RobbinsMonroLR(optimizer, tau, kappa)
    generator = torch.Generator().manual_seed(seed + 10**6)
    rows: list[Row] = []

    def look(step: int, schedule: str) -> None:
        optimizer.zero_grad()
        loss = problem.exact()
        loss.backward()
        rows.append(
            {
                "problem": name,
                "seed": seed,
                "schedule": schedule,
                "eq4": check_step_sizes(scheduler if schedule == "Eq. 4" else None).satisfied,
                "step": step,
                "lr": optimizer.param_groups[0]["lr"],
                "loss": loss.item(),
                "minimum": problem.minimum,
                "contained": problem.contained,
                "excess": loss.item() - problem.minimum,
                "gradient_norm": gradient_norm(optimizer),
                "distance": max(optimizer.distance(p) for p in optimizer.poms),
            }
        )

    schedule, looks = "constant" if constant else "Eq. 4", set(checkpoints(steps))
    for step in range(steps + 1):
        if step in looks:
            look(step, schedule)
        if step < steps:
            optimizer.zero_grad()
            problem.batch(generator).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    if not constant:
        step += settle(problem, optimizer, settling)
        look(step, "exact gradients")
    return rows


def settle(problem: Problem, optimizer: FGSGD, steps: int) -> int:
    """Go on with exact gradients and momentum until the gradient vanishes, or for ``steps``: the number of steps taken."""
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    for step in range(steps):
        optimizer.zero_grad()
        problem.exact().backward()
        if step % 50 == 0 and gradient_norm(optimizer) <= STATIONARY:
            return step
        optimizer.step()
    return steps


def sweep(name: str, seed: int, lr: float, rho: float | None, steps: int) -> Row:
    """Train one network from one learning rate, under Eq. 4 too, and give a verdict.

    ``diverged``: a loss or gradient that is not finite (or a gradient beyond 1e18, on which ``FGSGD.step`` gives up), or a
    final loss that is not below the first. On compact manifolds weights cannot grow: there it means to hop about for good.
    ``trained``: at most a fifth of the excess is left. ``neither``: anything else. The final loss is the median of six looks
    in the last fifth of the steps.
    """
    problem = SWEPT[name](seed)
    optimizer = problem.optimizer(lr, rho)
    scheduler = RobbinsMonroLR(optimizer, *problem.schedule[1:])
    generator = torch.Generator().manual_seed(seed + 10**6)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    looks = {round(steps * (0.8 + 0.04 * i)) for i in range(6)}
    losses, largest = [], 0.0
    with torch.no_grad():
        first = problem.exact().item()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        problem.batch(generator).backward()
        largest = max(largest, _finite(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        try:
            optimizer.step()
        except FloatingPointError:
            losses = [math.inf]
            break
        scheduler.step()
        if step in looks:
            with torch.no_grad():
                losses.append(_finite(problem.exact()))
    final = statistics.median(losses)
    untrained = first if problem.untrained is None else problem.untrained
    left = (final - problem.minimum) / (untrained - problem.minimum)
    return {
        "network": name,
        "seed": seed,
        "rho": "none" if rho is None else rho,
        "lr": lr,
        "steps": step,
        "initial_loss": first,
        "final_loss": final,
        "minimum": problem.minimum,
        "excess_left": left,
        "largest_gradient": largest,
        "weight_norm": _finite(torch.nn.utils.get_total_norm([p.detach() for p in parameters])),
        "verdict": "diverged" if final >= first else "trained" if left <= TRAINED else "neither",
    }


def _finite(value: Tensor) -> float:
    number = value.item()
    return number if math.isfinite(number) else math.inf


# Running --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers and truth values as such."""
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _write(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Write the rows, and read them back: tables and figures show what the file holds."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return read(path)


def _each(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, what: str) -> list[Any]:
    """``function`` of every job, in order."""
    console = Console(stderr=True)
    if workers == 1:
        return [function(*job) for job in track(jobs, what, console=console)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        return [future.result() for future in track(futures, what, console=console)]


def _print(console: Console, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def main(
    output: str = "runs/convergence",
    seeds: int = 3,
    steps: int = 3000,
    problems: tuple[str, ...] = tuple(PROBLEMS),
    networks: tuple[str, ...] = tuple(SWEPT),
    sweep_seeds: int = 3,
    sweep_steps: int = 200,
    lrs: tuple[float, ...] = LRS,
    settling: int = 2000,
    workers: int = 2,
) -> Path:
    """Train, sweep and report.

    Args:
        output: folder of the CSV files and figures.
        seeds: runs of each problem.
        steps: steps of each run.
        problems: those to train, by name.
        networks: those to sweep, by name.
        sweep_seeds: runs of each network at each learning rate, with 𝔤 and without.
        sweep_steps: steps of each of these.
        lrs: learning rates of the sweep.
        settling: steps with exact gradients, at most, that follow each run.
        workers: processes that share the work.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()

    jobs: list[tuple[Any, ...]] = []
    for name, seed in product(problems, range(seeds)):
        jobs.append((name, seed, steps, False, settling))
        if PROBLEMS[name](seed).minimum > 0:
            jobs.append((name, seed, steps, True))
    if jobs:
        runs = _each(converge, jobs, workers, "known minima")
        rows = _write(folder / "convergence.csv", [row for run in runs for row in run])
        plot_convergence(rows, folder / "convergence.png")
        _print(console, "FG-SGD on networks whose minimum is known", SUMMARY, summarise(rows))

    jobs = list(product(networks, range(sweep_seeds), lrs, (1.0, None), (sweep_steps,)))
    if jobs:
        rows = _write(folder / "sweep.csv", _each(sweep, jobs, workers, "learning rates"))
        plot_sweep(rows, folder / "sweep.png")
        _print(console, "Learning rates, with 𝔤 and without", VERDICT, judge(rows))
    return folder


if __name__ == "__main__":
    from jsonargparse import auto_cli

    torch.set_num_threads(1)
    print(auto_cli(main, as_positional=False))

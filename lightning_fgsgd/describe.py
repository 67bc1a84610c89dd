"""What is constrained in a model and what is not, and why: as a table to read, and as rows for a logger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fgsgd.checkpoint import whole
from lightning_fgsgd.optimizer import FGSGD
from lightning_fgsgd.plan import PlannedWeight, POMParamGroups, POMPlan
from lightning_fgsgd.pom import POM
from lightning_fgsgd.sharding import whole_of

__all__ = ["Description", "describe"]


class Description:
    """What :func:`describe` found. ``print`` it, or give it to rich for a table.

    Attributes:
        rows: a dict for each parameter, all with the same keys, ready for a data frame: ``"name"``, ``"shape"``,
            ``"numel"``, ``"constrained"``, ``"reason"`` (why it is Euclidean, else ""), ``"cutting"``, ``"n"``, ``"p"``,
            ``"components"``, ``"groups"``, the number of components on each manifold (``"sphere"``, ...), ``"start"``,
            ``"radius_min"``, ``"radius_max"``, and ``"change"``, the relative change ‖placed − before‖_F / ‖before‖_F that
            the start makes, where that is known. None where a key does not apply. Parameters that are frozen, or that the
            optimizer was not given, are not constrained until it is given them.
        totals: ``"parameters"``, ``"constrained"`` and ``"share"`` (of numbers, not tensors), ``"layers"`` constrained, and
            ``"output_change"``, where a batch was given.
    """

    def __init__(self, rows: list[dict[str, Any]], output_change: float | None = None) -> None:
        self.rows = rows
        constrained = [row for row in rows if row["constrained"]]
        total, part = (sum(row["numel"] for row in some) for some in (rows, constrained))
        self.totals: dict[str, Any] = {
            "parameters": total,
            "constrained": part,
            "share": part / total if total else 0.0,
            "layers": len(constrained),
            "output_change": output_change,
        }

    def scalars(self) -> dict[str, float]:
        """The totals and each constrained layer's change as one flat dict, for ``logger.log_metrics``.

        Of several models, the second layer of a name is called ``name (2)``.
        """
        flat = {f"pom/{name}": float(value) for name, value in self.totals.items() if value is not None}
        seen: Counter[str] = Counter()
        for row in self.rows:
            if row["change"] is not None:
                seen[row["name"]] += 1
                count = seen[row["name"]]
                flat[f"pom/change/{row['name']}{f' ({count})' if count > 1 else ''}"] = row["change"]
        return flat

    @property
    def columns(self) -> list[str]:
        """Headings of the table."""
        return [
            "parameter",
            "shape",
            "cutting",
            "n x p",
            "components",
            "groups",
            "manifolds, or why Euclidean",
            "R",
            "change",
        ]

    def cells(self) -> Iterator[list[str]]:
        """The table, row by row; parameters that are Euclidean for the same reason in one row."""
        others: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            if not row["constrained"]:
                others.setdefault(row["reason"], []).append(row)
                continue
            low, high = row["radius_min"], row["radius_max"]
            yield [
                row["name"],
                "x".join(map(str, row["shape"])),
                row["cutting"],
                f"{row['n']} x {row['p']}",
                str(row["components"]),
                str(row["groups"]),
                ", ".join(f"{row[name]} {name}" for name in _MANIFOLDS if row[name]),
                f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
                "" if row["change"] is None else f"{row['change']:.2g}",
            ]
        for reason, rows in others.items():
            name = rows[0]["name"] if len(rows) == 1 else f"{rows[0]['name']} and {len(rows) - 1} more"
            yield [name, f"{sum(row['numel'] for row in rows):,} numbers", "", "", "", "", reason, "", ""]

    def summary(self) -> str:
        """The totals in a line."""
        totals = self.totals
        line = f"{totals['share']:.1%} of {totals['parameters']:,} numbers constrained, in {totals['layers']} weights"
        change = totals["output_change"]
        return line if change is None else f"{line}; placing them changes the output by {change:.2g} of its norm"

    def __str__(self) -> str:
        lines = [self.columns, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, self.summary()])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="Weights on products of manifolds", caption=self.summary())
        for column in self.columns:
            table.add_column(column, overflow="fold", justify="right" if column in ("components", "groups") else "left")
        for line in self.cells():
            table.add_row(*line)
        return table


def describe(
    source: POMParamGroups | POMPlan | FGSGD, model: nn.Module | None = None, batch: Any = None, quiet: bool = False
) -> Description:
    """Print a table of the weights on products of manifolds, and of what is Euclidean and why.

    Args:
        source: what :func:`~lightning_fgsgd.pom_param_groups` returned, before anything has moved; or a live ``FGSGD``.
        model: with ``batch``: the model, to measure how much placing the weights changes its output, one tensor. It is run
            in its present mode, twice, with the same random numbers, and not changed; with a live ``FGSGD`` that is only
            known before the first step.
        batch: what to call it with, a tensor or a tuple of arguments.
        quiet: do not print.

    Returns:
        The :class:`Description`; its ``rows`` and ``totals`` are plain Python.

    Raises:
        ValueError: a batch without a model.
        TypeError: the output of ``model`` is not one tensor.

    With sharded weights it is called by all processes.
    """
    if batch is not None and model is None:
        raise ValueError("model: it is needed to run the batch through")
    plan = (
        source.plan if isinstance(source, POMParamGroups) else source._own.plan if isinstance(source, FGSGD) else source
    )
    poms: dict[Tensor, POM] = {}
    if isinstance(source, FGSGD):
        poms = {
            p: pom for p, pom in zip(source.poms, whole(list(source.poms.values())), strict=True) if pom is not None
        }
    placed: dict[Tensor, tuple[Tensor, Tensor]] = {}  # before and after
    rows, known = [], True
    for p, name in plan.names.items():
        row: dict[str, Any] = dict.fromkeys(_KEYS)
        row |= {"name": name, "shape": tuple(p.shape), "numel": p.numel(), "constrained": False, "reason": ""}
        if p in poms:
            assert isinstance(source, FGSGD)
            row |= _live(poms[p])
            if source.has_unplaced(p):
                placed[p] = whole_of(source.unplaced(p)), whole_of(p)
            elif poms[p].start != "preserve":
                known = False
        elif p in plan.weights and not p.requires_grad:
            row["reason"] = "frozen"
        elif p in plan.weights and isinstance(source, FGSGD):
            row["reason"] = "not given to the optimizer"
        elif p in plan.weights:
            row |= _planned(plan.weights[p])
            if not p.is_meta and plan.weights[p].start != "preserve":
                before = whole_of(p)
                after = before.clone()
                POM.place(plan.weights[p], after)
                placed[p] = before, after
        else:
            row["reason"] = plan.reasons.get(p, "")
        if row["start"] == "preserve":
            row["change"] = 0.0
        if p in placed and bool(placed[p][0].any()):  # nothing is a change relative to zero
            before, after = placed[p]
            row["change"] = float((after.double() - before.double()).norm() / before.double().norm())
        rows.append(row)
    if isinstance(source, FGSGD):
        rows += _unplanned(source, plan)
    output_change = _output_change(model, batch, placed) if model is not None and batch is not None and known else None
    description = Description(rows, output_change)
    if not quiet:
        _print(description)
    return description


_MANIFOLDS = ("sphere", "oblique", "stiefel", "euclidean")
_KEYS = (
    *("name", "shape", "numel", "constrained", "reason", "cutting", "n", "p", "components", "groups"),
    *_MANIFOLDS,
    *("start", "radius_min", "radius_max", "change"),
)


def _planned(planned: PlannedWeight) -> dict[str, Any]:
    return _cut(planned) | {"groups": planned.index_sets.num_groups, "radius_min": 1.0, "radius_max": 1.0}


def _live(pom: POM) -> dict[str, Any]:
    low, high = pom.radius.aminmax()
    return _cut(pom) | {"groups": pom.num_groups, "radius_min": float(low), "radius_max": float(high)}


def _cut(weight: PlannedWeight | POM) -> dict[str, Any]:
    cutting, sets = weight.cutting, weight.index_sets if isinstance(weight, PlannedWeight) else weight.sets
    counts = Counter(sets.manifold_names[i] for i in sets.manifold.tolist())
    return {
        "constrained": True,
        "cutting": cutting.kind,
        "n": cutting.n,
        "p": cutting.p,
        "components": cutting.count,
        "start": weight.start,
        **{name: counts[name] for name in _MANIFOLDS},
    }


def _unplanned(optimizer: FGSGD, plan: POMPlan) -> Iterator[dict[str, Any]]:
    """Rows of parameters that no plan has a name for, as in ``FGSGD(model.parameters())``."""
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p not in plan.names:
                name = f"group {i}, parameter {j}"
                found = {"name": name, "shape": tuple(p.shape), "numel": p.numel(), "constrained": False}
                yield dict.fromkeys(_KEYS) | found | {"reason": "given without a plan"}


@torch.no_grad()
def _output_change(model: nn.Module, batch: Any, placed: Mapping[Tensor, tuple[Tensor, Tensor]]) -> float:
    """‖output after − output before‖ / ‖output before‖ for one batch."""
    args = batch if isinstance(batch, tuple) else (batch,)
    # Not the plan's names: those are of the model that it was drawn from, which may be a LightningModule around this one.
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    devices = {p.device for p in names if p.device.type == "cuda"}
    outputs = []
    for i in range(2):
        weights = {names[p]: pair[i] for p, pair in placed.items() if p in names}
        state = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm may write to them
        with torch.random.fork_rng(devices):
            output = torch.func.functional_call(model, {**state, **weights}, args)
        if not isinstance(output, Tensor):
            raise TypeError(f"model: its output is a {type(output).__name__}; give a module that puts out one tensor")
        outputs.append(output.double())
    before, after = outputs
    return float((after - before).norm() / before.norm())


def _print(description: Description) -> None:
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(description)
    else:
        console = Console()
        Console(width=None if console.is_terminal else 160).print(description)

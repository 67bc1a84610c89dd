"""The picture of NormBoundMonitor."""

from __future__ import annotations

from typing import Any

from lightning_fgsgd.norms import Norms

_LABELS = {"spectral": "spectral", "frobenius": "Frobenius", "l21": "ℓ2→1"}
_BOUNDS = {"neyshabur2015": "Neyshabur 2015", "bartlett2017": "Bartlett 2017", "neyshabur2018": "Neyshabur 2018"}


def plot_norms(history: list[dict[str, Any]], start: dict[str, float]) -> Any:
    """Bounds over the looks of ``history`` (start dashed, where it is known), and the norms by layer at the last one."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("NormBoundMonitor.plot needs matplotlib: pip install matplotlib") from error

    last = history[-1]
    layers = list(last["layers"])
    figure = Figure(figsize=(15, max(5.0, 1.0 + 0.16 * len(layers))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bounds, components, groups = figure.subplots(1, 3)

    steps = [look["step"] for look in history]
    for i, (name, label) in enumerate(_BOUNDS.items()):
        bounds.plot(steps, [look["network"][name] for look in history], f"C{i}.-", label=label)
        if name in start:
            bounds.axhline(start[name], color=f"C{i}", linestyle="--", linewidth=1)
    bounds.set(xlabel="step", ylabel="natural logarithm")
    bounds.set_title("Bounds of Table 1\n(dashed: the weights before the start)")
    bounds.legend(fontsize=8)

    def by_layer(axis: Any, prefix: str, beside: str) -> None:
        rows = [last["layers"][layer] for layer in layers]
        for i, name in enumerate(Norms._fields):
            for key, style, size in ((beside + name, "|", 11), (prefix + name, "o", 4)):
                known = [(row[key], y) for y, row in enumerate(rows) if key in row]
                if known:
                    label = _LABELS[name] if style == "o" else None
                    axis.plot(*zip(*known, strict=True), f"C{i}{style}", markersize=size, label=label)
        axis.axvline(1, color="grey", linewidth=1)
        axis.set(xscale="log", ylim=(len(layers) - 0.5, -0.5))

    by_layer(components, "", "table2_")
    components.set_title("Largest norms of components\n(bars: Table 2 times R, where it has an entry)")
    components.set_yticks(range(len(layers)), layers, fontsize=6)
    components.legend(fontsize=8)
    by_layer(groups, "group_", "mean_")
    groups.set_title("Largest norms of groups\n(bars: geometric mean of their components')")
    groups.set_yticks([])
    return figure

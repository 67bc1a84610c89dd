"""``python -m benchmarks.scaling``: the cost of a step from 1 M to 100 M weights, beside torch's SGD.

The networks are stacks of equal layers, 3x3 convolutions of 256 channels and Linear layers of 768 by 768; the exponent is
the slope of log time over log size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.step import fgsgd, with_gradients

COLUMNS = {"millions": ".0f", "arm": "", "ms": ".2f", "ratio": ".2f"}


def network(millions: float) -> nn.Module:
    """About so many million weights, half of them in 3x3 kernels."""
    half = millions * 5e5
    convolutions = [nn.Conv2d(256, 256, 3, bias=False) for _ in range(max(1, round(half / (9 * 256 * 256))))]
    linear = [nn.Linear(768, 768, bias=False) for _ in range(max(1, round(half / 768**2)))]
    return nn.ModuleList([*convolutions, *linear]).to(memory_format=torch.channels_last)


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of the line through log time over log size."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in seconds]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--millions", nargs="+", type=float, default=[1, 3, 10, 30, 100])
    args = options.parse_args()
    device = torch.device(args.device)
    found: list[dict[str, Any]] = []
    for millions in args.millions:
        model = network(millions).to(device)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        sgd = torch.optim.SGD(with_gradients(model).parameters(), lr=1e-3, momentum=0.9, foreach=True)
        arms = {"torch SGD": sgd.step, "FGSGD mix, project": fgsgd(model, True, start="project")}
        found += harness.rows(harness.interleaved(arms, args.rounds, device), "torch SGD", millions=size)
    print(harness.table(found, COLUMNS))
    for arm in ("torch SGD", "FGSGD mix, project") if len(args.millions) > 1 else ():  # a slope needs two points
        mine = [r for r in found if r["arm"] == arm]
        slope = exponent([r["millions"] for r in mine], [r["ms"] for r in mine])
        print(f"{arm}: exponent {slope:.3f}")
        found.append({"arm": arm, "exponent": slope})
    harness.write(args.out, "scaling", found, harness.environment(device))


if __name__ == "__main__":
    main()

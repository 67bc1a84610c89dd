"""``python -m benchmarks.memory``: what FGSGD keeps beside the weights, and what a step holds for a moment.

State: momentum, index sets, R and the factors of ``preserve``, over SGD's momentum. Transient: the most that the tensors
made during a step hold at once, over the largest weight or 5 % of all, whichever is more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.step import with_gradients
from lightning_fgsgd import FGSGD, pom_param_groups

COLUMNS = {"model": "", "start": "", "fused": "", "state": ".3f", "transient": ".3f"}


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a step holds at once beside what there was before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps, each storage once."""
    tensors = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    if isinstance(optimizer, FGSGD):
        for pom in optimizer.poms.values():
            own = [pom.upper, pom.inverse, pom._radius, pom.sets.manifold, pom.sets.slot, *pom._curvatures.values()]
            tensors += [x for x in own if x is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure(model: nn.Module, start: str, fused: bool) -> dict[str, float]:
    """State over SGD's, and what a step holds over what it may."""
    mine, theirs = with_gradients(model), with_gradients(model)
    optimizer = FGSGD(pom_param_groups(mine, start=start), lr=1e-3, momentum=0.9, fused=fused)
    sgd = torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.9)
    optimizer.step()
    sgd.step()
    peak = peak_bytes(optimizer.step, next(mine.parameters()).device)
    sizes = [p.numel() * p.element_size() for p in mine.parameters()]
    return {
        "state": state_bytes(optimizer) / state_bytes(sgd),
        "transient": peak / max(max(sizes), 0.05 * sum(sizes)),
    }


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_base_patch16_224"])
    args = options.parse_args()
    device = torch.device(args.device)
    found = []
    for name in args.models:
        model = timm.create_model(name).to(device)
        for start in ("project", "random", "preserve"):
            for fused in (True, False):
                found.append({"model": name, "start": start, "fused": str(fused), **measure(model, start, fused)})
    print(harness.table(found, COLUMNS))
    harness.write(args.out, "memory", found, harness.environment(device))


if __name__ == "__main__":
    main()

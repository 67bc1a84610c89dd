"""Weights do not leave their manifolds in long runs. Nothing re-projects them now and then: every retraction ends there."""

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "steps", "bound"), [(torch.float32, 100_000, 1e-5), (torch.bfloat16, 10_000, 0.02)])
def test_no_drift_in_a_long_run(dtype, steps, bound):
    # bfloat16 has 8 bits: a weight that is rounded to it is 2^-8 away at once, and stays so.
    models = {
        start: nn.ModuleList([nn.Conv2d(4, 9, 3, bias=False), nn.Linear(12, 12, bias=False)]).to(dtype)
        for start in ("preserve", "project")
    }
    groups = [g for start, model in models.items() for g in pom_param_groups(model, start=start, block_size=4)]
    optimizer = FGSGD(groups, lr=0.3, momentum=0.9)
    weights = [p for model in models.values() for p in model.parameters()]
    starts = {optimizer.pom(p).start for p in weights}
    assert starts == set(models)
    worst = 0.0
    for step in range(steps):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 500 == 499:
            worst = max(worst, *(optimizer.distance(p) for p in weights))
    assert worst <= bound

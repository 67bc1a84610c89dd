"""A step keeps its precision whatever products may do around it; what is done for all weights at once is that for each."""

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, eager, pom_param_groups
from lightning_fgsgd.stepsize import step_normalizer
from lightning_fgsgd.update import shares_of_all, sums_of_all

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from torch 2.9 on


@pytest.fixture
def _precision():
    yield
    torch.set_float32_matmul_precision("highest")


def allowed():
    if not NEW:
        return torch.get_float32_matmul_precision()
    return [b.fp32_precision for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_may_be_rounded_are_exact_in_a_step_and_may_be_rounded_again_after_it(precision, monkeypatch):
    seen = []
    squares = eager.squares
    monkeypatch.setattr(eager, "squares", lambda *args: seen.append(allowed()) or squares(*args))
    torch.set_float32_matmul_precision(precision)
    before = allowed()
    layer = nn.Linear(8, 8)
    layer.weight.grad, layer.bias.grad = torch.randn(8, 8), torch.randn(8)
    FGSGD(pom_param_groups(layer), lr=0.1, fused=False).step()
    assert seen == [["ieee", "ieee"] if NEW else "highest"]
    assert allowed() == before
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.usefixtures("_precision")
def test_a_step_that_is_refused_leaves_the_precision_of_products_as_it_was():
    torch.set_float32_matmul_precision("high")
    before, layer = allowed(), nn.Linear(8, 8)
    layer.weight.grad = torch.full((8, 8), torch.nan)
    with pytest.raises(FloatingPointError):
        FGSGD(pom_param_groups(layer), lr=0.1).step()
    assert allowed() == before


def test_step_sizes_of_all_weights_at_once_are_those_of_each_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 6).double(), nn.Conv2d(2, 4, 3))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    groups = pom_param_groups(model, scheme="pi")
    (constrained,) = (g for g in groups if g["name"] == "pom")
    rhos = [0.5, None, 2.0, 0.5]
    split = [{**constrained, "params": [p], "rho": rho} for p, rho in zip(constrained["params"], rhos, strict=True)]
    groups[:] = [*split, *(g for g in groups if g["name"] != "pom")]
    for i, group in enumerate(groups):
        group["name"] = str(i)
    optimizer = FGSGD(groups, lr=0.1)
    updates, _ = optimizer._updates(set())
    sums = sums_of_all(updates)
    for update, of_groups, share in zip(updates, sums, shares_of_all(updates, sums), strict=True):
        assert share.dtype == update.weight.dtype
        if update.group["rho"] is None:
            assert of_groups is None
            assert torch.equal(share, torch.ones_like(share))
            continue
        norms = of_groups.sqrt().to(share.dtype)
        curvature = update.pom.curvatures(update.group["metric"])
        assert torch.equal(share, 1 / step_normalizer(norms, update.group["rho"], curvature))

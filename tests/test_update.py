"""A step keeps its precision whatever products may do around it."""

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, eager, pom_param_groups

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


@pytest.mark.skipif(not NEW, reason="there is one precision for all before torch 2.9")
@pytest.mark.parametrize("own", [False, True])
def test_a_precision_that_is_set_for_all_can_be_changed_for_all_after_a_step(own):
    matmul = torch.backends.cuda.matmul
    layer = nn.Linear(8, 8)
    layer.weight.grad = torch.randn(8, 8)
    matmul.fp32_precision = "none"  # other tests leave it at what set_float32_matmul_precision("highest") sets
    (matmul if own else torch.backends).fp32_precision = "tf32"
    try:
        FGSGD(pom_param_groups(layer), lr=0.1).step()
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == ("tf32" if own else "ieee")
    finally:
        matmul.fp32_precision = torch.backends.fp32_precision = "none"

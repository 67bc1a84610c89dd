import math

import pytest
import torch

from lightning_fgsgd.bounds import Norms, component_norms, group_norms, table1, table2
from lightning_fgsgd.manifolds import get_manifold


def test_component_norms_are_numpys():
    x = torch.randn(7, 6, 3, dtype=torch.float64)
    norms = component_norms(x)
    torch.testing.assert_close(norms.spectral, torch.linalg.matrix_norm(x, ord=2))
    torch.testing.assert_close(norms.frobenius, torch.linalg.matrix_norm(x))
    torch.testing.assert_close(norms.l21, x.norm(dim=1).sum(1))


def test_group_norms_are_those_of_the_concatenation():
    x, group = torch.randn(6, 5, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0])
    norms = group_norms(x, group)
    for g in range(3):
        side_by_side = torch.cat(list(x[group == g]), dim=1)
        assert math.isclose(norms.frobenius[g], side_by_side.norm())
        assert math.isclose(norms.l21[g], side_by_side.norm(dim=0).sum())
        assert norms.spectral[g] >= torch.linalg.matrix_norm(side_by_side, ord=2)


@pytest.mark.parametrize("manifold", ["sphere", "oblique", "stiefel"])
def test_table_2_agrees_with_the_definition_in_its_first_two_columns(manifold):
    q = get_manifold(manifold).random(20, 5, 3, dtype=torch.float64)
    norms = component_norms(q)
    spectral, frobenius, l21 = table2(manifold, 3)
    if spectral is not None:
        torch.testing.assert_close(norms.spectral, torch.full_like(norms.spectral, spectral))
    torch.testing.assert_close(norms.frobenius, torch.full_like(norms.frobenius, frobenius))
    assert (norms.l21 > l21).all()  # the third column is not the definition's, which is larger


def test_table_2_has_no_entry_for_other_manifolds():
    with pytest.raises(ValueError, match="has no entry for 'euclidean'"):
        table2("euclidean", 3)


def test_table_1_is_its_formulas_where_they_do_not_overflow():
    layers = [Norms(*(torch.rand(g, dtype=torch.float64) + 0.5 for _ in range(3))) for g in (2, 3, 1)]
    prod = lambda x: float(x.prod())  # noqa: E731
    spectral = math.prod(prod(n.spectral) for n in layers)
    neyshabur2015 = 2**3 / 10 * math.prod(prod(n.frobenius) for n in layers)
    bartlett = spectral / 10 * sum(prod((n.l21 / n.spectral) ** (2 / 3)) for n in layers) ** 1.5
    neyshabur2018 = spectral / 10 * (9 * 7 * sum(prod((n.frobenius / n.spectral) ** 2) for n in layers)) ** 0.5
    got = table1(layers, samples=100, width=7)
    assert [math.exp(x) for x in got] == pytest.approx([neyshabur2015, bartlett, neyshabur2018])


def test_table_1_stays_finite_where_the_products_overflow():
    layers = [Norms(*(torch.full((1000,), 50.0, dtype=torch.float64) for _ in range(3))) for _ in range(50)]
    assert all(math.isfinite(x) and x > 1e5 for x in table1(layers, samples=100, width=64))
    with pytest.raises(ValueError, match="need at least one of each, got 0, 100, 64"):
        table1([], samples=100, width=64)

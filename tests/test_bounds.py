import math

import pytest
import torch

from lightning_fgsgd.bounds import component_norms, group_norms, table2
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

"""Both forms of a batch of matrices give what dense algebra gives."""

import pytest
import torch

from lightning_fgsgd import matrices
from lightning_fgsgd.matrices import Planes


def planes(m):
    return Planes([[m[:, i, j] for j in range(m.shape[2])] for i in range(m.shape[1])])


def dense(m, p=None):
    if isinstance(m, torch.Tensor):
        return m if p is None else matrices.expand(m, p)
    some = next(x for x in m.entries if isinstance(x, torch.Tensor))
    return torch.stack([torch.stack([x + torch.zeros_like(some) for x in row], -1) for row in m.rows], -2)


def values(x):
    return x.flatten()


@pytest.fixture(params=["tensor", "tensor by rows", "planes"])
def form(request):
    if request.param == "planes":
        return planes
    return (lambda m: m.mT.contiguous().mT) if request.param == "tensor by rows" else lambda m: m


def test_products_and_grams_are_those_of_linear_algebra(form):
    a, b, s = torch.randn(7, 5, 3), torch.randn(7, 5, 3), torch.randn(7, 3, 3)
    torch.testing.assert_close(dense(matrices.gram(form(a), form(b))), a.mT @ b)
    torch.testing.assert_close(dense(matrices.matmul(form(a), form(s))), a @ s)
    torch.testing.assert_close(dense(matrices.subtract_product(form(b), form(a), form(s))), b - a @ s)
    square = s @ s.mT
    torch.testing.assert_close(dense(matrices.symmetric_matmul(form(square), form(square))), square @ square)
    torch.testing.assert_close(dense(matrices.symmetric_part(form(s))), (s + s.mT) / 2)
    torch.testing.assert_close(values(matrices.trace(form(s))), s.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(values(matrices.squares(form(a))), a.square().sum((1, 2)))
    torch.testing.assert_close(dense(matrices.add_identity(form(s), 2.0, -0.5)), 2 * torch.eye(3) - s / 2)
    torch.testing.assert_close(dense(matrices.combine(form(a), 2.0, form(b), -0.5)), 2 * a - b / 2)


def test_diagonal_matrices_are_compact_as_tensors_and_multiply_as_full_ones(form):
    a, s = torch.randn(7, 5, 3), torch.randn(7, 3, 3)
    full = torch.diag_embed(s.diagonal(dim1=1, dim2=2))
    row = matrices.diagonal(form(s))
    torch.testing.assert_close(dense(row, 3), full)
    torch.testing.assert_close(dense(matrices.matmul(form(a), row)), a @ full)
    value = matrices.trace(form(s))
    torch.testing.assert_close(
        dense(matrices.matmul(form(a), matrices.multiple(value, form(s)))), a * values(value)[:, None, None]
    )


def test_a_mask_chooses_matrix_by_matrix(form):
    a, b = torch.randn(4, 3, 3), torch.randn(4, 3, 3)
    mask = torch.tensor([True, False, True, False])
    chosen = matrices.where(mask if form is planes else mask[:, None, None], form(a), form(b))
    torch.testing.assert_close(dense(chosen), torch.where(mask[:, None, None], a, b))
    assert matrices.where(True, 1.0, 2.0) == 1.0


def test_a_product_keeps_the_order_in_which_a_block_lies_in_memory():
    rows = torch.randn(4, 2, 6).mT
    assert matrices.matmul(rows, torch.randn(4, 2, 2)).stride() == rows.stride()
    assert matrices.subtract_product(rows, rows, torch.randn(4, 2, 2)).stride() == rows.stride()


def test_zeros_that_are_known_cost_no_operation():
    x = torch.ones(3)
    product = Planes([[x, 0.0], [0.0, x]]) @ Planes([[x, 0.0], [0.0, x]])
    assert product.rows[0][1] == 0.0
    assert isinstance(product.rows[0][1], float)

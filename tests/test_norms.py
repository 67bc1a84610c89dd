import math

import pytest
import torch

from lightning_fgsgd import norms
from lightning_fgsgd.manifolds import get_manifold
from lightning_fgsgd.norms import component_norms, geometric_means, group_norms
from tests.manifolds.strategies import CONSTRAINED


def test_component_norms_are_those_of_torch():
    x = torch.randn(7, 6, 3, dtype=torch.float64)
    norms = component_norms(x)
    torch.testing.assert_close(norms.spectral, torch.linalg.matrix_norm(x, ord=2))
    torch.testing.assert_close(norms.frobenius, torch.linalg.matrix_norm(x))
    torch.testing.assert_close(norms.l21, x.norm(dim=1).sum(1))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_spectral_norms_are_exact_where_singular_values_coincide_or_vanish(p, scale):
    # Up to 3 columns from the characteristic polynomial, whose roots are worst known where they coincide.
    q = torch.linalg.qr(torch.randn(500, 9, p, dtype=torch.float64)).Q
    r = torch.linalg.qr(torch.randn(500, p, p, dtype=torch.float64)).Q
    alike = [1, 1, 1, 1], [1, 1, 0.2, 0.1], [1, 1 - 1e-9, 0.5, 0.5], [1, 0.3, 0.3, 0.3]
    for singular in (*alike, [1, 0, 0, 0], [0, 0, 0, 0]):
        x = scale * q @ torch.diag(torch.tensor(singular[:p], dtype=torch.float64)) @ r
        exact = torch.full((500,), scale * singular[0], dtype=torch.float64)
        torch.testing.assert_close(component_norms(x).spectral, exact, rtol=1e-7, atol=0)
        single = component_norms(x.float()).spectral
        torch.testing.assert_close(single, exact.float(), rtol=1e-6, atol=0)


def test_on_blocks_the_sum_of_columns_is_the_sum_over_the_rows_of_the_layers_weight():
    weight = torch.randn(8, 20, dtype=torch.float64)
    block = weight.reshape(2, 4, 20).mT
    torch.testing.assert_close(component_norms(block).l21.sum(), weight.norm(dim=1).sum())


@pytest.mark.parametrize("n", [3, 64, 65, 400])
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "of rank one"])
def test_group_norms_are_those_of_the_concatenation(n, kind):
    # Up to n = 64 exact, above by Lanczos' method.
    p = min(n, 4)
    x = torch.randn(30, n, p, dtype=torch.float64)
    if kind == "decaying":
        x = x * torch.logspace(0, -3, n, dtype=torch.float64)[:, None]
    if kind == "of rank one":
        x = x[:1, :, :1].expand(30, n, p) * torch.rand(30, 1, p, dtype=torch.float64)
    group = torch.randint(3, (30,))
    norms = group_norms(x, group)
    for g in range(3):
        side_by_side = torch.cat(list(x[group == g]), dim=1)
        assert math.isclose(norms.frobenius[g], side_by_side.norm())
        assert math.isclose(norms.l21[g], side_by_side.norm(dim=0).sum())
        assert math.isclose(norms.spectral[g], torch.linalg.matrix_norm(side_by_side, ord=2), rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(90, 2048, 16), (90, 768, 16), (320, 4096, 4), (1200, 500, 1)])
def test_lanczos_never_overstates_a_spectral_norm_and_misses_less_than_one_percent(shape):
    # In float32, where a basis that is not kept orthogonal brings values back that are found already.
    x, group = torch.randn(shape), torch.arange(shape[0]) % 3
    found = group_norms(x, group).spectral
    exact = torch.stack([torch.linalg.svdvals(torch.cat(list(x[group == g].double()), dim=1))[0] for g in range(3)])
    assert (found <= exact * (1 + 1e-5)).all()
    assert (found >= exact * 0.99).all()


@pytest.mark.parametrize("shape", [(64, 2048, 16), (40, 768, 16), (64, 100, 16), (20, 4096, 4), (6, 300, 1)])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_norms_of_large_groups_are_exact_where_their_rows_or_columns_are_few(shape, groups):
    # Groups of different sizes, in no order.
    x, group = (
        torch.randn(shape),
        (torch.arange(shape[0]) % (groups + 1)).clamp_max(groups - 1)[torch.randperm(shape[0])],
    )
    exact = [torch.linalg.matrix_norm(torch.cat(list(x[group == g].double()), 1), ord=2) for g in range(groups)]
    torch.testing.assert_close(group_norms(x, group).spectral, torch.stack(exact).float(), rtol=3e-5, atol=0)


def test_one_group_that_is_much_larger_than_the_others_does_not_take_memory_for_each(monkeypatch):
    monkeypatch.setattr(norms, "_side_by_side_spectral", None)
    group_norms(torch.randn(600, 70, 1), torch.arange(600).sub(300).clamp_min(0))


@pytest.mark.parametrize(("n", "p"), [(5, 2), (100, 2), (400, 200)])
def test_zero_groups_and_groups_with_nan_have_their_norm_and_leave_the_others_alone(n, p):
    # By the Gram matrix of a group's rows, of its columns, and by Lanczos' method.
    x, group = torch.randn(6, n, p), torch.tensor([0, 0, 1, 1, 2, 2])
    whole = group_norms(x, group)
    x[2:4] = 0
    x[5, 1, 1] = math.nan
    norms = group_norms(x, group)
    for norm, before in zip(norms, whole, strict=True):
        torch.testing.assert_close(norm[0], before[0])
        assert norm[1] == 0
        assert norm[2].isnan()
    assert component_norms(x).spectral.isnan().tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("name", CONSTRAINED)
def test_remark_1_geometric_means_are_lower_bounds_of_the_groups_norms(name):
    # Of the norms of components of one manifold, of any scale.
    x = get_manifold(name).random(60, 7, 3, dtype=torch.float64) * torch.rand(60, 1, 1, dtype=torch.float64)
    group = torch.randint(4, (60,))
    norms = component_norms(x)
    means = geometric_means(norms, group)
    for norm, mean, of_components in zip(group_norms(x, group, norms), means, norms, strict=True):
        assert (norm >= mean).all()
        for g in range(4):
            parts = of_components[group == g]
            assert math.isclose(mean[g], parts.prod() ** (1 / len(parts)), rel_tol=1e-9)


def test_a_group_with_a_zero_component_has_the_geometric_mean_zero():
    x = torch.randn(4, 3, 2)
    x[1] = 0
    means = geometric_means(component_norms(x), torch.tensor([0, 0, 1, 1]))
    assert all(mean[0] == 0 and mean[1] > 0 for mean in means)


def test_the_norm_of_a_group_is_at_least_that_of_each_of_its_components():
    torch.manual_seed(0)
    components = torch.randn(12, 1500, 128) * 0.02
    group = torch.arange(12)
    assert (group_norms(components, group).spectral >= component_norms(components).spectral).all()


@pytest.mark.parametrize("n", [9, 400])
def test_autocast_does_not_round_norms(n):
    torch.manual_seed(0)
    components, group = torch.randn(6, n, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    expected = component_norms(components), group_norms(components, group)
    with torch.autocast("cpu", torch.bfloat16):
        found = component_norms(components), group_norms(components, group)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

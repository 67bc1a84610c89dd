import math

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.bounds import LayerNorms, Norms, bai_yin, layer_norms, table1, table2
from lightning_fgsgd.manifolds import get_manifold
from lightning_fgsgd.norms import component_norms, group_norms
from lightning_fgsgd.scaling import gamma


@pytest.mark.parametrize("manifold", ["sphere", "oblique", "stiefel"])
def test_table_2_agrees_with_the_definition_in_its_first_two_columns(manifold):
    q = get_manifold(manifold).random(20, 5, 3, dtype=torch.float64)
    norms = component_norms(q)
    spectral, frobenius, l21 = table2(manifold, 3)
    if spectral is not None:
        torch.testing.assert_close(norms.spectral, torch.full_like(norms.spectral, spectral))
    torch.testing.assert_close(norms.frobenius, torch.full_like(norms.frobenius, frobenius))
    assert (norms.l21 > l21).all()  # the third column is not the definition's, which is larger
    if manifold != "sphere":
        torch.testing.assert_close(norms.l21, torch.full_like(norms.l21, 3.0))
    else:
        assert (norms.l21 <= 3**0.5).all()


def test_table_2_has_no_entry_for_other_manifolds():
    with pytest.raises(ValueError, match="has no entry for 'euclidean'"):
        table2("euclidean", 3)


def placed(layer, radius=None, **settings):
    """``layer`` on its manifolds, at R = γ unless told otherwise: its POM, its weight and γ."""
    optimizer = FGSGD(pom_param_groups(layer, **{"start": "random", **settings}), lr=0.1)
    (pom,) = optimizer.poms.values()
    size = gamma(pom.cutting)
    optimizer.rescale(layer.weight, torch.full_like(pom.radius, size if radius is None else radius))
    return pom, layer.weight, size


@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 24, 3), nn.Conv2d(4, 6, 5), nn.Conv2d(6, 6, 7, groups=6)])
def test_proposition_1_holds_for_every_kernel_at_gamma(layer, scheme):
    norms = layer_norms(*placed(layer, scheme=scheme))
    checks = norms.checks()
    assert checks["prop1_components"] == checks["remark1"] == checks["bai_yin"] == 1
    # And less, for a k x k kernel: √(B/A) / √(C + D).
    p = layer.kernel_size[0]
    assert norms.components.l21.max() <= (layer.in_channels // layer.groups + layer.out_channels) ** -0.5 * (1 + 1e-5)
    assert (
        norms.components.frobenius.max()
        <= (p * (layer.in_channels // layer.groups + layer.out_channels)) ** -0.5 * 1.00001
    )


def test_proposition_1_fails_for_wide_groups_by_the_usual_definition_and_the_check_says_so():
    # The example of the documentation: C = D = 512, PIO in three groups, Xavier reading.
    pom, weight, size = placed(nn.Conv2d(512, 512, 3, bias=False), manifolds=["stiefel", "oblique", "sphere"])
    norms = layer_norms(pom, weight, size)
    stiefel = pom.sets.group[pom.sets.manifold == 0][0]
    members = int((pom.sets.group == stiefel).sum())
    assert norms.groups.frobenius[stiefel] == pytest.approx((members * 3) ** 0.5 * size, rel=1e-4)
    assert norms.groups.frobenius.max() == pytest.approx(5.3, abs=0.05)
    checks = norms.checks()
    assert checks["prop1_groups"] == 0
    assert checks["prop1_components"] == checks["remark1"] == 1
    # The paper's own argument speaks of the geometric mean, and that is at most 1.
    assert all(mean.max() <= 1 for mean in norms.means)


def test_proposition_1_needs_blocks_that_are_narrow_beside_the_layer():
    # The ℓ2→1 norm of p orthonormal neurons at R = γ is p / √(C + D).
    for block, holds in ((8, 1.0), (16, 0.0)):
        norms = layer_norms(*placed(nn.Linear(64, 64), block_size=block, manifolds=["stiefel"]))
        assert norms.components.l21.max() == pytest.approx(block / 128**0.5, rel=1e-4)
        assert norms.checks()["prop1_components"] == holds


def test_the_check_of_bai_yin_sees_a_weight_that_is_too_large():
    pom, weight, size = placed(nn.Conv2d(8, 24, 3), manifolds=["stiefel", "sphere"])
    weight.data[0, 0] *= 2 / size**2
    found = layer_norms(pom, weight, size)
    assert found.checks()["bai_yin"] == pytest.approx(1 - 1 / 192)
    assert found.checks()["prop1_components"] == pytest.approx(1 - 1 / 192)


@pytest.mark.parametrize("manifold", ["sphere", "oblique", "stiefel"])
def test_bai_yin_gives_the_spectral_norm_of_large_groups_of_uniform_components(manifold):
    n, p, count = 24, 12, 300
    q = get_manifold(manifold).random(count, n, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectral = group_norms(q, torch.zeros(count, dtype=torch.long)).spectral.item()
    variance = 1 / (n * p) if manifold == "sphere" else 1 / n
    assert spectral == pytest.approx(bai_yin(n, p * count, variance), rel=0.02)


def test_table_2_stands_beside_the_norms_where_it_has_entries():
    names = ["sphere", "stiefel", "euclidean"]
    layer = nn.Conv2d(6, 9, 3)
    pom, weight, size = placed(layer, 0.5, manifolds=names)
    norms = layer_norms(pom, weight, size)
    kind = pom.sets.manifold
    assert norms.table2.spectral[kind == 0].isnan().all()
    torch.testing.assert_close(norms.table2.spectral[kind == 1], torch.full((18,), 0.5))
    torch.testing.assert_close(norms.table2.frobenius[kind == 1], norms.components.frobenius[kind == 1])
    torch.testing.assert_close(norms.table2.l21[kind == 1], torch.full((18,), 0.5 * 3**0.25))
    assert all(entries[kind == 2].isnan().all() for entries in norms.table2)
    assert norms.largest()["table2_frobenius"] == pytest.approx(0.5 * 3**0.5)
    preserved, weight, size = placed(nn.Conv2d(6, 9, 3), 1.0, start="preserve")
    assert "table2_frobenius" not in layer_norms(preserved, weight, size).largest()


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


def test_the_bounds_of_a_network_with_a_layer_of_zeros_are_zero():
    layers = [Norms(*(torch.ones(2) for _ in range(3))), Norms(*(torch.tensor([0.0, 1.0]) for _ in range(3)))]
    assert table1(layers, samples=1, width=1) == (-math.inf,) * 3


def test_the_share_of_remark_1_is_of_all_groups():
    # A group below the mean in one norm alone does not meet Remark 1.
    one = torch.ones(2)
    norms = Norms(one, one, one)
    groups = Norms(torch.tensor([0.5, 1.0]), one, one)
    assert LayerNorms(norms, groups, norms, norms, 0.1).checks()["remark1"] == 0.5

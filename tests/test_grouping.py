from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from lightning_fgsgd.components import cutting_of
from lightning_fgsgd.grouping import draw_index_sets, pool_size

THREE = ("sphere", "stiefel", "oblique")


def draw(layer, scheme, manifolds=THREE, groups=None, seed=0, kind="kernel", block_size=16):
    cutting = cutting_of(layer, kind, block_size)
    return cutting, draw_index_sets(cutting, scheme, manifolds, groups, generator=torch.Generator().manual_seed(seed))


def members(sets):
    return [(sets.group == g).nonzero()[:, 0].tolist() for g in range(sets.num_groups)]


def test_each_scheme_on_six_kernels_of_four_channels_and_three_manifolds():
    # 3x3 kernels, C = 4, D = 6, three manifolds: PI 4·3 POMs of 2 kernels, PO 6·3 of 1 or 2, PIO 3 of 8.
    layer = nn.Conv2d(4, 6, 3)
    sizes = {scheme: sorted(map(len, members(draw(layer, scheme)[1]))) for scheme in ("pi", "po", "pio")}
    assert sizes == {"pi": [2] * 12, "po": [1] * 12 + [2] * 6, "pio": [8, 8, 8]}


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 12, 3, groups=3), nn.ConvTranspose2d(6, 4, 3)])
def test_groups_partition_each_pool_and_have_one_manifold_each(layer):
    for scheme in ("pi", "po", "pio"):
        cutting, sets = draw(layer, scheme)
        channel = {"pi": cutting.input_channel(), "po": cutting.output_channel(), "pio": torch.zeros(cutting.count)}[
            scheme
        ]
        groups = members(sets)
        assert sorted(i for group in groups for i in group) == list(range(cutting.count))
        for group in groups:
            assert len(set(sets.manifold[group].tolist())) == 1
            assert len(set(channel[group].tolist())) == 1
        for pool in channel.unique():
            counts = Counter(sets.group[channel == pool].tolist())
            assert len(counts) == min(3, pool_size(cutting, scheme))
            assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
def test_on_blocks_every_scheme_draws_over_the_layer(scheme):
    cutting, sets = draw(nn.Linear(32, 64), scheme, block_size=8)
    assert cutting.count == 8
    assert sorted(map(len, members(sets))) == [2, 3, 3]


def test_a_small_pool_gets_one_group_a_component_with_manifolds_drawn_without_replacement():
    _, sets = draw(nn.Conv2d(2, 50, 3), "po")  # two kernels an output channel
    assert sets.num_groups == 100
    for first, second in sets.manifold.reshape(50, 2).tolist():
        assert first != second
    assert len(set(sets.manifold.tolist())) == 3


def test_fewer_groups_than_manifolds_give_mixed_products():
    _, sets = draw(nn.Conv2d(4, 6, 3), "pio", groups=2)
    for group in members(sets):
        counts = Counter(sets.manifold[group].tolist())
        assert sorted(counts.values()) == [4, 4, 4]


def test_more_groups_than_manifolds_share_the_manifolds_evenly():
    _, sets = draw(nn.Conv2d(4, 6, 3), "pio", groups=7)
    of_group = Counter(sets.manifold[group[0]].item() for group in members(sets))
    assert sorted(of_group.values()) == [2, 2, 3]


@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
def test_each_component_can_be_a_group_of_its_own(scheme):
    layer = nn.Conv2d(4, 6, 3)
    cutting, sets = draw(layer, scheme, groups="each")
    assert sorted(members(sets)) == [[i] for i in range(24)]
    most = pool_size(cutting, scheme)
    _, counted = draw(layer, scheme, groups=most)
    assert torch.equal(sets.group, counted.group)
    assert torch.equal(sets.manifold, counted.manifold)


def test_the_seed_decides():
    layer = nn.Conv2d(8, 8, 3)
    a, b, c = (draw(layer, "pio", seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(a.group, b.group)
    assert torch.equal(a.manifold, b.manifold)
    assert not torch.equal(a.group, c.group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 1])
def test_a_default_dtype_does_not_change_what_is_drawn(dtype, groups):
    layer = nn.Conv2d(8, 8, 3)
    expected = draw(layer, "pio", groups=groups)[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = draw(layer, "pio", groups=groups)[1]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.group, expected.group)
    assert torch.equal(found.manifold, expected.manifold)


def test_draws_are_hypergeometric():
    # 4 of 12 components on the first manifold, always: without replacement. Each component is equally likely to be, and
    # any two of them are so together with probability (4·3)/(12·11).
    layer = nn.Conv2d(3, 4, 3)
    hits = torch.stack([(draw(layer, "pio", seed=seed)[1].manifold == 0) for seed in range(3000)]).double()
    assert (hits.sum(1) == 4).all()
    assert chisquare(hits.sum(0).numpy()).pvalue > 1e-3
    together = (hits.T @ hits)[torch.triu_indices(12, 12, 1).unbind()] / 3000
    assert (together - 12 / 132).abs().max() < 0.02


def test_the_remainder_is_drawn_too():
    # 4 components for 3 groups: which manifold gets two is chance.
    layer = nn.Conv2d(1, 4, 3)
    most = Counter(
        Counter(draw(layer, "pio", seed=seed)[1].manifold.tolist()).most_common(1)[0][0] for seed in range(600)
    )
    assert chisquare([most[i] for i in range(3)]).pvalue > 1e-3


def test_more_groups_than_a_byte_counts_are_told_apart():
    layer = nn.Conv2d(1, 257, 3)
    sets = draw_index_sets(cutting_of(layer), "pio", ("sphere",), "each", generator=torch.Generator().manual_seed(0))
    assert sorted(sets.group.tolist()) == list(range(257))


def test_which_manifold_a_group_has_least_of_is_drawn():
    # Five components of a group on three manifolds: which one gets but one is drawn, group by group.
    least = set()
    for seed in range(20):
        sets = draw_index_sets(
            cutting_of(nn.Conv2d(2, 5, 3)),
            "pio",
            ("sphere", "oblique", "stiefel"),
            2,
            generator=torch.Generator().manual_seed(seed),
        )
        for g in (0, 1):
            least.add(int(sets.manifold[sets.group == g].bincount(minlength=3).argmin()))
    assert least == {0, 1, 2}

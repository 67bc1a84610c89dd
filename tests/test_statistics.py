from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fgsgd import FeatureStd
from lightning_fgsgd.statistics import merge_moments, own_part


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 60), max_size=8), offset=st.sampled_from([0.0, 1.0, 1e4]))
def test_any_split_into_batches_gives_the_deviation_of_all_at_once(cuts, offset):
    x = torch.randn(60, 5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * torch.tensor([1.0, 0.1, 5.0, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1) + offset).float()
    metric = FeatureStd(5)
    edges = [0, *sorted(cuts), 60]
    for a, b in pairwise(edges):
        metric.update(x[a:b])
    expected = x.double().transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_read_in_full(dtype, mean):
    # At a mean of 1e4 these formats keep steps of 8 and of 64: what they hold is what must be measured.
    x = ((1 + mean / 100) * torch.randn(200, 4, 7, 7) + mean).to(dtype)
    metric = FeatureStd(4)
    for part in x.chunk(7):
        metric.update(part)
    torch.testing.assert_close(
        metric.compute(), x.double().transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-6, atol=0
    )


def test_a_first_value_far_from_the_others_does_not_spoil_the_precision():
    # It is what is taken off each channel before the moments are computed.
    x = torch.randn(64, 3, 8, 8) * torch.tensor([1.0, 1e-2, 10.0]).view(3, 1, 1) + 1e4
    x[0, :, 0, 0] = torch.tensor([0.0, -1e4, 1e6])
    metric = FeatureStd(3)
    for part in x.chunk(5):
        metric.update(part)
    torch.testing.assert_close(
        metric.compute(), x.double().transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, 1e5])
@pytest.mark.parametrize("shape", [(2**18, 3), (2**20 + 5, 2), (64, 196, 24), (3, 1, 8)])
def test_many_features_with_channels_last_are_read_precisely(shape, mean):
    # The float32 sums that read them lose more with every number that they add.
    x = torch.randn(shape).relu() * torch.linspace(0.5, 2, shape[-1]) + mean
    metric = FeatureStd(shape[-1])
    metric.update(x, dim=-1)
    expected = x.double().flatten(0, -2)
    torch.testing.assert_close(metric.moments[1], expected.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metric.compute(), expected.std(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_channels_that_never_change_have_a_deviation_of_zero(value):
    x = torch.randn(50, 6, 3)
    x[..., 1] = value
    metric = FeatureStd(3)
    metric.update(x, dim=-1)
    assert metric.compute()[1] == 0
    expected = x.double().flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(metric.compute()[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0)


def test_merging_two_metrics_equals_reading_both_streams():
    x = torch.randn(40, 3, 5)
    parts = [FeatureStd(3) for _ in range(3)]
    for metric, part in zip(parts, x.split([7, 20, 13]), strict=True):
        metric.update(part)
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    torch.testing.assert_close(parts[0].compute(), x.double().transpose(0, 1).flatten(1).std(1, correction=0))


def test_channels_can_lie_last_and_be_pooled():
    x = torch.randn(9, 4, 6)
    last = FeatureStd(6)
    last.update(x, dim=-1)
    torch.testing.assert_close(last.compute(), x.double().flatten(0, 1).std(0, correction=0))
    pooled = FeatureStd(6, pools=2)
    pooled.update(x, dim=-1)
    expected = torch.stack([x[..., :3].double().std(correction=0), x[..., 3:].double().std(correction=0)])
    torch.testing.assert_close(pooled.compute(), expected)


def test_reset_forgets_and_an_empty_batch_changes_nothing():
    metric = FeatureStd(2)
    metric.update(torch.randn(5, 2))
    metric.reset()
    x = torch.randn(8, 2)
    metric.update(x)
    metric.update(x[:0])
    torch.testing.assert_close(metric.compute(), x.double().std(0, correction=0))


def test_nothing_is_read_back_to_the_host_while_updating():
    # The meta device has no values: a read would raise.
    metric = FeatureStd(3).to("meta")
    metric.update(torch.randn(4, 3, 5, 5, device="meta"))
    assert metric.moments.device.type == "meta"


def test_one_vector_is_a_batch_of_one_and_images_may_be_bytes():
    vectors, images = torch.randn(5, 3), torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    one, by_bytes = FeatureStd(3), FeatureStd(3)
    for x in vectors:
        one.update(x, dim=-1)
    by_bytes.update(images)
    torch.testing.assert_close(one.compute(), vectors.double().std(0, correction=0))
    torch.testing.assert_close(by_bytes.compute(), images.double().transpose(0, 1).flatten(1).std(1, correction=0))


@pytest.mark.parametrize("pools", [0, 4])
def test_pools_that_do_not_divide_the_channels_are_refused(pools):
    with pytest.raises(ValueError, match=f"pools: {pools} does not divide 6 channels"):
        FeatureStd(6, pools)


def test_one_process_goes_on_with_the_moments_of_all():
    moments = torch.stack([torch.tensor([[n], [m], [s]], dtype=torch.float64) for n, m, s in ((2, 1, 3), (6, 5, 7))])
    assert torch.equal(own_part(moments), merge_moments(moments))
    assert torch.equal(own_part(moments[:1]), moments[0])

import pytest
import torch
from torch import nn

from lightning_fgsgd.components import cutting_of

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3),
    "wide kernel": nn.Conv2d(4, 6, (2, 5)),
    "row": nn.Conv2d(4, 6, (1, 7)),
    "depthwise": nn.Conv2d(6, 6, 5, groups=6),
    "grouped": nn.Conv2d(6, 9, 3, groups=3),
    "pointwise": nn.Conv2d(6, 10, 1),
    "conv1d": nn.Conv1d(4, 6, 3),
    "conv3d": nn.Conv3d(2, 3, (2, 3, 4)),
    "transposed": nn.ConvTranspose2d(6, 4, 3, groups=2),
    "linear": nn.Linear(12, 10),
}


@pytest.mark.parametrize("kind", ["kernel", "filter"])
@pytest.mark.parametrize("name", LAYERS)
def test_join_undoes_cut_for_every_layer_and_memory_format(name, kind):
    cutting = cutting_of(LAYERS[name], kind, block_size=4)
    weight = LAYERS[name].weight.detach()
    variants = [weight, weight.transpose(0, 1).contiguous().transpose(0, 1)]
    if weight.ndim == 4:
        variants.append(weight.contiguous(memory_format=torch.channels_last))
    for variant in variants:
        components = cutting.cut(variant)
        assert components.shape == (cutting.count, cutting.n, cutting.p)
        assert cutting.n >= cutting.p
        assert torch.equal(cutting.join(components), weight)


def test_a_kernel_is_the_slice_of_its_two_channels():
    conv = LAYERS["grouped"]
    cutting = cutting_of(conv)
    inputs, outputs = cutting.input_channel(), cutting.output_channel()
    for i, component in enumerate(cutting.cut(conv.weight.detach())):
        d, c = outputs[i].item(), inputs[i].item()
        # Probe the layer itself: output d answers to input c through this kernel alone.
        x = torch.zeros(1, 6, 3, 3)
        x[0, c] = torch.randn(3, 3)
        expected = (x[0, c] * component).sum() + conv.bias[d]
        torch.testing.assert_close(conv(x)[0, d, 0, 0], expected)


def test_a_kernel_of_a_transposed_convolution_knows_its_channels():
    conv = LAYERS["transposed"]
    cutting = cutting_of(conv)
    inputs, outputs = cutting.input_channel(), cutting.output_channel()
    for i, component in enumerate(cutting.cut(conv.weight.detach())):
        x = torch.zeros(1, 6, 1, 1)
        x[0, inputs[i]] = 1
        torch.testing.assert_close(conv(x)[0, outputs[i]] - conv.bias[outputs[i]], component)


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed", "pointwise", "linear"])
def test_a_block_column_is_all_that_one_output_neuron_reads(name):
    layer = LAYERS[name]
    cutting = cutting_of(layer, "filter", block_size=2)
    columns = cutting.cut(layer.weight.detach()).mT.reshape(cutting.out_channels, cutting.fan_in)
    # A weight belongs to output d when it gets a gradient from output d.
    for d in range(cutting.out_channels):
        layer.weight.grad = None
        x = torch.ones(1, cutting.in_channels, *(9,) * len(cutting.kernel))
        y = layer(x)
        y.movedim(1, 0)[d].sum().backward()
        mine = layer.weight.detach()[layer.weight.grad != 0]
        assert sorted(mine.tolist()) == sorted(columns[d].tolist())


@pytest.mark.parametrize(
    ("layer", "block_size", "n", "p"),
    [
        (nn.Linear(64, 48), 16, 64, 16),
        (nn.Linear(64, 47), 16, 64, 1),  # 47 is a prime
        (nn.Linear(64, 45), 16, 64, 15),
        (nn.Linear(8, 64), 16, 8, 8),  # p is at most n
        (nn.Linear(64, 48), 1, 64, 1),
        (nn.Conv2d(32, 32, 1, groups=4), 16, 8, 8),  # at most the outputs of a conv group
    ],
)
def test_a_block_is_the_largest_divisor_that_fits(layer, block_size, n, p):
    cutting = cutting_of(layer, "kernel", block_size)
    assert (cutting.kind, cutting.n, cutting.p) == ("filter", n, p)


def test_wide_kernels_are_transposed_so_that_n_is_at_least_p():
    assert (cutting_of(LAYERS["wide kernel"]).n, cutting_of(LAYERS["wide kernel"]).p) == (5, 2)
    assert (cutting_of(LAYERS["row"]).n, cutting_of(LAYERS["row"]).p) == (7, 1)


def test_other_layers_are_not_cut():
    assert cutting_of(nn.BatchNorm2d(3)) is None
    assert cutting_of(nn.Embedding(3, 4)) is None


def test_a_layer_without_weights_is_not_cut():
    assert cutting_of(nn.Linear(16, 0)) is None
    assert cutting_of(nn.Linear(0, 4)) is None


def test_a_block_of_an_attentions_projection_is_of_queries_of_keys_or_of_values():
    cutting = cutting_of(nn.MultiheadAttention(20, 4), attr="in_proj_weight")
    assert (cutting.p, cutting.count) == (10, 6)


@pytest.mark.parametrize("name", ["weight_hh_l0_v", "weight_hh_l0_orig", "weight_hh"])
def test_what_a_recurrent_layer_computes_its_weights_from_is_not_cut(name):
    layer = nn.LSTM(4, 3)
    layer.register_parameter(name, nn.Parameter(torch.randn(12, 3)))
    assert (cutting_of(layer, attr=name) is None) == (name != "weight_hh")


def test_a_projection_of_an_lstm_has_blocks_of_its_own_size():
    lstm = nn.LSTM(12, 16, proj_size=6)
    cut = cutting_of(lstm, block_size=16, attr="weight_hr_l0")
    assert (cut.n, cut.p) == (16, 6)

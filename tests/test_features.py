"""λ is read for every weight, however the model uses it: against hooks and loops written here."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fgsgd import FGSGD, FeatureStd, pom_param_groups
from lightning_fgsgd.features import FeatureReader


def read(model, *batches, backward=False, **settings):
    """λ over the fan-in (or by channel) of every weight that was read, by name, and the number of features read."""
    poms = FGSGD(pom_param_groups(model, exclude=(), **settings), lr=0.1).poms
    metrics = {p: FeatureStd(pom.cutting.in_channels) for p, pom in poms.items()}
    reader = FeatureReader(
        model, poms, lambda p, x, dim: metrics[p].update(x, dim=dim), lambda p, x: None, lambda norm: None
    )
    for batch in batches:
        reader.start()
        out = model(*batch) if isinstance(batch, tuple) else model(batch)
        if backward:
            reader.stop()
            out.sum().backward()
    reader.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return {
        poms[p].name: (metric.compute().float(), metric.moments[0, 0].item())
        for p, metric in metrics.items()
        if metric.update_called
    }


def std(x, dim=-1):
    """To be compared as precisely as float32 features allow."""
    return x.detach().double().movedim(dim, 0).flatten(1).std(1, correction=0).float()


class Functional(nn.Module):
    """Weights whose layer is never called, and weights that have no layer."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.bias = nn.Parameter(torch.randn(12))
        self.weight = nn.Parameter(torch.randn(8, 12))
        self.mix_weight = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x):
        x = F.linear(x, weight=self.qkv.weight, bias=self.bias)
        x = torch.relu(F.linear(torch.tanh(x), self.weight))
        return F.conv2d(x.reshape(-1, 4, 4, 4), self.mix_weight)


def test_weights_that_are_used_through_functions_are_read():
    model, x = Functional(), torch.randn(10, 8, 6) * torch.linspace(1, 3, 6)
    found = read(model, x[:4], x[4:])
    y = torch.tanh(F.linear(x, model.qkv.weight, model.bias))
    z = torch.relu(F.linear(y, model.weight)).reshape(-1, 4, 4, 4)
    assert set(found) == {"qkv.weight", "weight", "mix_weight"}
    torch.testing.assert_close(found["qkv.weight"][0], std(x))
    torch.testing.assert_close(found["weight"][0], std(y))
    torch.testing.assert_close(found["mix_weight"][0], std(z, 1))


def test_watching_functions_stops_where_every_layer_was_called():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    poms = FGSGD(pom_param_groups(model, exclude=()), lr=0.1).poms
    reader = FeatureReader(model, poms, lambda *seen: None, lambda *seen: None, lambda norm: None)
    watched = []
    for _ in range(3):
        reader.start()
        watched.append(reader._functions is not None)
        model(torch.randn(2, 3, 6, 6))
        reader.stop()
    reader.close()
    assert watched == [True, False, False]
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_read_by_channel_in_any_memory_format(memory_format):
    model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
    x = (torch.randn(5, 3, 7, 7) * torch.tensor([1.0, 2, 3]).view(3, 1, 1)).to(memory_format=memory_format)
    torch.testing.assert_close(read(model, x)["weight"][0], std(x, 1))


def test_layers_that_are_called_several_times_are_read_each_time():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(3 * self.layer(x) + 7)

    model, x = Shared(), torch.randn(9, 4)
    lam, count = read(model, x)["layer.weight"]
    torch.testing.assert_close(lam, std(torch.cat([x, 3 * model.layer(x) + 7])))
    assert count == 18


def test_checkpointed_blocks_are_read_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    x = torch.randn(9, 4)
    lam, count = read(Checkpointed(), x, backward=True)["layer.weight"]
    torch.testing.assert_close(lam, std(x))
    assert count == 9


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "cell"), [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_recurrent_layers_show_their_inputs_and_their_hidden_states(kind, cell, batch_first):
    layer = kind(3, 5, bidirectional=True, batch_first=batch_first)
    x = torch.randn(7, 6, 3)  # (time, batch, features)
    found = read(layer, x.transpose(0, 1) if batch_first else x)
    for suffix, inputs in (("l0", x), ("l0_reverse", x.flip(0))):
        loop = cell(3, 5)
        loop.load_state_dict({name: getattr(layer, f"{name}_{suffix}") for name in loop.state_dict()})
        state, hidden = None, [torch.zeros(6, 5)]
        for step in inputs:
            state = loop(step, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        torch.testing.assert_close(found[f"weight_ih_{suffix}"][0], std(x))
        torch.testing.assert_close(found[f"weight_hh_{suffix}"][0], std(torch.stack(hidden[:-1])))


def test_a_recurrent_cell_shows_its_input_and_its_state():
    cell, x, h, c = nn.LSTMCell(3, 5), torch.randn(8, 3), torch.randn(8, 5), torch.randn(8, 5)
    found = read(cell, (x, (h, c)))
    torch.testing.assert_close(found["weight_ih"][0], std(x))
    torch.testing.assert_close(found["weight_hh"][0], std(h))


def test_multi_head_attention_shows_the_input_of_its_projections():
    attention, x, context = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8), 2 * torch.randn(6, 3, 8)
    torch.testing.assert_close(read(attention, (x, x, x))["in_proj_weight"][0], std(x))
    joint = torch.cat([x, context, context]).flatten(0, 1)
    torch.testing.assert_close(read(attention, (x, context, context))["in_proj_weight"][0], std(joint))
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    k, v = torch.randn(6, 3, 4), torch.randn(6, 3, 6)
    found = read(separate, (x, k, v))
    for name, features in (("q", x), ("k", k), ("v", v)):
        torch.testing.assert_close(found[f"{name}_proj_weight"][0], std(features))


def test_naflex_inputs_are_read():
    pytest.importorskip("timm.models.naflexvit", reason="of a newer timm")
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2, num_classes=3)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    patches = torch.randn(2, 12, 768)
    inputs = {
        "patches": patches,
        "patch_coord": torch.stack([rows.flatten(), columns.flatten()], -1).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 12, dtype=torch.bool),
    }
    found = read(model, inputs)
    torch.testing.assert_close(found["embeds.proj.weight"][0], std(patches))
    assert len(found) == 6  # patches, qkv, projection, two of the MLP, head


def test_reading_survives_an_error_in_the_model():
    class Failing(Functional):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("boom")

    model = Failing()
    poms = FGSGD(pom_param_groups(model), lr=0.1).poms
    reader = FeatureReader(model, poms, lambda *seen: None, lambda *seen: None, lambda norm: None)
    reader.start()
    with pytest.raises(RuntimeError, match="boom"):
        model(torch.randn(2, 8, 6))
    reader.close()
    reader.close()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_reading_does_not_change_what_the_model_computes():
    model, x = Functional(), torch.randn(3, 8, 6)
    plain = model(x)
    poms = FGSGD(pom_param_groups(model), lr=0.1).poms
    reader = FeatureReader(model, poms, lambda p, x, dim: None, lambda *seen: None, lambda norm: None)
    reader.start()
    watched = model(x)
    reader.close()
    assert torch.equal(plain, watched)
    watched.sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_recurrent_layer_is_read_with_the_states_that_it_is_given(kind, bidirectional, batch_first, by_name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(5, 4, num_layers=2, bidirectional=bidirectional, batch_first=batch_first)

        def forward(self, x, h):
            h = (h, torch.zeros_like(h)) if kind is nn.LSTM else h
            return self.layer(input=x, hx=h)[0] if by_name else self.layer(x, h)[0]

    torch.manual_seed(0)
    net, directions = Net(), 2 if bidirectional else 1
    x = torch.randn(3, 7, 5) if batch_first else torch.randn(7, 3, 5)
    h = torch.randn(2 * directions, 3, 4) * 9
    found = read(net, (x, h))
    torch.testing.assert_close(found["layer.weight_ih_l0"][0], std(x))
    hidden = net(x, h).detach()
    forward, *backward = (hidden.transpose(0, 1) if batch_first else hidden).split(4, -1)
    last = h[-directions:]  # of the last layer
    torch.testing.assert_close(found["layer.weight_hh_l1"][0], std(torch.cat([last[:1], forward[:-1]])))
    for own in backward:  # which begins at the end
        torch.testing.assert_close(found["layer.weight_hh_l1_reverse"][0], std(torch.cat([own[1:], last[1:]])))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_is_read_by_whatever_names_it_is_called(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(5, 4)

        def forward(self, x, h):
            return self.cell(input=x, hx=(h, torch.zeros_like(h)) if kind is nn.LSTMCell else h)

    x, h = torch.randn(9, 5), torch.randn(9, 4) * 3
    found = read(Net(), (x, h))
    torch.testing.assert_close(found["cell.weight_ih"][0], std(x))
    torch.testing.assert_close(found["cell.weight_hh"][0], std(h))


def test_the_pixels_that_each_weight_puts_out_are_told_however_it_is_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)
            self.linear = nn.Linear(5, 6)
            self.matrix_weight = nn.Parameter(torch.randn(8, 6))
            self.kernel_weight = nn.Parameter(torch.randn(5, 4, 3, 3))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.cell = nn.GRUCell(8, 8)

        def forward(self, x):
            x = F.conv2d(self.conv(x), self.kernel_weight).flatten(2).mT
            x = F.linear(self.linear(x), self.matrix_weight)
            x = self.lstm(input=self.attention(x, x, x)[0])[0]
            return self.cell(x[:, -1])

    net = Net()
    poms = FGSGD(pom_param_groups(net, exclude=()), lr=0.1).poms
    names = {p: name for name, p in net.named_parameters()}
    found = {}
    reader = FeatureReader(
        net, poms, lambda *seen: None, lambda p, count: found.update({names[p]: count}), lambda norm: None
    )
    reader.start()
    net(torch.randn(2, 3, 15, 15))
    reader.close()
    cell = dict.fromkeys(["cell.weight_ih", "cell.weight_hh"], 1)
    tokens = ["linear.weight", "matrix_weight", "attention.in_proj_weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert found == {"conv.weight": 49, "kernel_weight": 25, **dict.fromkeys(tokens, 25), **cell}


def test_what_is_called_in_vmap_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return torch.func.vmap(self.layer)(x)

    assert read(Net(), torch.randn(6, 4)) == {}


def test_compiled_code_runs_again_once_reading_is_over():
    model, compiled = nn.Linear(4, 4), []
    poms = FGSGD(pom_param_groups(model), lr=0.1).poms
    reader = FeatureReader(model, poms, lambda *seen: None, lambda *seen: None, lambda norm: None)
    reader.start()
    reader.close()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(compiled) == 1


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_sequences_of_a_nested_tensor_are_read_one_after_the_other(layout):
    sequences = [torch.randn(length, 8) for length in (3, 5, 2)]
    layer = nn.Linear(8, 4)
    features = torch.nested.nested_tensor(sequences, layout=layout)
    found = read(nn.Sequential(layer), features)
    expected = std(torch.cat(sequences))
    torch.testing.assert_close(found["0.weight"][0], expected)
    assert found["0.weight"][1] == 10
    poms, pixels = FGSGD(pom_param_groups(nn.Sequential(layer), exclude=()), lr=0.1).poms, []
    reader = FeatureReader(layer, poms, lambda *seen: None, lambda p, count: pixels.append(count), lambda norm: None)
    reader.start()
    layer(features)
    reader.close()
    assert pixels == [5]  # of the longest


class Decoder(nn.Linear):
    """Reads its input by a weight of its own, and by an encoder's, which it registers."""

    def __init__(self, encoder):
        super().__init__(encoder.out_features, encoder.in_features, bias=False)
        self.encoder_weight = encoder.weight

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(x, self.encoder_weight.T)


@pytest.mark.parametrize("decoder_first", [False, True])
@pytest.mark.parametrize("sizes", [(8, 16), (8, 8)])
def test_a_layer_that_registers_the_weight_of_another_does_not_read_its_own_input_for_it(sizes, decoder_first):
    encoder = nn.Linear(*sizes, bias=False)
    decoder = Decoder(encoder)
    model = nn.ModuleDict({"a": decoder, "b": encoder} if decoder_first else {"a": encoder, "b": decoder})
    model.forward = lambda x: 40 * decoder(30 * encoder(x))
    plan = pom_param_groups(model, exclude=()).plan
    assert {encoder.weight, decoder.weight} == plan.weights.keys()
    x = torch.randn(50, sizes[0])
    found = read(model, x)
    name = {p: n for n, p in model.named_parameters()}
    torch.testing.assert_close(found[name[encoder.weight]][0].squeeze(), std(x))
    torch.testing.assert_close(found[name[decoder.weight]][0].squeeze(), std(30 * encoder(x)))

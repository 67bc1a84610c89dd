"""Every parameter that stays Euclidean has a reason that a person can act on."""

import copy

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.plan import draw_plan
from lightning_fgsgd.reasons import why_euclidean


def reasons(model, **settings):
    return draw_plan(model, **settings).euclidean


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_layers_are_left_out_and_say_so(wrap):
    found = reasons(nn.ModuleDict({"free": nn.Linear(4, 4), "made": wrap(nn.Linear(4, 4))}))
    assert "free.weight" not in found
    originals = [name for name in found if "original" in name]
    assert originals
    assert all("its layer computes the weight from it" in found[name] for name in originals)
    assert found["made.bias"] == "bias"


@pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*is not supported in Python 3.14.*")
def test_modules_in_torchscript_are_left_out_and_say_so():
    scripted = torch.jit.script(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
    found = reasons(nn.ModuleDict({"free": nn.Linear(4, 4), "scripted": scripted}))
    assert "free.weight" not in found
    assert found["scripted.1.weight"] == "in TorchScript, which does not say what layer it is of"
    with pytest.raises(ValueError, match=r"has no weight to constrain \(.*TorchScript"):
        pom_param_groups(scripted)


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_layers_with_the_old_norm_hooks_are_left_out_and_say_so(wrap):
    found = reasons(wrap(nn.Linear(4, 4)))
    assert sum("its layer computes the weight from it" in reason for reason in found.values()) == len(found) - 1


class StdConvOfMine(timm.layers.StdConv2d):
    pass


@pytest.mark.parametrize(
    "layer", [timm.layers.StdConv2d, timm.layers.StdConv2dSame, timm.layers.ScaledStdConv2d, StdConvOfMine]
)
def test_standardised_layers_are_left_out_unless_asked_for(layer):
    model = nn.Sequential(layer(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert reasons(model)["0.weight"] == "its layer normalises the weight itself"
    assert "0.weight" not in reasons(model, normalized=True)
    assert reasons(model).get("0.gain", "gain") == "gain"


def test_a_constraint_on_a_standardised_weight_does_not_change_what_the_layer_computes():
    # Why such layers are left out: their output does not depend on the scale of the weight.
    layer, x = timm.layers.StdConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    before = layer(x)
    layer.weight.data *= 5
    torch.testing.assert_close(layer(x), before, atol=1e-3, rtol=1e-3)


def test_an_embedding_that_is_tied_to_a_linear_layer_is_an_embedding():
    model = nn.ModuleDict({"out": nn.Linear(6, 9, bias=False), "table": nn.Embedding(9, 6)})
    model["out"].weight = model["table"].weight
    assert reasons(model) == {"out.weight": "embedding"}


def test_weights_that_are_zero_have_no_geometry_to_preserve():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    assert reasons(model)["1.weight"] == "zero at the start, so there is nothing to preserve"
    assert "1.weight" not in reasons(model, start="project")


def test_lazy_modules_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet \(a lazy module\); run one batch"):
        pom_param_groups(nn.Sequential(nn.LazyLinear(4)))


def test_peft_adapters_train_as_usual_and_the_frozen_weights_keep_index_sets_of_their_own():
    net = timm.create_model("test_vit", num_classes=3)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["qkv", "proj"], modules_to_save=["head"]))
    groups = pom_param_groups(model)
    names, plan = groups.plan.names, groups.plan
    assert {plan.euclidean[name] for name in names.values() if "lora_" in name} == {"adapter"}
    trained = {names[p] for group in groups for p in group["params"]}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(w.name.endswith("qkv.base_layer.weight") for w in plan.weights.values())

    optimizer = FGSGD(groups, lr=0.1, momentum=0.9)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    x, y = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    # B starts at zero and left it.
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("attr", "shape", "reason"),
    [
        ("pos_embed", (1, 5, 8), "position embedding"),
        ("cls_token", (1, 1, 8), "token"),
        ("relative_position_bias_table", (25, 4), "table"),
        ("gamma", (8, 1, 1), "gain"),
        ("q_bias", (8,), "bias"),
        ("skip", (), "gain"),
        ("mystery", (3, 4), "no layer says how it is used"),
    ],
)
def test_bare_parameters_are_known_by_their_names_and_shapes(attr, shape, reason):
    module = nn.Module()
    p = nn.Parameter(torch.randn(shape))
    module.register_parameter(attr, p)
    assert why_euclidean(attr, p, [module]) == reason


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated.*")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize(
    "layer", [(nn.LSTM(8, 16), "weight_hh_l0"), (nn.Linear(8, 16), "weight")], ids=["lstm", "linear"]
)
def test_weights_that_are_computed_before_each_forward_are_left_out(wrap, layer):
    found = reasons(nn.ModuleDict({"made": wrap(copy.deepcopy(layer[0]), name=layer[1])}))
    made = [reason for name, reason in found.items() if name.startswith(f"made.{layer[1]}_")]
    assert made
    assert set(made) == {"its layer computes the weight from it (parametrization, weight_norm or spectral_norm)"}


def test_a_parameter_without_numbers_is_empty():
    assert reasons(nn.ModuleDict({"none": nn.Linear(16, 0), "some": nn.Linear(4, 4)}))["none.weight"] == "empty"

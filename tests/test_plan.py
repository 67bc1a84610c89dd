import pytest
import timm
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups


def test_groups_hold_every_trainable_parameter_once(tiny):
    tiny.conv.weight.requires_grad_(False)
    groups = pom_param_groups(tiny)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in tiny.parameters() if p.requires_grad}
    assert tiny.conv.weight in groups.plan.weights  # frozen weights are planned for


def test_every_other_parameter_has_a_reason(tiny):
    plan = pom_param_groups(tiny, exclude=["up.*"]).plan
    assert {p for p, w in plan.weights.items()}.isdisjoint(p for n, p in tiny.named_parameters() if n in plan.euclidean)
    assert len(plan.weights) + len(plan.euclidean) == len(list(tiny.parameters()))
    assert plan.euclidean["up.weight"] == "in exclude"
    assert plan.euclidean["head.weight"] == "classifier head"
    assert plan.euclidean["conv.bias"] == "bias"
    assert plan.euclidean["norm.weight"] == "norm"


def test_the_head_rule_can_be_lifted(tiny):
    assert tiny.head.weight in pom_param_groups(tiny, exclude=()).plan.weights
    assert tiny.head.weight not in pom_param_groups(tiny, exclude=("conv.*",)).plan.weights


def test_include_chooses(tiny):
    plan = pom_param_groups(tiny, include=["depth*"]).plan
    assert sorted(w.name for w in plan.weights.values()) == ["depthwise.weight"]


def test_leaving_out_a_layer_does_not_change_the_others(tiny):
    whole, part = (pom_param_groups(tiny, exclude=exclude).plan for exclude in (None, ["conv.weight"]))
    for p, planned in part.weights.items():
        assert torch.equal(planned.index_sets.group, whole.weights[p].index_sets.group)


def test_tied_weights_are_constrained_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    groups = pom_param_groups(model)
    assert len(groups[0]["params"]) == 1


def test_weight_standardised_layers_are_left_out():
    model = timm.create_model("resnetv2_50x1_bit", num_classes=3)
    with pytest.raises(ValueError, match="its layer normalises the weight itself"):
        pom_param_groups(model)


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050", "mixer_s32_224"]
)
def test_timm_families_are_constrained_mostly(name):
    model = timm.create_model(name)
    plan = pom_param_groups(model).plan
    head = sum(p.numel() for p in model.get_classifier().parameters())
    body = sum(p.numel() for p in model.parameters()) - head
    assert sum(p.numel() for p in plan.weights) > 0.9 * body
    FGSGD(pom_param_groups(model), lr=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "pxo"}, "scheme: unknown scheme 'pxo'; choose from 'pi', 'po', 'pio'"),
        ({"manifolds": ["sphere", "torus"]}, "manifolds: unknown manifold 'torus'; choose from 'sphere'"),
        ({"manifolds": []}, "manifolds: none given; give at least one of 'sphere'"),
        ({"manifolds": "sphere"}, r"manifolds: 'sphere' is one string; give a list of names, \['sphere'\]"),
        ({"manifolds": ["sphere", "sphere"]}, "names one twice"),
        ({"start": "keep"}, "start: unknown start 'keep'; choose from 'preserve', 'project', 'random'"),
        ({"cutting": "rows"}, "cutting: unknown cutting 'rows'; choose from 'kernel', 'filter'"),
        ({"block_size": 0}, "block_size: 0 is not a whole number of at least 1"),
        ({"block_size": 2.5}, "block_size: 2.5 is not"),
        ({"groups": 0}, "groups: 0 is not a whole number of at least 1, 'each' or None"),
        ({"groups": "all"}, "groups: 'all' is not a whole number of at least 1, 'each' or None"),
        ({"block_size": "each"}, "block_size: 'each' is not a whole number of at least 1$"),
        (
            {"groups": 41},
            r"groups: 41 groups were asked for, .* has only 40 components; choose groups between 1 and 40",
        ),
        ({"groups": 7, "scheme": "pi"}, "groups: 7 groups were asked for.*'pi' has only 6"),
        (
            {"overrides": {"type:Conv2d": {"groups": 99, "scheme": "po"}}},
            r"overrides: 'type:Conv2d': groups: 99 groups were asked for.*'po' has only 4 components",
        ),
        (
            {"overrides": {"conv.weight": {"groups": 25}}},
            "'conv.weight': groups: 25 groups were asked for.*has only 24",
        ),
        ({"seed": "a"}, "seed: 'a' is not a whole number"),
        ({"include": ["conv9.*"]}, r"include: the pattern 'conv9.\*' matches no parameter; .* such as 'conv.weight'"),
        ({"exclude": ["conv.*", "stem.*"]}, r"exclude: the pattern 'stem.\*' matches no parameter"),
        ({"include": "conv.*"}, r"include: 'conv.\*' is one string"),
        ({"include": ["*.bias"]}, "model: TinyNet has no weight to constrain"),
        ({"include": ["head.*"]}, r"no weight to constrain .*classifier head.*exclude=\(\) includes"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_wrong_settings_are_named_with_what_would_do(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        pom_param_groups(tiny, **settings)


def test_a_model_with_nothing_to_constrain_is_refused():
    with pytest.raises(ValueError, match="model: BatchNorm2d has no weight to constrain"):
        pom_param_groups(nn.BatchNorm2d(3))


@pytest.mark.parametrize("start", ["preserve", "random"])
def test_a_default_device_changes_neither_the_draws_nor_where_weights_are_placed(start):
    # "meta" holds no values: whatever were drawn there would be lost.
    def drawn():
        groups = pom_param_groups(model, scheme="pi", groups=2, start=start, seed=5)
        return groups, [w.index_sets for w in groups.plan.weights.values()]

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(4, 4))
    _, expected = drawn()
    with torch.device("meta"):  # what set_default_device does, undone without a trace
        groups, found = drawn()
        with torch.device("cpu"):
            state = FGSGD(groups, lr=0.1).state_dict()
    assert all(p["radius"].device.type == "cpu" for p in state["param_groups"][0]["pom"])
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.group, b.group)
        assert torch.equal(a.manifold, b.manifold)


def test_the_heads_weight_is_constrained_where_it_is_named(tiny):
    assert tiny.head.weight in pom_param_groups(tiny, include=["head.weight"]).plan.weights


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_names_and_draws_are_those_of_the_model_in_a_wrapper(tiny, wrap):
    alone, within = pom_param_groups(tiny, layer_decay=None, seed=3), pom_param_groups(wrap(tiny), seed=3)
    assert within.plan.names == alone.plan.names
    for p, planned in alone.plan.weights.items():
        assert torch.equal(within.plan.weights[p].index_sets.manifold, planned.index_sets.manifold)
        assert torch.equal(within.plan.weights[p].index_sets.slot, planned.index_sets.slot)

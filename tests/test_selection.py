import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from lightning_fgsgd import FGSGD, POMGrouping, pom_param_groups
from lightning_fgsgd.plan import draw_plan
from tests.lit import LitBase, LitTiny, config, loader, trainer


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet18", num_classes=3)


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", num_classes=3)


def constrained(model, **settings):
    return {w.name for w in draw_plan(model, **settings).weights.values()}


def test_types_choose_layers_by_class_and_base_class(resnet):
    everything = constrained(resnet, exclude=())
    assert constrained(resnet, include=["type:Linear"], exclude=()) == {"fc.weight"}
    assert constrained(resnet, include=["type:Conv*"]) == everything - {"fc.weight"}
    assert constrained(resnet, include=["type:_ConvNd"]) == everything - {"fc.weight"}
    assert constrained(resnet, exclude=["type:Conv2d"]) == set()


def test_timms_stem_stages_and_head_choose(resnet, vit):
    assert constrained(resnet, include=["timm:stem"]) == {"conv1.weight"}
    second = {name for name, _ in resnet.named_parameters() if name.startswith("layer2") and name.count("conv")}
    assert constrained(resnet, include=["timm:stage2"]) == second | {"layer2.0.downsample.0.weight"}
    assert constrained(resnet, include=["timm:head"]) == {"fc.weight"}
    assert constrained(vit, include=["timm:stem"]) == {"patch_embed.proj.weight"}
    assert all(name.startswith("blocks.0") for name in constrained(vit, include=["timm:stage1"]))


def test_a_timm_model_inside_a_module_is_found():
    module = nn.ModuleDict({"net": timm.create_model("resnet18", num_classes=3), "extra": nn.Linear(4, 4)})
    assert constrained(module, include=["timm:stem"]) == {"net.conv1.weight"}
    assert "net.fc.weight" not in constrained(module)


def test_a_method_of_the_name_of_timms_that_needs_arguments_names_no_head():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

        def get_classifier(self, number):
            return self.fc

    assert constrained(Own()) == {"conv.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["type:Conv3d"]},
            "include: the pattern 'type:Conv3d' matches no parameter; its layers are of the classes",
        ),
        (
            {"exclude": ["timm:stage9"]},
            "exclude: the pattern 'timm:stage9' matches no parameter; the last stage is timm:stage",
        ),
        (
            {"include": ["timm:neck"]},
            "include: unknown pattern 'timm:neck'; there are timm:head, timm:stem, timm:stage1",
        ),
        ({"overrides": {"layer9.*": {"start": "project"}}}, r"overrides: the pattern 'layer9.\*' matches no parameter"),
        (
            {"overrides": {"layer1.*": {"begin": "project"}}},
            r"overrides: 'layer1.\*' has .*give a mapping of some of scheme",
        ),
        ({"overrides": {"layer1.*": "project"}}, r"overrides: 'layer1.\*' has 'project'; give a mapping"),
        ({"overrides": {"layer1.*": {"start": "keep"}}}, r"overrides: 'layer1.\*': start: unknown start 'keep'"),
        ({"layer_decay": 1.5}, r"layer_decay: 1.5 is not in \(0, 1\]"),
        ({"euclidean_lr_factor": 0.0}, "euclidean_lr_factor: 0.0 is not a positive number"),
        ({"euclidean_lr_factor": float("inf")}, "euclidean_lr_factor: inf is not a positive number"),
        ({"no_weight_decay": ["gain"]}, "no_weight_decay: the pattern 'gain' matches no parameter"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_wrong_patterns_are_named_with_what_would_do(resnet, settings, message):
    with pytest.raises(ValueError, match=message):
        pom_param_groups(resnet, **settings)


def test_a_model_without_a_group_matcher_says_so(tiny):
    for settings in ({"include": ["timm:stem"]}, {"layer_decay": 0.5}):
        with pytest.raises(ValueError, match="TinyNet has no timm model with a group_matcher"):
            pom_param_groups(tiny, **settings)


def test_overrides_change_the_settings_of_what_they_match_and_of_nothing_else(resnet):
    overrides = {
        "type:Conv2d": {"block_size": 8},
        "layer2.*": {"cutting": "filter", "manifolds": ["stiefel"], "start": "project", "scheme": "po", "groups": 2},
        "layer2.1.*": {"block_size": 4},
    }
    plain = {w.name: w for w in draw_plan(resnet).weights.values()}
    changed = {w.name: w for w in draw_plan(resnet, overrides=overrides).weights.values()}
    assert changed.keys() == plain.keys()
    for name, weight in changed.items():
        if not name.startswith("layer2"):
            if "downsample" in name:
                assert weight.cutting.p == 8
            else:
                assert weight.cutting == plain[name].cutting
                assert torch.equal(weight.index_sets.group, plain[name].index_sets.group)
            continue
        assert (weight.cutting.kind, weight.start, weight.scheme) == ("filter", "project", "po")
        assert weight.index_sets.manifold_names == ("stiefel",)
        assert weight.index_sets.num_groups == 2
        assert weight.cutting.p == (4 if name.startswith("layer2.1") else 8)  # the later pattern holds


def test_starts_can_be_mixed_and_each_is_kept(resnet):
    before = {name: p.detach().clone() for name, p in resnet.named_parameters()}
    optimizer = FGSGD(pom_param_groups(resnet, overrides={"layer4.*": {"start": "project"}}), lr=0.1)
    for p, pom in optimizer.poms.items():
        assert torch.equal(p, before[pom.name]) == (not pom.name.startswith("layer4"))
        assert optimizer.distance(p) < 1e-5
    resnet.load_state_dict(before, strict=False)


def test_everything_is_chosen_from_yaml(tmp_path):
    from pytorch_lightning.cli import LightningCLI

    callbacks = """
    - class_path: lightning_fgsgd.POMGrouping
      init_args:
        exclude: ["*depthwise*"]
        include: ["type:Conv*", "*linear*"]
        overrides:
          "*linear*": {manifolds: [stiefel], block_size: 3, start: project}
          "type:ConvTranspose2d": {cutting: filter}
        no_weight_decay: true
        verbose: true
    """
    args = ["--config", str(config(tmp_path, callbacks))]
    cli = LightningCLI(LitTiny, run=False, args=args, save_config_callback=None)
    cli.trainer.fit(cli.model, loader())
    (optimizer,) = cli.trainer.optimizers
    poms = {pom.name: pom for pom in optimizer.poms.values()}
    names = ("conv", "grouped", "linear", "pointwise", "up")
    assert set(poms) == {f"model.{name}.weight" for name in names}
    linear = poms["model.linear.weight"]
    assert (linear.sets.manifold_names, linear.cutting.p, linear.start) == (("stiefel",), 3, "project")
    assert poms["model.up.weight"].cutting.kind == "filter"
    assert poms["model.conv.weight"].start == "preserve"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]


def test_layer_decay_gives_the_factors_that_timm_gives(vit):
    groups = pom_param_groups(vit, layer_decay=0.7, no_weight_decay=True)
    optimizer = FGSGD(groups, lr=0.5, weight_decay=0.1)
    mine = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    listed = vit.no_weight_decay()
    theirs = param_groups_layer_decay(vit, 0.1, no_weight_decay_list=listed, layer_decay=0.7)
    assert sum(len(group["params"]) for group in theirs) == len(mine)
    for group in theirs:
        for p in group["params"]:
            assert mine[p] == pytest.approx((0.5 * group["lr_scale"], group["weight_decay"]))
    assert len({lr for lr, _ in mine.values()}) == 8  # stem, six blocks, head


def test_what_stays_euclidean_has_its_factor_beside_that_of_its_layer(vit):
    def rates(**settings):
        groups = pom_param_groups(vit, no_weight_decay=True, **settings)
        optimizer = FGSGD(groups, lr=0.5)
        return groups.plan, {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    plan, alone = rates(euclidean_lr_factor=0.25)
    assert len(plan.weights) > 20
    assert len(alone) > 2 * len(plan.weights)
    assert all(lr == (0.5 if p in plan.weights else 0.125) for p, lr in alone.items())
    _, decayed = rates(layer_decay=0.7)
    plan, both = rates(layer_decay=0.7, euclidean_lr_factor=3.0)
    for p, lr in both.items():
        assert lr == pytest.approx(decayed[p] * (1 if p in plan.weights else 3))


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_schedules_keep_the_ratios_of_layer_decay(vit, kind):
    optimizer = FGSGD(pom_param_groups(vit, layer_decay=0.7), lr=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    if kind == "torch":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.step()
        scheduler.step()
    else:
        from timm.scheduler import StepLRScheduler

        StepLRScheduler(optimizer, decay_t=1, decay_rate=0.5).step(1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 2 for lr in before])


def test_no_weight_decay_takes_patterns_too(vit):
    groups = pom_param_groups(vit, no_weight_decay=["*.bias", "pos_embed"])
    names = groups.plan.names
    free = {names[p] for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    assert free == {name for name, _ in vit.named_parameters() if name.endswith(".bias") or name == "pos_embed"}


@pytest.mark.parametrize(
    ("name", "value"), [("layer_decay", 0.5), ("euclidean_lr_factor", 0.1), ("no_weight_decay", True)]
)
def test_what_splits_groups_needs_groups_that_the_mixin_makes(tmp_path, name, value):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1)

    with pytest.raises(Exception, match=f"POMGrouping: {name} splits parameter groups, .*{name}={value}"):
        trainer(tmp_path, POMGrouping(**{name: value})).fit(Own(), loader())


def test_two_models_each_have_their_own_last_layer():
    small, large = (timm.create_model(name, num_classes=3) for name in ("resnet18", "resnet50"))
    both = nn.ModuleDict({"a": small, "b": large})
    alone = {
        f"{name}.{n}": f
        for name, model in both.items()
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for n, f in (
            (n, group["lr_scale"]) for n, p in model.named_parameters() if any(p is q for q in group["params"])
        )
    }
    groups = pom_param_groups(both, layer_decay=0.5)
    found = {groups.plan.names[p]: group.get("lr_factor", 1.0) for group in groups for p in group["params"]}
    assert found == pytest.approx(alone)
    assert found["a.fc.weight"] == found["b.fc.weight"] == 1


def test_a_tied_weight_is_found_by_each_of_its_names():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    assert constrained(net, include=["b.weight"]) == {"a.weight"}
    assert constrained(net, include=["a.weight"]) == {"a.weight"}

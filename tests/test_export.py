import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from lightning_fgsgd import FGSGD, export_timm, pom_param_groups


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_exported_weights_load_into_timm_and_give_the_same_logits_to_the_last_bit(tmp_path, name, channels_last):
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    optimizer = FGSGD(pom_param_groups(model, start="project"), lr=0.1, momentum=0.9)
    x = torch.randn(4, 3, 64, 64)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    optimizer.step()
    path = export_timm(model, tmp_path / "new" / name)
    loaded = timm.create_model("mobilenetv3_small_050", num_classes=5, checkpoint_path=str(path))
    if channels_last:
        loaded.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded.eval()(x))


def test_a_lightning_module_is_exported_by_its_model(tmp_path):
    holder = nn.Module()
    holder.net = timm.create_model("mobilenetv3_small_050", num_classes=5)
    path = export_timm(holder, tmp_path / "w.safetensors", attribute="net")
    state = timm.models.load_state_dict(str(path))
    assert state.keys() == holder.net.state_dict().keys()


def test_wrong_targets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_timm(nn.Linear(2, 2), tmp_path / "weights.onnx")
    with pytest.raises(ValueError, match="Linear is not a timm model, nor is its attribute 'model'"):
        export_timm(nn.Linear(2, 2), tmp_path / "weights.pth")


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "pruned", "pruned twice"])
def test_weights_that_are_parametrized_or_pruned_are_written_as_they_come_out(tmp_path, how):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    layer = model.layer1[0].conv1
    if how.startswith("pruned"):
        for _ in how.split():
            prune.l1_unstructured(layer, "weight", 0.3)
    else:
        getattr(parametrizations, how)(layer)
    x = torch.randn(2, 3, 64, 64)
    model(x)
    with torch.no_grad():  # as a step does: what comes out is not what it was in the last forward pass
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export_timm(model, tmp_path / "weights.safetensors")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


def test_a_pruned_layer_that_is_in_two_places_is_written_in_both(tmp_path):
    model = timm.create_model("test_resnet", num_classes=5)
    names = set(model.state_dict())
    model.twin = model.layer1[0].conv1
    prune.l1_unstructured(model.twin, "weight", 0.3)
    state = torch.load(export_timm(model, tmp_path / "weights.pt"))
    assert set(state) == names | {"twin.weight"}
    assert torch.equal(state["twin.weight"], state["layer1.0.conv1.weight"])


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
def test_weights_under_the_older_norms_are_named_with_what_to_do(tmp_path, how):
    model = timm.create_model("test_resnet", num_classes=5)
    getattr(nn.utils, how)(model.layer1[0].conv1)
    with pytest.raises(
        ValueError, match=rf"layer1\.0\.conv1\.weight is under .*call torch\.nn\.utils\.remove_{how} first"
    ):
        export_timm(model, tmp_path / "weights.pt")


@pytest.mark.parametrize("whole", [False, True])
def test_names_are_those_of_the_model_without_torch_compile(tmp_path, whole):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    expected, x = set(model.state_dict()), torch.randn(1, 3, 64, 64)
    logits = model(x)
    if whole:
        given = torch.compile(model)
    else:
        given = model
        model.layer1 = torch.compile(model.layer1)
    path = export_timm(given, tmp_path / "weights.pt")
    assert set(torch.load(path)) == expected
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(x), logits)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_sharded_weights_are_put_together(tmp_path, name):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = timm.create_model("test_resnet", num_classes=5).eval()
        x = torch.randn(1, 3, 64, 64)
        logits = model(x)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        path = export_timm(model, tmp_path / name)
    finally:
        dist.destroy_process_group()
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(x), logits)


def test_adapters_are_refused_until_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    model = timm.create_model("test_vit", num_classes=4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], r=2))
    with pytest.raises(ValueError, match=r"have adapters .* give what merge_and_unload"):
        export_timm(adapted, tmp_path / "model.safetensors")
    path = export_timm(adapted.merge_and_unload(), tmp_path / "model.safetensors")
    timm.create_model("test_vit", num_classes=4, checkpoint_path=str(path))

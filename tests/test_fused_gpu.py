"""GPU code does what torch's operations do. Without a GPU these tests run in Triton's interpreter, in another process."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, fused_gpu, pom_param_groups, update
from tests.test_fused import optimizer_state, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MIX = ("sphere", "oblique", "stiefel")

on_gpu = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests of this file run as they are")
def test_the_tests_of_this_file_pass_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


def layers(layout=torch.contiguous_format):
    """3x3 kernels in several programs, in conv groups, transposed; larger ones; blocks of several sizes and fan-ins."""
    model = nn.Sequential(
        nn.Conv2d(10, 30, 3),
        nn.Conv2d(6, 9, (1, 3), groups=3),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Conv2d(4, 4, 5, groups=4),
        nn.Linear(70, 48),
        nn.Linear(5, 6),
        nn.Conv2d(12, 14, 1, groups=2),
    )
    return model.to(DEVICE).to(memory_format=layout)


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "rescale": True},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "rho": None},
    "embedded": {"momentum": 0.5, "dampening": 0.3, "maximize": True, "metric": "embedded", "rescale": True},
}
CASES = [
    ("pi", MIX, "preserve", "momentum", "contiguous"),
    ("po", MIX, "preserve", "embedded", "channels_last"),
    ("pio", MIX, "project", "momentum", "channels_last"),
    ("pio", ("stiefel", "euclidean"), "preserve", "nesterov", "contiguous"),
    ("pi", ("sphere",), "preserve", "plain", "channels_last"),
    ("po", ("oblique",), "preserve", "momentum", "contiguous"),
    ("pio", ("stiefel",), "random", "embedded", "contiguous"),
]


@on_gpu
@pytest.mark.parametrize(("scheme", "manifolds", "start", "options", "layout"), CASES)
def test_steps_equal_those_by_torchs_operations(scheme, manifolds, start, options, layout):
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = layers(getattr(torch, {"contiguous": "contiguous_format"}.get(layout, layout)))
        settings = {"scheme": scheme, "manifolds": manifolds, "start": start, **OPTIONS[options]}
        optimizer = run(model, fused, steps=2, scale=0.1, **settings)
        assert max(optimizer.distance(p) for p in optimizer.poms) < 3e-6
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


@on_gpu
@pytest.mark.parametrize(("scheme", "groups"), [("pio", "each"), ("pio", 20), ("pi", "each"), ("po", 17)])
def test_with_any_number_of_groups_steps_equal_those_by_torchs_operations(scheme, groups):
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(10, 30, 3), nn.Conv2d(18, 4, 2), nn.Linear(20, 320), nn.Conv2d(4, 4, 5))
        model = model.to(DEVICE)
        optimizer = run(model, fused, 2, scale=0.1, scheme=scheme, groups=groups, momentum=0.9, block_size=2, rho=9.0)
        assert all(fused_gpu.suits(pom, p) for p, pom in optimizer.poms.items())
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


@on_gpu
def test_every_layer_is_stepped_by_it_and_those_alike_by_one_launch(monkeypatch):
    launches = []
    run_launch = fused_gpu.Launch.run
    monkeypatch.setattr(
        fused_gpu.Launch,
        "run",
        lambda self, jobs, *shares: launches.append([j.pom.name for j in jobs]) or run_launch(self, jobs, *shares),
    )
    model = nn.Sequential(
        *(nn.Conv2d(a, b, 3) for a, b in ((3, 5), (7, 2), (2, 7))), nn.Linear(31, 64), nn.Linear(9, 48)
    )
    run(model.to(DEVICE), True, steps=1, manifolds=["sphere"], start="project", momentum=0.9)
    kernels, blocks = [f"{i}.weight" for i in range(3)], ["3.weight", "4.weight"]
    # The last layer has blocks of 8 rows, for a block has no more rows than columns.
    assert launches == [kernels, blocks[:1], blocks[1:]] * 2


@on_gpu
def test_what_it_is_not_for_is_left_to_torch():
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Linear(80, 70), nn.Linear(64, 64), nn.Conv2d(2, 2, 3)]).to(DEVICE)
    model[3].double()
    groups = pom_param_groups(model, block_size=64, overrides={"1.*": {"block_size": 16, "groups": 4}})
    optimizer = FGSGD(groups, lr=0.1)
    found = {pom.name: fused_gpu.suits(pom, p) for p, pom in optimizer.poms.items()}
    assert found == {"0.weight": True, "1.weight": True, "2.weight": False, "3.weight": False}
    weight = model[0].weight
    assert not fused_gpu.suits(optimizer.poms[weight], weight, weight.double())


@on_gpu
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 7, 3, bias=False), nn.Linear(20, 24, bias=False)], ids=["kernels", "blocks"]
)
def test_steps_too_long_for_the_fast_retraction_end_where_the_manifold_says(layer):
    torch.manual_seed(0)
    layer = type(layer)(*((6, 7, 3) if layer.weight.ndim == 4 else (20, 24)), bias=False).to(DEVICE)
    groups = pom_param_groups(layer, manifolds=["stiefel"], start="project")
    optimizer = FGSGD(groups, lr=1.0, rho=None, metric="unit", fused=True)
    pom = optimizer.poms[layer.weight]
    grad = 0.05 * torch.randn_like(layer.weight)
    grad[2] *= 1000
    layer.weight.grad = grad
    cut = pom.cutting.cut
    q = cut(layer.weight.detach()).clone()
    expected = pom.manifolds[0].retract(q, -pom.manifolds[0].tangent(q, cut(grad)))
    optimizer.step()
    torch.testing.assert_close(cut(layer.weight.detach()), expected, atol=3e-6, rtol=0)


@on_gpu
def test_components_that_are_zero_stay_zero_and_at_a_learning_rate_of_zero_nothing_moves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16)).to(DEVICE)
    with torch.no_grad():
        model[0].weight[2, 1] = 0
        model[1].weight[3] = 0
    with pytest.warns(UserWarning, match="components that are zero have no direction"):
        optimizer = run(model, True, steps=2, manifolds=["stiefel"], momentum=0.9)
    assert not model[0].weight[2, 1].any()
    assert not model[1].weight[3].any()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@on_gpu
def test_a_second_step_with_gradients_elsewhere_in_memory_reads_those():
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(5, 6, 3).to(DEVICE)
        optimizer = FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9, fused=fused)
        gradients = [torch.randn_like(model.weight) for _ in range(3)]
        for grad in gradients:
            model.weight.grad, model.bias.grad = grad, torch.zeros_like(model.bias)
            optimizer.step()
        found.append(model.weight.detach())
    torch.testing.assert_close(*found, atol=3e-6, rtol=0)


@on_gpu
@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 32, bias=False), nn.Conv2d(2, 2, 5, bias=False)], ids=["blocks", "kernels"]
)
def test_rounding_moves_weights_little_where_their_gram_matrix_is_ill_conditioned(layer):
    generator = torch.Generator().manual_seed(0)
    p = layer.weight.shape[-1]
    u, v = torch.linalg.qr(torch.randn(2, layer.weight.numel() // p**2, p, p, generator=generator).double())[0]
    layer.weight.data = ((u * torch.logspace(0, -5, p, dtype=torch.float64)) @ v).reshape(layer.weight.shape).float()
    start = layer.weight.detach().clone()
    layer = layer.to(DEVICE)
    options = {"manifolds": ("stiefel",), "start": "preserve", "exclude": ()}
    optimizer = FGSGD(pom_param_groups(layer, **options), lr=1e-9, momentum=0.9, fused=True)
    for _ in range(20):
        layer.weight.grad = torch.randn(layer.weight.shape, generator=generator).to(DEVICE)
        optimizer.step()
    assert (layer.weight.detach().cpu() - start).norm() < 1e-5 * start.norm()


@on_gpu
def test_without_triton_it_says_so_once_and_steps_all_the_same(monkeypatch):
    monkeypatch.setattr(fused_gpu, "available", lambda: "ModuleNotFoundError: No module named 'triton'")
    monkeypatch.setattr(update, "_said", [])
    with pytest.warns(UserWarning, match=r"no Triton code could be compiled here \(ModuleNotFoundError"):
        run(nn.Linear(4, 4).to(DEVICE), None, steps=2)
    with pytest.raises(RuntimeError, match="fused: True was asked for, but no Triton code"):
        run(nn.Linear(4, 4).to(DEVICE), True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_host_waits_for_the_gpu_once_a_step():
    model = layers()
    optimizer = run(model, True, steps=2, momentum=0.9)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_weights_are_placed_on_a_gpu_to_the_bit_as_on_a_cpu(start):
    torch.manual_seed(0)
    found = []
    model = layers().cpu()
    for device in ("cpu", "cuda"):
        mine = copy.deepcopy(model).to(device)
        optimizer = FGSGD(pom_param_groups(mine, start=start), lr=0.1)
        poms = [x for pom in optimizer.poms.values() for x in (pom.radius, pom.sets.slot, pom.upper) if x is not None]
        found.append([x.cpu() for x in (*(p.detach() for p in mine.parameters()), *poms)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_module_that_is_brought_back_from_the_gpu_can_be_asked_and_stepped_on():
    torch.manual_seed(0)
    model = layers()
    optimizer = run(model, True, steps=2, momentum=0.9, rescale=True)
    model.cpu()
    optimizer.state.clear()
    assert max(optimizer.distance(p) for p in optimizer.poms) < 3e-6
    assert {optimizer.pom(p).radius.device.type for p in optimizer.poms} == {"cpu"}
    for p in model.parameters():
        p.grad = 0.1 * torch.randn_like(p)
    optimizer.step()
    assert max(optimizer.distance(p) for p in optimizer.poms) < 3e-6

"""Compiled code does what torch's operations do, on every layout, whatever the shape; and gives way where it cannot."""

import copy
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, fused, pom_param_groups, update

MIXES = [("sphere",), ("oblique",), ("stiefel",), ("sphere", "oblique", "stiefel"), ("stiefel", "euclidean")]


def layers(dtype=torch.float32, layout=torch.contiguous_format, shapes="all"):
    """Square, wide, grouped, depthwise, transposed, one-dimensional kernels, in long and ragged loops; blocks.

    Every size of a component is code of its own, which takes seconds to compile: "few" is 3x3 kernels and blocks of 16.
    """
    model = nn.Sequential(nn.Conv2d(4, 70, 3), nn.Conv2d(130, 3, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(37, 48))
    if shapes == "all":
        model.append(nn.Conv2d(6, 9, (1, 3), groups=3))
        model.append(nn.ConvTranspose2d(4, 6, 2, groups=2))
        model.append(nn.Conv1d(5, 6, 4))
        model.append(nn.Linear(129, 12))
        model.append(nn.Linear(5, 6))
        model.append(nn.Conv2d(12, 14, 1, groups=2))
    return model.to(dtype).to(memory_format=layout)


def run(model, fused_, steps=3, scale=0.3, rescale=False, metric="start", **options):
    settings = ("scheme", "manifolds", "start", "cutting", "block_size", "groups", "exclude")
    groups = {k: options.pop(k) for k in settings if k in options}
    optimizer = FGSGD(pom_param_groups(model, seed=1, **groups), lr=0.1, fused=fused_, metric=metric, **options)
    generator = torch.Generator().manual_seed(1)
    for pom, p in ((pom, p) for p, pom in optimizer.poms.items() if rescale):
        channels = torch.rand(int(pom.cutting.reads().max()) + 1, generator=generator) + 0.5
        optimizer.rescale(p, channels[pom.cutting.reads()].to(p))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.empty_like(p).copy_(scale * torch.randn(p.shape, generator=generator))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("manifolds", MIXES, ids="-".join)
@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "rescale": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "rho": None},
        {"momentum": 0.5, "dampening": 0.3, "maximize": True, "metric": "embedded", "rescale": True},
    ],
    ids=["plain", "momentum", "nesterov", "embedded"],
)
def test_compiled_steps_equal_those_by_torchs_operations(request, options, scheme, manifolds, start, layout):
    if len(manifolds) != 3 or options.get("momentum") != 0.9:  # those are compiled as for everyone
        request.getfixturevalue("quickly_compiled")
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        model = layers(torch.float64, layout, shapes="all" if len(manifolds) == 3 else "few")
        optimizer = run(model, fused_, scheme=scheme, manifolds=manifolds, start=start, **options)
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
        assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-12
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def optimizer_state(optimizer):
    return [optimizer.state[p]["momentum_buffer"] for p in optimizer.poms if "momentum_buffer" in optimizer.state[p]]


def launched(monkeypatch):
    """The names of the weights that compiled code moves, a list for each launch."""
    seen, advance = [], fused.Launches.advance

    def noted(self, jobs, shares):
        seen.append([job.pom.name for job in jobs])
        return advance(self, jobs, shares)

    monkeypatch.setattr(fused.Launches, "advance", noted)
    return seen


@pytest.mark.parametrize("groups", [24, 200, "each"])
@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
def test_with_any_number_of_groups_compiled_steps_equal_those_by_torchs_operations(monkeypatch, scheme, groups):
    # Few groups are told apart by comparing; of many the number is read, from a byte or from four.
    seen = launched(monkeypatch)
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(4, 230, 3), nn.Conv2d(230, 3, 3), nn.Conv2d(40, 40, 3, groups=40)).double()
        if groups != "each":
            model.append(nn.Conv2d(230, 230, 3, bias=False).double())  # pools that have as many in every scheme
        optimizer = run(model, fused_, scheme=scheme, groups=groups, momentum=0.9, rescale=True)
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
    assert set(itertools.chain(*seen)) == {pom.name for pom in optimizer.poms.values()}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("start", ["preserve", "random"])
@pytest.mark.usefixtures("quickly_compiled")
def test_compiled_blocks_of_any_size_equal_those_by_torchs_operations(start, block_size, layout):
    blocks_agree(layout, block_size=block_size, start=start)


@pytest.mark.parametrize(
    "manifolds", [("sphere",), ("oblique",), ("oblique", "sphere"), ("euclidean", "stiefel", "oblique")], ids="-".join
)
@pytest.mark.usefixtures("quickly_compiled")
def test_compiled_blocks_on_any_manifolds_equal_those_by_torchs_operations(manifolds):
    blocks_agree(torch.contiguous_format, manifolds=manifolds, start="preserve", weight_decay=0.1)


def blocks_agree(layout, **options):
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(9, 64, 3), nn.Linear(150, 128), nn.Conv2d(33, 70, 1), nn.Linear(256, 48))
        model.to(torch.float64).to(memory_format=layout)
        options = {"cutting": "filter", "momentum": 0.9, "rescale": True, **options}
        optimizer = run(model, fused_, **options)
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
        assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-12
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("kernel", [(16, 16), (8, 11)], ids=str)
@pytest.mark.usefixtures("quickly_compiled")
def test_compiled_kernels_that_are_large_equal_those_by_torchs_operations(monkeypatch, kernel, start, scheme):
    seen = launched(monkeypatch)
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 7, kernel),
            nn.Conv2d(4, 6, kernel, groups=2).to(memory_format=torch.channels_last),
            nn.ConvTranspose2d(4, 6, kernel, groups=2),
        ).to(torch.float64)
        options = {"manifolds": ("sphere", "oblique", "stiefel", "euclidean"), "weight_decay": 0.1, "momentum": 0.9}
        optimizer = run(model, fused_, scheme=scheme, start=start, rescale=True, **options)
        grads_elsewhere = [p.to(memory_format=torch.channels_last).clone() for p in (q.grad for q in optimizer.poms)]
        for p, grad in zip(optimizer.poms, grads_elsewhere, strict=True):
            p.grad = grad  # laid out as the weight is not
        optimizer.step()
        found.append([*(p.detach() for p in model.parameters()), *optimizer_state(optimizer)])
        assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-12
    assert seen == [["0.weight", "1.weight", "2.weight"]] * 4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_in_float32_they_agree_to_rounding():
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        model = layers()
        optimizer = run(model, fused_, steps=10, momentum=0.9)
        found.append([p.detach() for p in model.parameters()])
        assert max(optimizer.distance(p) for p in optimizer.poms) < 2e-6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_weight_whose_layout_changes_between_steps_goes_on_as_by_torchs_operations():
    found = []
    for fused_ in (False, True):
        torch.manual_seed(3)
        layer = nn.Conv2d(16, 48, 1, bias=False).double()  # three blocks: other strides have no compiled code
        optimizer = FGSGD(pom_param_groups(layer), lr=0.1, momentum=0.9, fused=fused_)
        for order in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 2, 3)):
            back = [order.index(i) for i in range(4)]
            layer.weight.data = layer.weight.data.permute(order).contiguous().permute(back)
            layer.weight.grad = torch.empty_like(layer.weight).normal_()
            optimizer.step()
        found.append(layer.weight.detach())
        assert optimizer.distance(layer.weight) < 1e-12
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_compiled_code_is_what_runs_and_the_others_are_left_to_torch(monkeypatch):
    seen = launched(monkeypatch)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 7), nn.Linear(8, 8)])
    run(model, True, steps=2)
    assert seen == [["0.weight", "2.weight"]] * 2  # all at once
    run(model.to(torch.bfloat16), True)
    assert len(seen) == 2


@pytest.mark.parametrize("fused_", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 7, 3, bias=False), nn.Linear(20, 24, bias=False)], ids=["kernels", "blocks"]
)
def test_steps_too_long_for_the_fast_retraction_end_where_the_manifold_says(layer, fused_):
    # Long steps of some components only: those take the careful way, the others do not move twice.
    layer = copy.deepcopy(layer).double()
    optimizer = FGSGD(
        pom_param_groups(layer, manifolds=["stiefel"], start="project"),
        lr=1.0,
        rho=None,
        metric="unit",
        fused=fused_,
    )
    pom = optimizer.poms[layer.weight]
    grad = 0.1 * torch.randn_like(layer.weight)
    grad[2] *= 1000
    layer.weight.grad = grad
    cut = pom.cutting.cut
    q = cut(layer.weight.detach()).clone()
    stiefel = pom.manifolds[0]
    expected = stiefel.retract(q, -stiefel.tangent(q, cut(grad)))
    optimizer.step()
    torch.testing.assert_close(cut(layer.weight.detach()), expected, atol=1e-12, rtol=0)


def test_one_piece_of_code_serves_layers_of_all_shapes_and_learning_rates():
    fused._kernel.cache_clear()
    model = nn.ModuleList([nn.Conv2d(a, b, 3) for a, b in ((3, 5), (64, 9), (9, 64), (1, 33))])
    model.extend([nn.Linear(a, b) for a, b in ((31, 64), (64, 48), (100, 48))])
    optimizer = run(model, True, momentum=0.9)
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.step()
    assert fused._kernel.cache_info().misses == 4  # the norms and the move, of kernels and of blocks


def test_the_result_does_not_depend_on_the_number_of_threads_beyond_rounding():
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Conv2d(80, 90, 3)
        run(model, True, momentum=0.9)
        found.append(model.weight.detach())
    torch.set_num_threads(before)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_without_a_compiler_it_says_so_once_and_steps_all_the_same(monkeypatch):
    monkeypatch.setattr(fused, "available", lambda: "InvalidCxxCompiler: none found")
    monkeypatch.setattr(update, "_said", [])
    with pytest.warns(UserWarning, match=r"no C\+\+ could be compiled here \(InvalidCxxCompiler: none found\)"):
        run(layers(), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(layers(), None)
        run(layers(), False)
    with pytest.raises(RuntimeError, match=r"fused: True was asked for, but no C\+\+"):
        run(layers(), True)


def test_only_a_compiler_for_where_the_weights_lie_is_looked_for(monkeypatch):
    monkeypatch.setattr(fused, "available", lambda: pytest.fail("nothing is on the CPU"))
    FGSGD([nn.Parameter(torch.ones(3, 3, device="meta"))], lr=0.1, fused=True)


def test_a_machine_without_a_compiler_is_found_out(tmp_path):
    # In a process of its own: PATH and CXX lead nowhere, and nothing is cached.
    code = "from lightning_fgsgd import fused; print('reason:', fused.available())"
    env = {"PATH": str(tmp_path), "CXX": "nothing", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    reason = done.stdout.split("reason:")[1].strip()
    assert reason


@pytest.mark.parametrize("fused_", [False, True])
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_an_ill_conditioned_gram_matrix_is_kept_as_well_as_any_other(apart, fused_):
    # Columns that are almost multiples of each other, in small kernels, in large ones and in blocks.
    model = nn.ModuleList([nn.Conv2d(8, 9, 3), nn.Conv2d(8, 9, 5), nn.Linear(64, 32)])
    with torch.no_grad():
        for kernels in (model[0].weight, model[1].weight):
            kernels[..., 1] = 2 * kernels[..., 0] + apart * kernels[..., 1]
        rows = model[2].weight
        rows[1] = 2 * rows[0] + apart * rows[1]
    optimizer = run(model, fused_, steps=20, scale=0.1, manifolds=("stiefel",), momentum=0.9)
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5


@pytest.mark.parametrize("fused_", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 64, bias=False), nn.Conv2d(2, 2, 16, bias=False)], ids=["blocks", "kernels"]
)
def test_rounding_moves_weights_no_more_where_their_gram_matrix_is_ill_conditioned(layer, fused_):
    moved = []
    for condition in (1.0, 1e5):
        generator = torch.Generator().manual_seed(0)
        u, v = torch.linalg.qr(torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=generator))[0]
        singular = torch.logspace(0, -torch.tensor(condition).log10(), 16, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(((u * singular) @ v).reshape(layer.weight.shape))
        start = layer.weight.detach().clone()
        options = {"manifolds": ("stiefel",), "start": "preserve", "exclude": ()}
        optimizer = FGSGD(pom_param_groups(layer, **options), lr=1e-9, momentum=0.9, fused=fused_)
        for _ in range(100):
            layer.weight.grad = torch.randn(layer.weight.shape, generator=generator)
            optimizer.step()
        moved.append(float((layer.weight - start).norm() / start.norm()))
    assert max(moved) < 3e-5, moved


@pytest.mark.parametrize("fused_", [False, None])
@pytest.mark.parametrize("kernel", [(3, 3), (16, 16)], ids=str)
def test_a_weight_that_is_a_slice_of_a_larger_tensor_is_stepped_as_one_of_its_own(kernel, fused_):
    found = []
    for sliced in (False, True):
        layer = nn.Conv2d(16, 24, kernel, bias=False)
        whole = torch.randn(24, 18, *kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        layer.weight = nn.Parameter(whole[:, 1:17] if sliced else whole[:, 1:17].clone())
        run(layer, fused_, momentum=0.9, exclude=())
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 5), (2, 2)], ids=str)
def test_kernels_side_by_side_in_memory_are_stepped_as_those_in_planes(kernel, dtype):
    # The first are blended into planes and back; the second are worked on in place.
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(64, 37, kernel, dtype=dtype).to(memory_format=layout)
        optimizer = run(model, True, momentum=0.9, rescale=True)
        found.append([*model.parameters(), *optimizer_state(optimizer)])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)

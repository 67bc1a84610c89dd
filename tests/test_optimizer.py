import copy
import math
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.grouping import pack, unpack
from lightning_fgsgd.plan import draw_plan
from lightning_fgsgd.prepared import together
from tests import reference

MANIFOLDS = [("sphere",), ("oblique",), ("stiefel",), ("sphere", "oblique", "stiefel"), ("stiefel", "euclidean")]
MOMENTA = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
]
ALL = ("sphere", "oblique", "stiefel")

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def net(dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, (2, 3), groups=6), nn.Conv1d(6, 4, 3), nn.Conv2d(8, 12, 1), nn.Linear(7, 10)
    ).to(dtype)


def random_grads(model, scale=1.0):
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)


def references(model, optimizer, start, metric="start"):
    found = {}
    for p in model.parameters():
        look = optimizer.pom(p)
        if look is None:
            continue
        cutting = optimizer.poms[p].cutting
        weight = p.detach().numpy().copy()
        components = reference.cut(weight, cutting.kind, cutting.p)
        names = [look.manifold_names[i] for i in look.manifold.tolist()]
        before = reference.cut(optimizer.unplaced(p).numpy().copy(), cutting.kind, cutting.p)
        args = components, names, look.group.tolist(), start, look.radius.tolist(), metric, before
        found[p] = weight, reference.Reference(*args)
    return found


@pytest.mark.parametrize("start", ["preserve", "project", "random"])
@pytest.mark.parametrize("manifolds", MANIFOLDS, ids="-".join)
@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
@pytest.mark.parametrize("options", MOMENTA, ids=["plain", "momentum", "nesterov", "dampened"])
def test_steps_equal_a_loop_over_components(scheme, manifolds, start, options):
    # Compiling all of it takes a quarter of an hour: test_fused.py compares the rest of what is compiled with this.
    compiled = len(manifolds) == 3 and options == {"momentum": 0.9}
    for cutting, metric, rho in (("kernel", "start", 1.0), ("filter", "unit", 0.3), ("kernel", "embedded", None)):
        model = net()
        groups = pom_param_groups(
            model, scheme=scheme, manifolds=manifolds, start=start, cutting=cutting, block_size=4, seed=3
        )
        optimizer = FGSGD(groups, lr=0.2, rho=rho, metric=metric, fused=compiled, **options)
        if metric == "embedded":  # R other than 1
            for p, pom in optimizer.poms.items():
                optimizer.rescale(p, torch.rand_like(pom.radius) + 0.5)
        expected = references(model, optimizer, start, metric)
        assert len(expected) == 5
        for _ in range(3):
            random_grads(model)
            for p, (_, ref) in expected.items():
                pom = optimizer.poms[p]
                ref.step(reference.cut(p.grad.numpy(), pom.cutting.kind, pom.cutting.p), lr=0.2, rho=rho, **options)
            optimizer.step()
        for p, (weight, _) in expected.items():
            np.testing.assert_allclose(p.detach().numpy(), weight, rtol=0, atol=1e-9)
            assert optimizer.distance(p) < 1e-12


@pytest.mark.parametrize("start", ["project", "preserve"])
def test_placing_puts_each_component_where_the_formula_says(start):
    model = net()
    before = {p: p.detach().numpy().copy() for p in model.parameters()}
    optimizer = FGSGD(pom_param_groups(model, start=start, block_size=4))
    for p, pom in optimizer.poms.items():
        look = optimizer.pom(p)
        old = reference.cut(before[p], pom.cutting.kind, pom.cutting.p)
        for omega, s, manifold, was in zip(look.components, look.scale, look.manifold, old, strict=True):
            name = look.manifold_names[manifold]
            expected = was if start == "preserve" else reference.nearest(name, was)
            np.testing.assert_allclose(omega.numpy(), expected, atol=1e-12)
            unit = reference.scale_of(name, was) if start == "preserve" else np.eye(len(s))
            np.testing.assert_allclose(s.numpy(), unit, atol=1e-7)


def test_preserve_moves_no_weight_by_a_single_bit():
    model = net(torch.float32)
    before = copy.deepcopy(model.state_dict())
    FGSGD(pom_param_groups(model, start="preserve"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_drawing_groups_moves_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    pom_param_groups(model, start="project")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1, "maximize": True},
    ],
    ids=["plain", "decay", "nesterov", "dampened"],
)
def test_all_euclidean_without_normalizer_is_torch_sgd_bit_for_bit(options, channels_last):
    ours = nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 9, 1), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(8, 5, 9, 9)
    ours(x)
    if channels_last:
        ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    mine = FGSGD(pom_param_groups(ours, manifolds=["euclidean"]), lr=0.1, rho=None, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, **options)
    for _ in range(5):
        for model, optimizer in ((ours, mine), (theirs, sgd)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_all_euclidean_stays_torch_sgd_while_the_normalizer_is_one():
    # Small gradients: R_g² Γ₂ < 1, so 𝔤 = 1 and the manifold path must give SGD's bits too.
    ours, theirs = net(torch.float32), net(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    mine = FGSGD(pom_param_groups(ours, manifolds=["euclidean"]), lr=0.1, momentum=0.9, weight_decay=1e-3)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = 1e-3 * torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        sgd.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_plan_it_is_torch_sgd():
    ours, theirs = net(torch.float32), net(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    mine, sgd = (
        FGSGD(ours.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(mine.pom(p) is None and mine.distance(p) == 0 for p in ours.parameters())


def test_unconstrained_parameters_beside_constrained_ones_step_as_sgd(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, momentum=0.9, weight_decay=0.01)
    free = [p for p in tiny.parameters() if optimizer.pom(p) is None]
    copies = [p.detach().clone().requires_grad_() for p in free]
    sgd = torch.optim.SGD(copies, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert len(free) > 8
    for _ in range(3):
        random_grads(tiny)
        for p, c in zip(free, copies, strict=True):
            c.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
    assert all(torch.equal(p, c) for p, c in zip(free, copies, strict=True))


@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_float32_weights_stay_on_their_manifolds_within_1e_5(tiny, start):
    optimizer = FGSGD(pom_param_groups(tiny, start=start), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(200):
        random_grads(tiny, scale=10.0)
        optimizer.step()
    assert len(optimizer.poms) == 6
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5


def test_weight_decay_does_not_act_on_constrained_weights():
    weights = []
    for weight_decay in (0.0, 0.5):
        torch.manual_seed(1)
        model = net()
        optimizer = FGSGD(pom_param_groups(model), lr=0.1, weight_decay=weight_decay)
        random_grads(model)
        optimizer.step()
        weights.append([p.detach() for p in optimizer.poms])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_the_first_step_of_preserve_moves_about_as_far_as_sgd():
    # What `metric="start"` promises: the learning rate of SGD carries over.
    model = nn.Conv2d(64, 64, 3)
    optimizer = FGSGD(pom_param_groups(model), lr=1e-3, rho=None)
    before = model.weight.detach().clone()
    random_grads(model)
    optimizer.step()
    moved = (model.weight - before).norm() / (1e-3 * model.weight.grad.norm())
    assert 0.5 < moved < 1.5


def test_rescaling_changes_the_radius_and_nothing_else(tiny):
    optimizer = FGSGD(pom_param_groups(tiny, start="project"), lr=0.1)
    p = tiny.conv.weight
    before = optimizer.pom(p)
    radius = torch.rand(24) + 0.5
    optimizer.rescale(p, radius)
    after = optimizer.pom(p)
    torch.testing.assert_close(after.components, before.components * radius[:, None, None])
    torch.testing.assert_close(after.radius, radius)
    assert torch.equal(after.manifold, before.manifold)
    assert optimizer.distance(p) < 1e-5
    with pytest.raises(ValueError, match=r"radius: conv\.weight needs 24 positive numbers"):
        optimizer.rescale(p, -radius)
    with pytest.raises(ValueError, match="param: it is not on a product"):
        optimizer.rescale(tiny.norm.weight, radius)


def test_a_stray_weight_is_noticed_by_distance(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    with torch.no_grad():
        tiny.conv.weight[0, 0] *= 1.01
    assert math.isclose(optimizer.distance(tiny.conv.weight), 1.01**2 - 1, rel_tol=1e-3)


def test_dead_and_singular_components_stay_where_they_have_no_direction():
    model = nn.Conv2d(2, 3, 3, bias=False)
    with torch.no_grad():
        model.weight[0, 0] = 0
        model.weight[0, 1, :, 2] = model.weight[0, 1, :, 1]  # rank 2
        model.weight[1, 0] = torch.outer(torch.randn(3), torch.randn(3))  # rank 1
    for manifold in ALL:
        copied = copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"zero.*1 in weight"):
            optimizer = FGSGD(pom_param_groups(copied, manifolds=[manifold]), lr=0.1, momentum=0.9)
        for _ in range(20):
            random_grads(copied)
            optimizer.step()
        assert torch.equal(copied.weight[0, 0], torch.zeros(3, 3))
        assert optimizer.distance(copied.weight) < 1e-5
        assert (copied.weight[0, 1] - model.weight[0, 1]).norm() > 0.01
    rank = torch.linalg.matrix_rank(copied.weight, rtol=1e-5)  # Stiefel keeps the whole Gram matrix, so the rank
    assert rank.tolist() == [[0, 2], [1, 3], [3, 3]]


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("smallest", [1e-3, 1e-4, 1e-5, 1e-6, 0.0])
def test_a_weight_that_is_nearly_singular_can_be_projected_and_steps_on_as_it_would_have(smallest, fused):
    model = nn.Conv2d(2, 40, 3, bias=False)
    with torch.no_grad():
        u, _, vh = torch.linalg.svd(model.weight.double())
        model.weight.copy_(u @ torch.diag(torch.tensor([0.12, 0.09, smallest])).double() @ vh)
    twin = copy.deepcopy(model)
    for each, projects in ((model, True), (twin, False)):
        torch.manual_seed(1)
        optimizer = FGSGD(pom_param_groups(each, manifolds=["stiefel"]), lr=0.1, momentum=0.9, fused=fused)
        for _ in range(5):
            random_grads(each)
            optimizer.step()
            if projects:
                optimizer.project()
        assert optimizer.distance(each.weight) < 1e-5
    sigma = torch.linalg.svdvals(model.weight.double())
    torch.testing.assert_close(sigma[..., :2], torch.tensor([0.12, 0.09]).double().expand(40, 2, 2), atol=0, rtol=1e-5)
    assert (sigma[..., 2] - smallest).abs().max() < 2e-7
    torch.testing.assert_close(model.weight, twin.weight, atol=1e-5, rtol=0)


def test_a_state_without_momentum_is_loaded_as_it_is():
    optimizer = FGSGD(pom_param_groups(net()), lr=0.1)
    before = optimizer.state_dict()["state"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == before == {}


def test_a_closure_is_evaluated_with_gradients():
    model = net()
    optimizer = FGSGD(pom_param_groups(model), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model[4](torch.ones(1, 7, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


def test_a_tensor_learning_rate_gives_the_same_step():
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.manual_seed(2)
        model = net()
        optimizer = FGSGD(pom_param_groups(model), lr=lr, momentum=0.9)
        random_grads(model)
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_weights_are_stepped_in_float32():
    model = nn.Linear(64, 32).bfloat16()
    optimizer = FGSGD(pom_param_groups(model, start="project"), lr=0.1, momentum=0.9)
    for _ in range(20):
        random_grads(model)
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert optimizer.distance(model.weight) < 0.02  # a rounding to 8 bits away


# Checkpoints


def step_n(model, optimizer, n, seed):
    torch.manual_seed(seed)
    for _ in range(n):
        random_grads(model)
        optimizer.step()


@pytest.mark.parametrize("load_model_first", [True, False])
@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_a_loaded_state_goes_on_bit_for_bit(tmp_path, start, load_model_first):
    model = net(torch.float32)
    optimizer = FGSGD(pom_param_groups(model, start=start, seed=5), lr=0.1, momentum=0.9)
    step_n(model, optimizer, 3, seed=1)
    for p, pom in optimizer.poms.items():
        optimizer.rescale(p, torch.rand_like(pom.radius) + 0.5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    other = net(torch.float32)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if load_model_first:
        other.load_state_dict(state["model"])
    resumed = FGSGD(pom_param_groups(other, start=start, seed=6), lr=0.1, momentum=0.9)  # other index sets: replaced
    if not load_model_first:
        other.load_state_dict(state["model"])
    with pytest.warns(UserWarning, match=r"of 5 weights \(0\.weight first\) are those of the checkpoint"):
        resumed.load_state_dict(state["optimizer"])
    for p, q in zip(optimizer.poms, resumed.poms, strict=True):
        a, b = optimizer.pom(p), resumed.pom(q)
        assert all(torch.equal(x, y) for x, y in zip(a[:2] + a[3:6], b[:2] + b[3:6], strict=True))

    step_n(model, optimizer, 3, seed=2)
    step_n(other, resumed, 3, seed=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_fit_is_refused_by_name():
    model = net()
    state = FGSGD(pom_param_groups(model)).state_dict()
    with pytest.raises(ValueError, match=r"0\.weight was cut into 24 kernel components of 3 x 3, here into"):
        FGSGD(pom_param_groups(model, cutting="filter")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"parameter groups hold \[5, 5\] parameters, this optimizer's \[10\]"):
        FGSGD(model.parameters()).load_state_dict(state)
    groups = [{"params": g["params"]} for g in pom_param_groups(model)]
    partial = FGSGD(groups)
    partial.constrain(pom_param_groups(model, include=["4.weight"]).plan)
    with pytest.raises(ValueError, match=r"0\.weight is constrained here but was not when it was saved"):
        FGSGD(pom_param_groups(model)).load_state_dict(partial.state_dict())
    with pytest.raises(ValueError, match="holds no products of manifolds, so another optimizer saved it"):
        FGSGD(pom_param_groups(model)).load_state_dict(
            torch.optim.SGD([{"params": g["params"]} for g in groups]).state_dict()
        )


def test_a_state_that_torch_has_flattened_is_refused_with_the_reason():
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = net()
    optimizer = FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9)
    step_n(model, optimizer, 1, seed=0)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=True, which drops them"):
        set_optimizer_state_dict(model, optimizer, state, options=flat)


def test_a_run_of_torch_sgd_can_be_continued():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step_n(model, sgd, 2, seed=1)
    optimizer = FGSGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(sgd.state_dict())
    optimizer.constrain(pom_param_groups(model).plan)
    weight = model[0].weight
    pom = optimizer.poms[weight]
    buffer = pom.cutting.cut(optimizer.state[weight]["momentum_buffer"])
    geometry = pom.geometry("start", (pom.cutting.count,))
    points = geometry.unit(pom.cutting.cut(weight.detach()))
    torch.testing.assert_close(geometry.tangent(points, buffer), buffer)  # the buffer is a tangent vector now
    step_n(model, optimizer, 2, seed=2)
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-12


def test_an_unfrozen_weight_is_constrained_by_the_plan(tiny):
    tiny.conv.weight.requires_grad_(False)
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    assert optimizer.pom(tiny.conv.weight) is None
    tiny.conv.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [tiny.conv.weight], "lr": 0.01})
    assert optimizer.pom(tiny.conv.weight).components.shape == (24, 3, 3)


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_a_weight_that_is_unfrozen_where_it_is_held_is_placed_in_the_next_step(tiny, start):
    tiny.conv.weight.requires_grad_(False)
    before = tiny.conv.weight.detach().clone()
    optimizer = FGSGD(tiny.parameters(), lr=0.1, momentum=0.9)
    optimizer.constrain(pom_param_groups(tiny, start=start).plan)
    for p in tiny.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(tiny.conv.weight, before)
    assert optimizer.pom(tiny.conv.weight) is None
    tiny.conv.weight.requires_grad_(True)
    step_n(tiny, optimizer, 1, seed=5)
    placed = tiny.conv.weight.detach().clone()
    assert optimizer.distance(tiny.conv.weight) < 1e-5
    if start == "project":  # its gradient was of where it had been, so placing it is all that was done
        expected = copy.deepcopy(tiny)
        expected.conv.weight.data.copy_(before)
        FGSGD(pom_param_groups(expected, start=start), lr=0.1)
        torch.testing.assert_close(placed, expected.conv.weight.detach())
    assert not torch.equal(placed, before)
    step_n(tiny, optimizer, 1, seed=6)
    assert not torch.equal(tiny.conv.weight, placed)
    assert optimizer.distance(tiny.conv.weight) < 1e-5


def test_a_step_under_autocast_that_places_the_first_weights_keeps_the_precision_of_the_geometry():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    net[1].weight.requires_grad_(False)
    optimizer = FGSGD([net[1].weight, net[1].bias], lr=0.1, fused=False)
    plan = pom_param_groups(net, manifolds=["stiefel"], start="preserve", exclude=()).plan
    optimizer.constrain(plan)
    assert not optimizer.poms
    net[1].weight.requires_grad_(True).grad = torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert len(optimizer.poms) == 1
    assert optimizer.distance(net[1].weight) < 1e-5


def test_a_state_is_loaded_where_a_weight_is_still_frozen_that_was_not_when_it_was_saved(tiny):
    def optimizer_of(model, seed):
        optimizer = FGSGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.constrain(pom_param_groups(model, seed=seed).plan)
        return optimizer

    optimizer = optimizer_of(tiny, seed=3)
    step_n(tiny, optimizer, 2, seed=0)
    fresh = copy.deepcopy(tiny)
    fresh.conv.weight.requires_grad_(False)
    resumed = optimizer_of(fresh, seed=4)
    with pytest.warns(UserWarning, match="are those of the checkpoint"):
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.conv.weight.requires_grad_(True)
    assert torch.equal(resumed.pom(fresh.conv.weight).group, optimizer.pom(tiny.conv.weight).group)
    for model, its in ((tiny, optimizer), (fresh, resumed)):
        step_n(model, its, 2, seed=7)
    torch.testing.assert_close(dict(fresh.named_parameters()), dict(tiny.named_parameters()))


@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("first", ["the weights", "the state"])
def test_a_weight_that_was_frozen_when_it_was_saved_goes_on_as_one_that_is_unfrozen(tiny, start, first):
    def optimizer_of(model):
        optimizer = FGSGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.constrain(pom_param_groups(model, start=start).plan)
        return optimizer

    drawn = copy.deepcopy(tiny)
    tiny.conv.weight.requires_grad_(False)
    optimizer = optimizer_of(tiny)
    step_n(tiny, optimizer, 2, seed=0)
    state, weights = copy.deepcopy((optimizer.state_dict(), tiny.state_dict()))
    torch.nn.init.normal_(drawn.conv.weight)
    resumed = optimizer_of(drawn)  # which places the weight: it is not frozen here
    if first == "the weights":
        drawn.load_state_dict(weights)
    resumed.load_state_dict(state)
    drawn.load_state_dict(weights)
    tiny.conv.weight.requires_grad_(True)
    for model, its in ((tiny, optimizer), (drawn, resumed)):
        step_n(model, its, 3, seed=7)
        assert its.distance(model.conv.weight) < 1e-5
        assert its.pom(model.conv.weight).start == start
    torch.testing.assert_close(dict(drawn.named_parameters()), dict(tiny.named_parameters()), rtol=0, atol=0)


def test_one_weight_that_was_frozen_is_placed_where_another_is_frozen_instead():
    def optimizer_of(model, frozen):
        model[frozen].weight.requires_grad_(False)
        optimizer = FGSGD(model.parameters(), lr=0.1)
        optimizer.constrain(pom_param_groups(model, exclude=()).plan)
        return optimizer

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, frozen=1)
    resumed.load_state_dict(optimizer_of(model, frozen=0).state_dict())
    other(torch.ones(1, 8)).sum().backward()
    resumed.step()
    assert resumed.pom(other[0].weight) is not None
    assert resumed.pom(other[1].weight) is not None


@pytest.mark.parametrize(("fused", "dtype"), [(False, torch.float32), (None, torch.float32), (None, torch.bfloat16)])
@pytest.mark.parametrize("far", [False, True])
def test_integers_are_taken_as_options_wherever_numbers_are(fused, dtype, far):
    def stepped(number):
        torch.manual_seed(0)
        layer = nn.Linear(32, 32).to(dtype)
        groups = pom_param_groups(layer, manifolds=["sphere", "euclidean"], exclude=())
        options = {name: number(value) for name, value in {"weight_decay": 1, "momentum": 1}.items()}
        optimizer = FGSGD(groups, lr=number(50 if far else 1), rho=None if far else 1, fused=fused, **options)
        for _ in range(3):
            layer(torch.ones(1, 32, dtype=dtype)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(stepped(int), stepped(float))


def test_groups_of_several_models_and_of_ones_own_are_put_together_in_a_list(tiny):
    other, head = net(torch.float32), nn.Linear(4, 2)
    groups = [
        *pom_param_groups(tiny, start="project"),
        *pom_param_groups(other),
        {"params": head.parameters(), "lr": 0.01},
    ]
    optimizer = FGSGD(groups, lr=0.1)
    alone = [FGSGD(pom_param_groups(tiny, start="project"), lr=0.1), FGSGD(pom_param_groups(other), lr=0.1)]
    assert set(optimizer.poms) == set(alone[0].poms) | set(alone[1].poms) != set()
    assert optimizer.pom(tiny.conv.weight).start == "project"
    assert optimizer.pom(other[0].weight).start == "preserve"
    assert optimizer.param_groups[-1]["lr"] == 0.01
    state = optimizer.state_dict()
    assert all(type(group) is dict and "plan" not in group for group in state["param_groups"])
    later = FGSGD(head.parameters(), lr=0.1)
    later.add_param_group(pom_param_groups(other)[0])
    assert set(later.poms) == set(alone[1].poms)


def test_groups_of_several_models_have_names_of_their_own():
    first, second, third = (nn.Conv2d(8, 8, 3) for _ in range(3))
    optimizer = FGSGD([*pom_param_groups(first), *pom_param_groups(second), {"params": [], "name": "mine"}], lr=0.1)
    for group in pom_param_groups(third, no_weight_decay=True):
        optimizer.add_param_group(group)
    names = ["pom", "euclidean", "pom, 2", "euclidean, 2", "mine", "pom, 3", "euclidean, no weight decay"]
    assert [group["name"] for group in optimizer.param_groups] == names
    assert len(optimizer.poms) == 3


def test_an_optimizer_without_parameters_steps_as_sgd_does():
    FGSGD([{"params": []}], lr=0.1).step()


def test_groups_changed_within_their_list_keep_its_plan(tiny):
    groups = pom_param_groups(tiny)
    constrained = set(FGSGD(groups, lr=0.1).poms)
    groups[:] = [{**group, "weight_decay": 0.1} for group in groups]
    assert set(FGSGD(groups, lr=0.1).poms) == constrained != set()


def test_groups_without_their_plan_are_noticed(tiny):
    with pytest.warns(UserWarning, match="'pom, lr x 0.5' has lost the plan"):
        optimizer = FGSGD([{**g, "name": g["name"] + ", lr x 0.5"} for g in pom_param_groups(tiny)], lr=0.1)
    assert not optimizer.poms


def test_a_copied_optimizer_steps_alike(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, momentum=0.9)
    model, twin = copy.deepcopy((tiny, optimizer))
    step_n(tiny, optimizer, 2, seed=1)
    step_n(model, twin, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), model.parameters(), strict=True))


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr: -0.1 is not a finite number of at least 0"),
        ({"lr": math.nan}, "lr: nan is not a finite number"),
        ({"lr": math.inf}, "lr: inf is not a finite number"),
        ({"lr": torch.ones(2)}, r"lr: a tensor lr must hold one number, got shape \(2,\)"),
        ({"momentum": -1.0}, "momentum: -1.0 is not"),
        ({"weight_decay": math.nan}, "weight_decay: nan is not"),
        ({"dampening": math.nan}, "dampening: nan is not"),
        ({"nesterov": True}, "nesterov: it needs a momentum above 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
        ({"rho": -1.0}, "rho: -1.0 is not"),
        ({"rho": math.nan}, "rho: nan is not"),
        ({"metric": "canonical"}, "metric: unknown metric 'canonical'; choose from 'start', 'unit', 'embedded'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_wrong_options_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        FGSGD(pom_param_groups(tiny), **options)


def test_a_weight_that_is_not_finite_is_named(tiny):
    with torch.no_grad():
        tiny.conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"conv\.weight: the weight holds NaN"):
        FGSGD(pom_param_groups(tiny))


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_weights_that_cannot_all_be_placed_are_not_placed_at_all_and_can_be_once_they_are_mended(start):
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    groups = pom_param_groups(layers, start=start, exclude=())
    last = layers[1].weight
    before = [p.detach().clone() for p in layers.parameters()]
    kept = last[0, 0].item()
    last.data[0, 0] = math.nan
    optimizer = FGSGD(layers.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1\.weight: the weight holds NaN"):
        optimizer.constrain(groups.plan)
    assert not optimizer.poms
    last.data[0, 0] = kept
    assert all(torch.equal(p, old) for p, old in zip(layers.parameters(), before, strict=True))
    optimizer.constrain(groups.plan)
    assert len(optimizer.poms) == 2


def test_a_group_whose_weights_cannot_be_placed_is_not_added():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = FGSGD(pom_param_groups(layers, exclude=()), lr=0.1)
    last = nn.Linear(8, 8)
    (group, *_) = pom_param_groups(last, exclude=())
    last.weight.data[0, 0] = math.inf
    held = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="the weight holds NaN or infinite"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == held
    last.weight.data[0, 0] = 0.0
    optimizer.add_param_group(group)
    assert optimizer.pom(last.weight) is not None


def test_constraining_twice_or_by_a_foreign_plan_is_refused(tiny):
    optimizer = FGSGD(pom_param_groups(tiny))
    with pytest.raises(ValueError, match="already"):
        optimizer.constrain(pom_param_groups(tiny).plan)
    with pytest.raises(ValueError, match="plan: it knows none"):
        FGSGD(tiny.parameters()).constrain(pom_param_groups(net()).plan)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("rho", [1.0, None])
def test_a_gradient_that_is_not_finite_moves_nothing_and_names_the_weights(tiny, bad, rho):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, momentum=0.9, rho=rho)
    for p in tiny.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    tiny.conv.weight.grad[0, 0, 0, 0] = bad
    weights, buffers = copy.deepcopy(tiny.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(FloatingPointError, match=r"the gradients of 1 of 6 constrained weights .*first: conv\.weight"):
        optimizer.step()
    assert all(torch.equal(x, weights[name]) for name, x in tiny.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], buffers[index]["momentum_buffer"])
    tiny.conv.weight.grad[0, 0, 0, 0] = 1.0
    optimizer.step()  # and goes on
    assert all(x.isfinite().all() for x in tiny.state_dict().values())


@pytest.mark.parametrize("rho", [1.0, None])
def test_a_gradient_that_is_not_finite_is_noticed_in_each_of_two_models_with_the_same_names(rho):
    models = [nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]
    groups = [group for model in models for group in pom_param_groups(model, exclude=())]
    optimizer = FGSGD(groups, lr=0.1, rho=rho)
    for model in models:
        random_grads(model)
    models[0][0].weight.grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the gradients of 1 of 2 constrained weights are not finite"):
        optimizer.step()


def test_a_first_step_that_is_refused_is_as_good_as_none(tiny):
    found = []
    for bad in (None, math.nan):
        model = copy.deepcopy(tiny)
        optimizer = FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9, dampening=0.5)
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if bad is not None:
            kept = model.conv.weight.grad.clone()
            model.conv.weight.grad[0, 0, 0, 0] = bad
            with pytest.raises(FloatingPointError, match="no weight was moved"):
                optimizer.step()
            assert not any("momentum_buffer" in state for state in optimizer.state.values())
            model.conv.weight.grad = kept
        optimizer.step()  # the first: its gradient is taken whole, and not halved by the dampening
        found.append([*model.parameters(), *(optimizer.state[p]["momentum_buffer"] for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("average", [False, True])
def test_a_gradient_that_is_large_in_its_metric_alone_is_refused_with_what_to_do(average):
    layer = nn.Conv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1e-12)
    groups = pom_param_groups(layer, start="project")  # stands at 1 from now on, with the metric of where it stood
    layer.weight.grad = 1e8 * torch.randn_like(layer.weight)
    optimizer = FGSGD(groups, lr=1.0, rho="average" if average else 1.0)
    before = layer.weight.detach().clone()
    with pytest.raises(
        FloatingPointError, match=r"the Riemannian norm of a gradient exceeds 1e\+18 \(weight: .*metric=\"unit\""
    ):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    FGSGD(pom_param_groups(layer, start="project"), lr=1.0, metric="unit").step()
    assert not torch.equal(layer.weight, before)


def test_huge_and_tiny_gradients_move_the_weights_on_their_manifolds(tiny):
    for size in (1e16, 1e-30, 0.0):
        for rho in (1.0, None, "average"):
            optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, rho=rho)
            for p in tiny.parameters():
                p.grad = torch.full_like(p, size) if p in optimizer.poms else torch.zeros_like(p)
            optimizer.step()
            for p in optimizer.poms:
                assert p.isfinite().all()
                assert optimizer.distance(p) < 1e-5


def test_the_state_of_half_precision_weights_keeps_its_precision_in_a_checkpoint():
    model = nn.Linear(8, 4, bias=False).bfloat16()
    optimizer = FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9, rho="average")
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    other = FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9, rho="average")
    other.load_state_dict(optimizer.state_dict())
    for key in ("momentum_buffer", "average"):
        mine, theirs = optimizer.state[model.weight][key], other.state[model.weight][key]
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("then", "now"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_state_that_is_loaded_in_another_precision_has_it_as_with_sgd(then, now):
    def make(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
        return model, FGSGD(pom_param_groups(model), lr=0.1, momentum=0.9)

    model, optimizer = make(then)
    stepped(model, optimizer)
    other, resumed = make(now)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    stepped(other, resumed)
    assert {resumed.state[p]["momentum_buffer"].dtype for p in other.parameters()} == {now}


def stepped(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("start", ["preserve", "project"])
def test_weights_that_others_moved_off_their_manifolds_are_noticed_once_and_start_from_the_nearest_point(tiny, start):
    optimizer = FGSGD(pom_param_groups(tiny, start=start), lr=0.1, momentum=0.9)
    stepped(tiny, optimizer)
    nearest = copy.deepcopy(tiny.conv.weight)
    with torch.no_grad():
        tiny.conv.weight.add_(0.3 * torch.randn_like(tiny.conv.weight))
        nearest.copy_(tiny.conv.weight)
    optimizer.poms[tiny.conv.weight].project(nearest.data)
    for p in tiny.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.warns(UserWarning, match=r"1 constrained weights were changed by others .*conv\.weight \(\d+"):
        optimizer.step()
    torch.testing.assert_close(tiny.conv.weight, nearest, atol=1e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(tiny, optimizer)


def test_weights_that_are_written_to_and_stay_on_their_manifolds_are_not_reported(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    stepped(tiny, optimizer)
    state = copy.deepcopy(tiny.state_dict())
    stepped(tiny, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.load_state_dict(state)  # an earlier point of the same manifolds
        optimizer.rescale(tiny.conv.weight, torch.full((24,), 2.0))
        stepped(tiny, optimizer)


def test_an_average_of_weights_is_noticed_by_the_next_step_and_can_be_brought_back(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=5.0)
    average = torch.optim.swa_utils.AveragedModel(tiny)
    for _ in range(4):
        stepped(tiny, optimizer)
        average.update_parameters(tiny)
    tiny.load_state_dict(average.module.state_dict())
    assert max(optimizer.distance(p) for p in optimizer.poms) > 1e-3
    optimizer.project()
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(tiny, optimizer)


@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("name", ["sphere", "oblique", "stiefel"])
def test_bringing_a_weight_back_gives_the_nearest_point_of_its_manifold(name, start):
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = FGSGD(pom_param_groups(model, manifolds=[name], block_size=2, start=start, exclude=()), lr=0.1)
    optimizer.rescale(model.weight, torch.tensor([0.7, 1.5], dtype=torch.float64))
    pom = optimizer.poms[model.weight]
    on = model.weight.detach().clone()
    stray = on + torch.randn_like(on)
    model.weight.data.copy_(stray)
    optimizer.project(model.weight)
    best = (model.weight - stray).norm().item()
    assert optimizer.distance(model.weight) < 1e-12
    for _ in range(300):  # other points of the same manifolds are not nearer
        omega = pom.cutting.cut(torch.randn_like(on) * 0.2 + model.weight.detach()).clone()
        other = torch.nn.Parameter(pom.cutting.join(omega))
        pom.project(other.data)
        assert (other - stray).norm().item() >= best - 1e-9


def through_data(weight, factor):
    weight.data.mul_(factor)


def through_a_vector(weight, factor):
    vector_to_parameters(parameters_to_vector([weight]) * factor, [weight])


def by_new_data(weight, factor):
    weight.data = weight.data * factor


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize(
    ("change", "factor"),
    [(through_data, 0.3), (through_data, 0.94), (through_a_vector, 0.9), (by_new_data, 0.5), (through_data, 30.0)],
)
@pytest.mark.parametrize("manifolds", [("stiefel",), ALL], ids="-".join)
def test_weights_changed_without_a_trace_come_back_to_their_manifolds(manifolds, change, factor, start, fused):
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Linear(64, 32, bias=False))
    plan = pom_param_groups(layers, manifolds=manifolds, start=start, exclude=())
    optimizer = FGSGD(plan, lr=0.1, momentum=0.9, fused=fused)
    for p in layers.parameters():
        before, versions = p.detach().clone(), p._version
        change(p, factor)
        assert p._version == versions  # so nothing but the weight itself can tell
        p.grad = torch.zeros_like(p)
        with pytest.warns(UserWarning, match="changed by others and left their manifolds"):
            optimizer.step()
        assert optimizer.distance(p) < 1e-5
        torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-5)
        p.grad = None


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize(
    ("manifold", "factor"), [("sphere", 0.5), ("oblique", 2.0), ("stiefel", 0.999), ("stiefel", 1.01)]
)
def test_what_the_retraction_itself_makes_good_needs_no_warning(manifold, factor, fused):
    layer = nn.Linear(64, 32, bias=False)
    optimizer = FGSGD(pom_param_groups(layer, manifolds=(manifold,), exclude=()), lr=0.1, fused=fused)
    before = layer.weight.detach().clone()
    layer.weight.data.mul_(factor)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-5)


def test_a_weight_that_became_nan_without_a_trace_is_named_and_nothing_moves(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    random_grads(tiny)
    weight = next(p for p in tiny.parameters() if optimizer.pom(p) is not None)
    weight.data[0] = math.nan
    before = [p.detach().clone() for p in tiny.parameters()]
    with pytest.raises(FloatingPointError, match=f"hold values that are not finite: {optimizer.poms[weight].name}"):
        optimizer.step()
    for p, old in zip(tiny.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("change", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("manifolds", [("sphere",), ("stiefel",), ALL], ids="-".join)
def test_a_model_whose_precision_is_changed_goes_on_as_one_that_had_it(manifolds, change, stepped):
    first, then = change
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Linear(64, 32, bias=False)).to(first)
    optimizer = FGSGD(pom_param_groups(layers, manifolds=manifolds, exclude=()), lr=0.1, momentum=0.9)
    grads = [torch.randn_like(p) for p in layers.parameters()]
    for p, grad in zip(layers.parameters(), grads, strict=True):
        p.grad = grad.clone() if stepped else None
    optimizer.step()
    twin, its = copy.deepcopy((layers, optimizer))
    layers.to(then)
    for stepping, model in ((optimizer, layers), (its, twin)):
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.to(p)
        stepping.step()
        stepping.step()
    for p, q in zip(layers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().to(then), rtol=0, atol=1e-5)
        assert optimizer.distance(p) < 1e-5
        assert optimizer.state[p]["momentum_buffer"].dtype == then


@pytest.mark.parametrize("start", ["project", "random", "preserve"])
def test_constraining_rescaling_and_bringing_back_are_as_exact_under_autocast_as_without(start):
    def results(autocast):
        torch.manual_seed(0)
        layer = nn.Conv2d(8, 16, 3, bias=False)
        plan = pom_param_groups(layer, start=start, cutting="filter").plan
        optimizer = FGSGD([layer.weight], lr=0.01, momentum=0.9, fused=False)
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()  # plain SGD's, whose momentum goes along
        found = []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.constrain(plan)
            found += [layer.weight.detach().clone(), optimizer.state[layer.weight]["momentum_buffer"].clone()]
            optimizer.rescale(layer.weight, 1.5 * optimizer.pom(layer.weight).radius)
            found += [layer.weight.detach().clone(), torch.tensor(optimizer.distance(layer.weight))]
            with torch.no_grad():
                layer.weight.mul_(1.01).add_(0.01)
            found.append(torch.tensor(optimizer.distance(layer.weight)))
            optimizer.project()
        return [*found, layer.weight.detach()]

    for under, exact in zip(results(True), results(False), strict=True):
        assert torch.equal(under, exact)


@pytest.mark.parametrize("fused", [False, None])
def test_a_default_device_does_not_move_the_step(tiny, fused):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, momentum=0.9, fused=fused)
    twin, its = copy.deepcopy((tiny, optimizer))
    random_grads(tiny)
    for p, q in zip(tiny.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    its.step()
    with torch.device("meta"):  # what set_default_device does, undone without a trace
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), twin.parameters(), strict=True))


def test_answers_from_several_devices_are_put_together():
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = together([torch.ones((), device=device) for device in ("cuda:0", "cpu", "cuda:1")])
    assert found.shape == (3,)
    assert found.device == torch.device("cuda:0")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_constrained_weight_that_is_not_finite_stops_the_step_and_is_named(tiny, bad):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    stepped(tiny, optimizer)
    with torch.no_grad():
        tiny.linear.weight[0, 0] = bad
    before = tiny.conv.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"hold values that are not finite: linear\.weight"):
            stepped(tiny, optimizer)
    assert torch.equal(tiny.conv.weight, before)


def test_an_unchanged_lambda_changes_no_weight_by_a_bit(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    before = copy.deepcopy(tiny.state_dict())
    for p, pom in optimizer.poms.items():
        optimizer.rescale(p, torch.ones_like(pom.radius))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("scheme", ["pi", "po", "pio"])
def test_index_sets_and_radii_add_less_than_3_percent_to_a_checkpoint_of_resnet50(scheme):
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    plan = draw_plan(model, scheme=scheme)
    weights = 2 * 4 * sum(p.numel() for p in model.parameters())  # with momentum
    added = 0
    for weight in plan.weights.values():
        packed = pack(weight.index_sets)
        assert unpack(packed, weight.cutting).group.equal(weight.index_sets.group)
        added += sum(x.numel() * x.element_size() for x in packed.values() if isinstance(x, torch.Tensor))
        added += 4 * (int(weight.cutting.reads().max()) + 1)  # R, by input channel
    assert added < 0.03 * weights


def test_radii_of_a_layer_are_stored_by_channel_where_they_can_and_come_back_either_way():
    for radius in (torch.rand(4).repeat(6) + 0.5, torch.rand(24) + 0.5):
        model = nn.Conv2d(4, 6, 3, bias=False)
        optimizer = FGSGD(pom_param_groups(model), lr=0.1)
        optimizer.rescale(model.weight, radius)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["pom"][0]["radius"].numel() == len(radius.unique())
        other = FGSGD(pom_param_groups(copy.deepcopy(model)), lr=0.1)
        other.load_state_dict(state)
        (pom,) = other.poms.values()
        assert torch.equal(pom.radius, radius)


@pytest.mark.parametrize("fused", [True, False])
def test_no_constrained_weight_moves_at_a_learning_rate_of_zero_and_momentum_is_gathered(tiny, fused):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.0, momentum=0.9, fused=fused)
    optimizer.rescale(tiny.linear.weight, torch.full_like(optimizer.pom(tiny.linear.weight).radius, 3.0))
    with torch.no_grad():
        tiny.conv.weight.mul_(2)  # astray: a state may yet be loaded to which this belongs
    before = {p: p.detach().clone() for p in optimizer.poms}
    for _ in range(2):
        tiny(torch.randn(4, 4, 6, 6)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, weight) for p, weight in before.items())
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in optimizer.poms)


def test_torchs_distributed_checkpoint_api_loads_a_state_after_the_weights(tiny):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1, momentum=0.9)
    optimizer.rescale(tiny.conv.weight, torch.full_like(optimizer.pom(tiny.conv.weight).radius, 0.5))
    tiny(torch.randn(4, 4, 6, 6)).square().sum().backward()
    optimizer.step()
    model_state, state = copy.deepcopy(get_state_dict(tiny, optimizer))
    other = type(tiny)()
    fresh = FGSGD(pom_param_groups(other, seed=1), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FGSGD: the manifolds, groups or start")
        set_state_dict(other, fresh, model_state_dict=model_state, optim_state_dict=state)
    for p, q in zip(tiny.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], fresh.state[q]["momentum_buffer"])
        assert fresh.distance(q) < 1e-5
        assert (optimizer.pom(p) is None) or torch.equal(optimizer.pom(p).radius, fresh.pom(q).radius)


def test_momentum_of_plain_sgd_is_taken_over_in_the_metric():
    # In coordinates √m · q: a buffer of SGD goes on at about the speed that it had; with ρ over 𝔤, see test_takeover.py.
    layer = nn.Conv2d(4, 6, 3, bias=False).double()
    optimizer = FGSGD(layer.parameters(), lr=0.1, momentum=0.9, rho=None)
    velocity = torch.randn_like(layer.weight)
    optimizer.state[layer.weight]["momentum_buffer"] = velocity.clone()
    optimizer.constrain(pom_param_groups(layer, manifolds=["sphere"]).plan)
    r = layer.weight.detach().flatten(2).norm(dim=2)[..., None, None]
    q = layer.weight.detach() / r
    expected = (velocity - q * (q * velocity).sum((2, 3), keepdim=True)) * r / r.square().mean().sqrt()
    torch.testing.assert_close(optimizer.state[layer.weight]["momentum_buffer"], expected)


def test_curvatures_follow_a_rescale():
    layer = nn.Conv2d(4, 6, 3)
    optimizer = FGSGD(pom_param_groups(layer, start="project"), lr=0.1, metric="embedded")
    (pom,) = optimizer.poms.values()
    before = pom.curvatures("embedded").clone()
    optimizer.rescale(layer.weight, torch.full((24,), 0.5))
    torch.testing.assert_close(pom.curvatures("embedded"), 4 * before)


def test_euclidean_components_are_not_rescaled():
    layer = nn.Conv2d(4, 6, 3)
    optimizer = FGSGD(pom_param_groups(layer, manifolds=["sphere", "euclidean"]), lr=0.1)
    before = optimizer.pom(layer.weight)
    optimizer.rescale(layer.weight, torch.full((24,), 2.0))
    after, free = optimizer.pom(layer.weight), before.manifold == 1
    assert torch.equal(after.components[free], before.components[free])
    assert torch.equal(after.radius, torch.where(free, 1.0, 2.0))


def test_a_layer_of_zeros_can_be_projected_and_stepped():
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = FGSGD(pom_param_groups(layer, start="project", exclude=()), lr=0.1)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(8, 8)
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert optimizer.distance(layer.weight) < 1e-5


def test_euclidean_components_in_a_pom_maximise_and_decay_as_sgd_does():
    def stepped(make):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4, bias=False).double()
        optimizer = make(layer)
        for _ in range(3):
            layer.weight.grad = 1e-3 * torch.randn_like(layer.weight)  # so small that 𝔤 is 1
            optimizer.step()
        return layer.weight

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "maximize": True}
    ours = stepped(lambda x: FGSGD(pom_param_groups(x, manifolds=["euclidean"], exclude=()), **options))
    torch.testing.assert_close(ours, stepped(lambda x: torch.optim.SGD(x.parameters(), **options)))


def test_a_later_groups_options_are_checked_too(tiny):
    tiny.conv.weight.requires_grad_(False)
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    with pytest.raises(ValueError, match="rho: -1"):
        optimizer.add_param_group({"params": [tiny.conv.weight], "rho": -1.0})
    assert len(optimizer.param_groups) == 2


def test_a_weight_that_others_changed_is_noticed_after_a_rescale_too(tiny):
    optimizer = FGSGD(pom_param_groups(tiny, manifolds=["sphere"]), lr=0.1)
    with torch.no_grad():
        tiny.conv.weight.add_(0.3 * torch.randn_like(tiny.conv.weight))
    optimizer.rescale(tiny.conv.weight, torch.full((24,), 2.0))
    for p in tiny.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="1 constrained weights were changed by others"):
        optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_radius_that_is_not_finite_is_refused(tiny, bad):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    with pytest.raises(ValueError, match="needs 24 positive numbers"):
        optimizer.rescale(tiny.conv.weight, torch.full((24,), bad))


def test_a_lost_plan_is_said_once(tiny, recwarn):
    groups = [dict(g) for g in pom_param_groups(tiny, no_weight_decay=["conv.weight"])]
    assert sum(g["name"].startswith("pom") for g in groups) == 2
    FGSGD(groups, lr=0.1)
    assert sum("has lost the plan" in str(w.message) for w in recwarn) == 1


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_an_average_goes_on_in_the_precision_that_the_model_is_brought_to(tiny, dtypes):
    def step():
        optimizer.zero_grad()
        tiny(torch.ones(2, 4, 6, 6, dtype=tiny.conv.weight.dtype)).square().mean().backward()
        optimizer.step()

    tiny.to(dtypes[0])
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.01, rho="average")
    step()
    before = optimizer.state[tiny.conv.weight]["average"].clone()
    tiny.to(dtypes[1])
    torch.testing.assert_close(optimizer.state[tiny.conv.weight]["average"], before)
    step()
    after = optimizer.state[tiny.conv.weight]["average"]
    assert after.dtype == dtypes[1]
    assert 0 < (after - before.to(dtypes[1])).norm() < 0.1 * before.norm()


def test_a_layer_in_the_place_of_its_weight_is_refused(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.01)
    for ask in (optimizer.distance, optimizer.pom, optimizer.project):
        with pytest.raises(
            TypeError, match=r"param: a Conv2d is no parameter; give the weight itself, as layer.weight"
        ):
            ask(tiny.conv)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "dampening", "rho"])
@pytest.mark.parametrize("value", ["1e-3", [1.0], {}])
def test_an_option_that_is_no_number_is_refused_by_name(tiny, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .* is not a "):
        FGSGD(tiny.parameters(), **{name: value})

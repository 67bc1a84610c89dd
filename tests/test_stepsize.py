import copy
import math

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.average import distance_to_average
from lightning_fgsgd.manifolds import get_manifold
from lightning_fgsgd.stepsize import step_normalizer


def test_eq_7_is_eq_5_on_spheres():
    norm = torch.linspace(0, 50, 1001, dtype=torch.float64)
    eq7 = (norm**2 * (2 + norm) ** 2).clamp_min(1).sqrt()
    torch.testing.assert_close(step_normalizer(norm, rho=1.0, curvature=1.0), eq7)


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("c", [0.0, 1.0, 300.0])
def test_eq_5_number_by_number(rho, c):
    for norm in (0.0, 1e-3, 0.3, 1.0, 40.0):
        gamma2 = max((2 * rho + norm) ** 2, 1 + c * (rho + norm))
        expected = math.sqrt(max(1.0, norm**2 * gamma2))
        got = step_normalizer(torch.tensor(norm, dtype=torch.float64), rho, c).item()
        assert math.isclose(got, expected, rel_tol=1e-12)


def average_by_hand(model, lr, steps, metric):
    """FGSGD with rho="average" on ``model.weight``, component by component and group by group."""
    look = FGSGD(pom_param_groups(model, groups=2, start="preserve"), lr=lr).pom(model.weight)
    manifolds = [get_manifold(look.manifold_names[m]) for m in look.manifold]
    scales = [m.root(w) for m, w in zip(manifolds, look.components, strict=True)]
    q = [
        m.project(w) if m.name == "stiefel" else m.scaled(w, m.inverse(s))
        for m, w, s in zip(manifolds, look.components, scales, strict=True)
    ]
    size = {
        m: torch.cat(
            [
                (s @ s.mT).diagonal() if n.name == "stiefel" else s.square().flatten()
                for n, s in zip(manifolds, scales, strict=True)
                if n.name == m
            ]
        ).mean()
        for m in look.manifold_names
    }
    average, rhos = list(q), []
    for t, grad in enumerate(steps, 1):
        parts = [g.reshape(3, 3) for g in grad.reshape(-1, 3, 3)]
        m = [size[n.name] if metric == "start" else torch.tensor(1.0).double() for n in manifolds]
        h = [
            n.tangent(x, n.scaled(g, s)) / w.sqrt()
            for n, x, g, s, w in zip(manifolds, q, parts, scales, m, strict=True)
        ]
        if t > 1:
            steps_back = [n.tangent(a, x - a) / min(t, 100) for n, a, x in zip(manifolds, average, q, strict=True)]
            average = [n.retract(a, b) for n, a, b in zip(manifolds, average, steps_back, strict=True)]
        for group in range(int(look.group.max()) + 1):
            members = (look.group == group).nonzero()[:, 0].tolist()
            rho = math.sqrt(sum(m[i] * manifolds[i].dist_bound(q[i], average[i]) ** 2 for i in members))
            norm = torch.stack([h[i].norm() for i in members]).norm()
            normalizer = step_normalizer(norm, rho, max(1 / m[i] for i in members))
            rhos.append(rho)
            for i in members:
                q[i] = manifolds[i].retract(q[i], -lr / normalizer * h[i] / m[i].sqrt())
    return torch.stack([n.scaled(x, s) for n, x, s in zip(manifolds, q, scales, strict=True)]), rhos


@pytest.mark.parametrize("metric", ["start", "unit"])
def test_rho_as_the_distance_to_a_running_average_equals_a_loop_over_components(metric):
    model = nn.Conv2d(3, 4, 3, bias=False).double()
    grads = [torch.randn_like(model.weight) for _ in range(6)]
    expected, rhos = average_by_hand(copy.deepcopy(model), 0.3, grads, metric)
    assert rhos[0] == 0
    assert min(rhos[4:]) > 1e-3
    optimizer = FGSGD(pom_param_groups(model, groups=2), lr=0.3, rho="average", metric=metric)
    for grad in grads:
        model.weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(optimizer.pom(model.weight).components, expected, atol=1e-12, rtol=0)


def test_the_bound_that_stands_for_the_distance_on_stiefel_is_it_up_to_a_cube():
    manifold = get_manifold("stiefel")
    q = manifold.random(20, 8, 4, dtype=torch.float64)
    h = manifold.tangent(q, torch.randn_like(q))
    h = h / manifold.norm(h)[:, None, None]
    for length in (0.03, 0.3, 1.0):
        end = manifold.exp(q, length * h)
        bound, dist = manifold.dist_bound(q, end), manifold.dist(q, end)
        assert (bound <= dist * (1 + 1e-9)).all()
        assert (bound >= (q - end).norm(dim=(1, 2)) * (1 - 1e-12)).all()
        assert (dist - bound).max() <= length**3 / 24


def test_the_estimate_of_rho_survives_a_checkpoint(tmp_path):
    def run(steps, resume=None):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, bias=False)
        optimizer = FGSGD(pom_param_groups(model), lr=0.3, momentum=0.9, rho="average")
        if resume:
            model.load_state_dict(resume[0])
            optimizer.load_state_dict(resume[1])
        for step in steps:
            model.weight.grad = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    torch.save(run(range(3)), tmp_path / "half.pt")
    resumed, _ = run(range(3, 6), torch.load(tmp_path / "half.pt", weights_only=True))
    assert torch.equal(resumed["weight"], run(range(6))[0]["weight"])


def test_the_average_is_of_unit_points():
    # R and metric="start": the estimate does not change when R does.
    def moved(radius):
        torch.manual_seed(1)
        model = nn.Conv2d(3, 4, 3, bias=False).double()
        optimizer = FGSGD(pom_param_groups(model, start="project"), lr=0.3, rho="average")
        optimizer.rescale(model.weight, torch.full((12,), radius, dtype=torch.float64))
        for _ in range(4):
            model.weight.grad = torch.randn_like(model.weight) / radius
            optimizer.step()
        return model.weight.detach() / radius

    torch.testing.assert_close(moved(0.5), moved(1.0))


def test_the_average_is_over_a_hundred_steps():
    # After 100 steps the average follows with a share of 1/100 and no less.
    model = nn.Linear(4, 4, bias=False).double()
    optimizer = FGSGD(pom_param_groups(model, manifolds=["euclidean"]), lr=0.1)
    (pom,) = optimizer.poms.values()
    average = torch.zeros_like(model.weight)
    distance_to_average(pom, model.weight.detach() + 1, average, 1000, "unit")
    torch.testing.assert_close(average, (model.weight.detach() + 1) / 100)


def test_euclidean_components_have_a_share_in_the_distance_to_the_average():
    # With components on the Euclidean manifold: their distance is that of the space, and their average moves too.
    layer = nn.Conv2d(1, 4, 3, bias=False).double()
    optimizer = FGSGD(pom_param_groups(layer, manifolds=["euclidean", "sphere"], groups=1), lr=0.1)
    (pom,) = optimizer.poms.values()
    free = (pom.sets.manifold == 0).nonzero()[:, 0]
    weight, average = layer.weight.detach().clone(), torch.zeros_like(layer.weight)
    distance_to_average(pom, weight, average, 1, "unit")
    there = weight.clone()
    there.view(4, 3, 3)[free] += 1
    squares = distance_to_average(pom, there, average, 4, "unit")  # a quarter of the way is made up
    torch.testing.assert_close(squares, torch.full((1,), len(free) * 9 * 0.75**2, dtype=torch.float64))

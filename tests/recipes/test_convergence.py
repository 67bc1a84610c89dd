import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.manifolds import get_manifold
from recipes.convergence import checkpoints, converge, gradient_norm, judge, main, read, summarise, sweep
from recipes.known_minima import (
    PROBLEMS,
    SWEPT,
    nuclear_minimum,
    procrustes_minimum,
    relu_kernel,
    relu_loss,
    relu_minimum,
    teacher_of,
)

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ["problem", "seed", "schedule", "eq4", "step", "lr", "loss", "minimum", "contained", "excess"]


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def least(loss, shapes, starts=8):
    """The least value found from many starts."""
    found = []
    for _ in range(starts):
        parameters = [normal(*shape).requires_grad_() for shape in shapes]
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(optimizer=optimizer, parameters=parameters):
            optimizer.zero_grad()
            value = loss(*parameters)
            value.backward()
            return value

        optimizer.step(closure)
        found.append(loss(*parameters).item())
    return min(found)


# The closed forms, against brute force --------------------------------------------------------------------------------


@pytest.mark.parametrize("determinant", [1.0, -1.0])
@pytest.mark.parametrize("n", [2, 4])
def test_procrustes_minimum_is_the_least_that_is_found_on_each_component_of_the_orthogonal_group(n, determinant):
    target = normal(n, n)
    mirror = torch.eye(n, dtype=torch.float64)
    mirror[0, 0] = determinant

    def loss(a):
        return (torch.matrix_exp(a - a.mT) @ mirror - target).square().sum() / 2

    assert least(loss, [(n, n)]) == pytest.approx(procrustes_minimum(target, determinant), abs=1e-8)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95, 1.3])
@pytest.mark.parametrize("hidden", [3, 6])
def test_nuclear_minimum_is_the_least_that_two_matrices_of_fixed_norm_reach(share, hidden):
    target = normal(5, 3)
    ball = share * torch.linalg.svdvals(target).sum().item()

    def loss(a, b):
        return (ball * (a / a.norm()) @ (b / b.norm()) - target).square().sum() / 2

    assert least(loss, [(5, hidden), (hidden, 3)]) == pytest.approx(nuclear_minimum(target, ball), abs=1e-7)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_relu_minimum_is_the_least_that_orthonormal_neurons_reach(scale):
    teacher = scale * torch.linalg.qr(normal(5, 3))[0].mT

    def loss(a):
        return relu_loss(torch.linalg.qr(a)[0].mT, teacher)

    assert least(loss, [(5, 3)], starts=4) == pytest.approx(relu_minimum(3, scale), abs=1e-8)


def test_the_relu_kernel_is_the_expectation():
    u, v = normal(4, 3), normal(2, 3)
    x = normal(400_000, 3)
    sampled = (x @ u.mT).relu()[:, :, None] * (x @ v.mT).relu()[:, None]
    error = sampled.std(0) / len(x) ** 0.5
    assert ((relu_kernel(u, v) - sampled.mean(0)).abs() <= 4.5 * error).all()


def test_the_gradient_of_the_relu_kernel_is_right_also_where_two_neurons_coincide():
    u, v = normal(4, 3).requires_grad_(), normal(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(relu_kernel, (u, v))
    v.data[0] = 2 * u.data[0]
    assert torch.autograd.gradcheck(relu_kernel, (u, v), atol=1e-4)
    relu_loss(u, u.detach()).backward()
    assert u.grad.norm() < 1e-7


# The problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_minibatches_sample_the_exact_loss_which_is_above_the_minimum(name):
    problem = PROBLEMS[name](3)
    optimizer = problem.optimizer(0.1)
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-12
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = torch.stack([problem.batch(generator) for _ in range(400)])
        exact = problem.exact().item()
    assert exact > problem.minimum
    assert losses.mean().item() == pytest.approx(exact, abs=4.5 * losses.std().item() / 20)


def test_a_teacher_is_a_point_of_the_students_constraint_set_that_a_path_reaches():
    groups = {"manifolds": ["sphere", "oblique", "stiefel"], "seed": 5}
    student, teacher = (nn.Conv2d(4, 6, 3, bias=False).double() for _ in range(2))
    teacher_of(student, teacher, groups)
    optimizer = FGSGD(pom_param_groups(student, start="project", **groups))
    look = optimizer.pom(student.weight)
    theirs = optimizer.poms[student.weight].cutting.cut(teacher.weight)
    assert (torch.linalg.det(look.components).sign() == torch.linalg.det(theirs).sign()).all()
    for i, name in enumerate(look.manifold_names):
        assert get_manifold(name).residual(theirs[look.manifold == i]).max() < 1e-12


def test_no_step_however_long_changes_the_determinant_of_an_orthogonal_matrix():
    model = nn.Linear(5, 5, bias=False).double()
    optimizer = FGSGD(pom_param_groups(model, manifolds=["stiefel"], start="random"), lr=1.0, rho=None)
    before = torch.linalg.det(model.weight).item()
    for i in range(60):
        model.weight.grad = normal(5, 5) * 10 ** (i % 6)
        optimizer.step()
        assert torch.linalg.det(model.weight).item() == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("name", ["linear, mix with Euclidean", "linear, sphere, A outside", "CNN, mix, readout free"])
def test_the_gradient_norm_is_the_slope_of_a_short_step(name):
    problem = SWEPT[name](0) if name in SWEPT else PROBLEMS[name](0)
    optimizer = problem.optimizer(1e-7, rho=None)
    loss = problem.exact()
    loss.backward()
    norm = gradient_norm(optimizer)
    optimizer.step()
    assert (loss - problem.exact()).item() / 1e-7 == pytest.approx(norm**2, rel=1e-3)


# The recipe -----------------------------------------------------------------------------------------------------------


def test_checkpoints():
    assert checkpoints(1) == [0, 1]
    assert checkpoints(20) == [0, 1, 2, 3, 4, 6, 10, 16, 20]


@pytest.mark.slow
def test_excess_and_gradient_fall_to_zero_where_the_constraint_set_contains_the_minimum():
    for name in ("linear, Stiefel, A orthogonal", "linear, mix", "ReLU, Stiefel", "CNN, mix"):
        rows = converge(name, 0, 450, settling=0)
        assert rows[0]["eq4"] is True
        assert rows[-1]["schedule"] == "exact gradients"  # of which there were none
        assert rows[-1]["excess"] <= 1e-3 * rows[0]["excess"], name
        assert rows[-1]["gradient_norm"] <= 3e-2 * rows[0]["gradient_norm"], name
        assert max(row["distance"] for row in rows) < 1e-12


@pytest.mark.slow
def test_decreasing_steps_come_closer_to_a_minimum_with_noise_than_constant_ones():
    for name in ("linear, Stiefel, A general", "linear, sphere, A outside"):
        runs = [converge(name, 0, 500, constant, 0) for constant in (False, True)]
        assert [run[0]["eq4"] for run in runs] == [True, False]
        decreasing, constant = (
            torch.tensor([row["excess"] for row in run if row["step"] >= 100]).mean() for run in runs
        )
        assert 0 < decreasing < 0.6 * constant
        assert runs[0][-1]["excess"] < 0.01 * runs[0][0]["excess"]


def test_a_run_that_ends_far_from_the_minimum_goes_on_with_exact_gradients():
    rows = converge("ReLU, Stiefel, teacher of norm 1.5", 0, 20)
    assert [row["schedule"] for row in rows[-2:]] == ["Eq. 4", "exact gradients"]
    assert rows[-1]["gradient_norm"] < 1e-6
    assert rows[-1]["excess"] == pytest.approx(0, abs=1e-9)  # the closed form is what descent arrives at


def test_without_the_normaliser_a_mix_with_euclidean_components_blows_up_where_fgsgd_trains():
    network = "linear, mix with Euclidean"
    ours, plain = (sweep(network, 0, 1.0, rho, 100) for rho in (1.0, None))
    assert ours["verdict"] == "trained"
    assert plain["verdict"] == "diverged"
    assert not math.isfinite(plain["final_loss"])
    assert plain["largest_gradient"] > 1e18 > 100 > ours["largest_gradient"]


def test_the_normaliser_does_not_act_on_weights_outside_of_the_groups():
    ours, plain = (sweep("CNN, mix, readout free", 0, 3.0, rho, 100)["verdict"] for rho in (1.0, None))
    assert ours == plain == "diverged"


@pytest.mark.slow
def test_the_recipe_writes_tables_and_figures(tmp_path, capsys):
    problems = ("linear, Stiefel, A general", "CNN, mix")
    folder = main(str(tmp_path / "out"), 2, 60, problems, ("linear, mix with Euclidean",), 1, 60, (0.3, 1.0), 10, 1)
    assert (folder / "convergence.png").read_bytes()[:4] == (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    with (folder / "convergence.csv").open() as file:
        assert csv.DictReader(file).fieldnames == [*COLUMNS, "gradient_norm", "distance"]
    rows = read(folder / "convergence.csv")
    looked = [row["step"] for row in rows if (row["problem"], row["seed"]) == ("CNN, mix", 1)]
    assert looked[: len(checkpoints(60))] == checkpoints(60)
    assert {row["schedule"] for row in rows if row["problem"] == problems[0]} >= {"Eq. 4", "constant"}
    assert [line[0] for line in summarise(rows)] == list(problems)
    swept = read(folder / "sweep.csv")
    assert [(row["lr"], row["rho"]) for row in swept] == [(0.3, 1.0), (0.3, "none"), (1.0, 1.0), (1.0, "none")]
    assert judge(swept)[0][3] == "1"
    assert "Learning rates" in capsys.readouterr().out


def test_a_verdict_counts_where_all_seeds_share_it():
    def row(seed, rho, lr, verdict):
        return {"network": "n", "seed": seed, "rho": rho, "lr": lr, "verdict": verdict, "excess_left": lr}

    verdicts = {
        (1.0, 0.1): ("trained", "trained"),
        (1.0, 1.0): ("trained", "trained"),
        (1.0, 10.0): ("trained", "neither"),
        (1.0, 100.0): ("trained", "trained"),
        ("none", 0.1): ("neither", "trained"),
        ("none", 1.0): ("diverged", "diverged"),
        ("none", 10.0): ("diverged", "diverged"),
        ("none", 100.0): ("diverged", "neither"),
    }
    rows = [row(seed, *key, verdict) for key, of_seed in verdicts.items() for seed, verdict in enumerate(of_seed)]
    assert judge(rows) == [("n", "0.1 to 1, 100", "nowhere", "1 to 10", "nowhere", "1e-01 at 0.1", "1e-01 at 0.1")]


@pytest.mark.parametrize(("file", "table"), [("convergence.csv", summarise), ("sweep.csv", judge)])
def test_the_tables_of_the_document_are_those_of_its_files(file, table):
    text = (DOCS / "convergence.md").read_text()
    for line in table(read(DOCS / "convergence" / file)):
        assert f"| {' | '.join(line)} |" in text

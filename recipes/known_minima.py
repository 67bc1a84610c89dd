"""Networks whose least loss on their constraint set is known: what :mod:`recipes.convergence` trains.

The inputs are Gaussian and the loss is the mean of ‖f(x) − y‖²/2, computed exactly. The least loss is 0, or what noise
leaves, where the target is a network of the constraint set, and a formula where it is not. ``SWEPT`` also has networks on
handwritten digits, whose least loss is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fgsgd import FGSGD, pom_param_groups

__all__ = [
    "PROBLEMS",
    "SWEPT",
    "Problem",
    "nuclear_minimum",
    "procrustes_minimum",
    "relu_kernel",
    "relu_loss",
    "relu_minimum",
]

BATCH = 32
MIX = ("sphere", "oblique", "stiefel")
F64 = torch.float64  # float32 would end the descent at an excess of 1e-7


@dataclass(frozen=True)
class Problem:
    """A network, what it is to learn, and the least loss that its constraints allow.

    Attributes:
        model: the network, its weights Gaussian.
        batch: the loss of a minibatch, which the generator draws.
        exact: the loss whose minimum is known: over the population, or over all of a finite set.
        minimum: its least value over the weights that the constraints allow. Where it is above 0, minibatch gradients do
            not vanish there: it takes decreasing steps to reach it.
        contained: whether the constraint set contains a minimum of the unconstrained problem.
        groups: the arguments of ``pom_param_groups``.
        radius: R of every component.
        schedule: r0, τ and κ of ``RobbinsMonroLR``.
        untrained: the loss of a network that has learned nothing, where that is not the loss at the start.
    """

    model: nn.Module
    batch: Callable[[torch.Generator], Tensor]
    exact: Callable[[], Tensor]
    minimum: float
    contained: bool
    groups: dict[str, Any]
    radius: float = 1.0
    schedule: tuple[float, float, float] = (0.3, 200.0, 0.75)
    untrained: float | None = None

    def optimizer(self, lr: float, rho: float | None = 1.0) -> FGSGD:
        """FGSGD with momentum 0 in the metric of the unit manifolds; Gaussian weights projected are uniform points."""
        groups = pom_param_groups(self.model, start="project", **self.groups)
        optimizer = FGSGD(groups, lr=lr, rho=rho, metric="unit")
        for param, pom in optimizer.poms.items():
            optimizer.rescale(param, torch.full_like(pom.radius, self.radius))
        return optimizer


# Closed forms ---------------------------------------------------------------------------------------------------------


def procrustes_minimum(target: Tensor, determinant: float) -> float:
    """min ‖Q − A‖²/2 over the orthogonal n x n matrices Q whose determinant has the sign of ``determinant``.

    ‖Q − A‖² = n + ‖A‖² − 2⟨Q, A⟩. The largest ⟨Q, A⟩ is Σ σ_i(A), less 2 σ_n(A) where det A has the other sign.
    """
    sigma = torch.linalg.svdvals(target)
    overlap = sigma.sum()
    if determinant * torch.linalg.det(target) < 0:
        overlap = overlap - 2 * sigma[-1]
    return float(len(target) + sigma.square().sum() - 2 * overlap) / 2


def nuclear_minimum(target: Tensor, radius: float) -> float:
    """min ‖P − A‖²/2 over the matrices P with nuclear norm Σ σ_i(P) <= ``radius``.

    The nearest P has A's singular vectors, and A's singular values lowered by a common amount, none below 0.
    """
    sigma = torch.linalg.svdvals(target)
    if float(sigma.sum()) <= radius:
        return 0.0
    # If the k largest stay above 0, the amount is (their sum − radius) / k: the largest of these is the right one.
    amount = ((sigma.cumsum(0) - radius) / torch.arange(1, len(sigma) + 1)).max()
    return float(sigma.minimum(amount).square().sum()) / 2


def relu_minimum(neurons: int, scale: float) -> float:
    """Least :func:`relu_loss` of orthonormal neurons against ``scale`` times orthonormal ones: the same ones, unscaled.

    In the power series of the kernel in ⟨w, v⟩ no coefficient is negative, and the only odd power is the first:
    Σ⟨w_i, v_j⟩ and every Σ⟨w_i, v_j⟩^2m are largest where the w are the v.
    """
    return (scale - 1) ** 2 / 2 * (neurons / 2 + neurons * (neurons - 1) / (2 * math.pi))


def relu_kernel(u: Tensor, v: Tensor) -> Tensor:
    """E[relu(u_i·x) relu(v_j·x)] over x ~ N(0, I) for the rows of ``u`` and ``v``: the arc-cosine kernel of order 1.

    ‖u‖‖v‖ (sin θ + (π − θ) cos θ)/(2π), with θ the angle between u and v. First derivatives are exact at θ = 0 too.
    """
    norms = u.norm(dim=1)[:, None] * v.norm(dim=1)
    cosine = u @ v.mT / norms
    at = cosine.detach().clamp(-1, 1)
    angle = at.acos()
    # Autograd's derivative of acos is infinite at 1. That of the whole by the cosine is (π − θ)/(2π), put in by hand.
    value = ((1 - at.square()).sqrt() + (math.pi - angle) * at) / (2 * math.pi)
    return norms * (value + (math.pi - angle) / (2 * math.pi) * (cosine - cosine.detach()))


def relu_loss(w: Tensor, v: Tensor) -> Tensor:
    """E(Σ_i relu(w_i·x) − Σ_j relu(v_j·x))²/2 over x ~ N(0, I), for the rows of ``w`` and ``v``."""
    return (relu_kernel(w, w).sum() - 2 * relu_kernel(w, v).sum() + relu_kernel(v, v).sum()) / 2


# Networks -------------------------------------------------------------------------------------------------------------


def half_square(difference: Tensor) -> Tensor:
    """The mean over the batch of ‖difference‖²/2."""
    return difference.square().flatten(1).sum(1).mean() / 2


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=F64)


def product_of(model: nn.Module) -> Tensor:
    """The matrix by which a deep linear network multiplies."""
    return model(torch.eye(next(model.parameters()).shape[1], dtype=F64)).mT


@torch.no_grad()
def gaussian(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw weights of variance 1/fan-in, in place. Only Euclidean components keep the variance."""
    for p in model.to(F64).parameters():
        p.copy_(normal(*p.shape, generator=generator) * p[0].numel() ** -0.5)
    return model


@torch.no_grad()
def teacher_of(student: nn.Module, teacher: nn.Module, groups: dict[str, Any]) -> nn.Module:
    """Put a teacher on the student's manifolds: the index sets come from the groups' seed alone.

    The orthogonal n x n matrices are two components, between which no step moves. Where components are square, so that a
    Stiefel one cannot leave its half, the teacher's get determinants of the student's signs.
    """
    plans = [pom_param_groups(m, start="project", **groups) for m in (student, teacher)]
    for (p, planned), q in zip(plans[0].plan.weights.items(), plans[1].plan.weights, strict=True):
        cut = planned.cutting
        if cut.n == cut.p:
            mine, theirs = cut.cut(p), cut.cut(q).clone()
            theirs[:, :, 0] *= (torch.linalg.det(mine) * torch.linalg.det(theirs)).sign()[:, None]
            q.copy_(cut.join(theirs))
    FGSGD(plans[1])
    return teacher.requires_grad_(False)


def linear(widths: Sequence[int], generator: torch.Generator) -> nn.Module:
    """A deep linear network."""
    layers = [nn.Linear(n, p, bias=False) for n, p in pairwise(widths)]
    return gaussian(nn.Sequential(*layers), generator)


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix."""
    return torch.linalg.qr(normal(n, n, generator=generator))[0]


def linear_problem(model: nn.Module, target: Tensor, minimum: float, noise: float = 0.0, **rest: Any) -> Problem:
    """To learn y = A x + noise from x ~ N(0, I): the loss is ‖P − A‖²/2 and what the noise leaves."""
    floor = noise**2 * len(target) / 2

    def batch(generator: torch.Generator) -> Tensor:
        x = normal(BATCH, target.shape[1], generator=generator)
        y = x @ target.mT + noise * normal(BATCH, target.shape[0], generator=generator)
        return half_square(model(x) - y)

    def exact() -> Tensor:
        return (product_of(model) - target).square().sum() / 2 + floor

    return Problem(model, batch, exact, minimum + floor, **rest)


def linear_stiefel(seed: int, general: bool = False, noise: float = 0.0, n: int = 8) -> Problem:
    """Three orthogonal layers: their product is orthogonal, and its determinant keeps its sign."""
    generator = torch.Generator().manual_seed(seed)
    model = linear((n, n, n, n), generator)
    determinant = float(torch.linalg.det(product_of(model).detach()))  # whose sign projecting the layers keeps
    target = orthogonal(n, generator)
    if general:
        target = target @ torch.diag(torch.linspace(2, 0.25, n, dtype=F64)) @ orthogonal(n, generator)
    elif determinant * float(torch.linalg.det(target)) < 0:
        target[0] *= -1
    return linear_problem(
        model,
        target,
        procrustes_minimum(target, determinant),
        noise,
        contained=not general,
        groups={"manifolds": ["stiefel"], "block_size": n, "seed": seed},
        schedule=(0.3, 100.0, 1.0) if general or noise else (0.3, 200.0, 0.75),
    )


def linear_sphere(seed: int, share: float, n: int = 8) -> Problem:
    """Two layers of norm R: their products are the ball of nuclear norm R², which is ``share`` of A's."""
    generator = torch.Generator().manual_seed(seed)
    model = linear((n, n, n), generator)
    sigma = torch.linspace(2, 0.25, n, dtype=F64)
    target = orthogonal(n, generator) @ torch.diag(sigma) @ orthogonal(n, generator)
    ball = share * float(sigma.sum())
    return linear_problem(
        model,
        target,
        nuclear_minimum(target, ball),
        contained=share >= 1,
        groups={"manifolds": ["sphere"], "block_size": n, "seed": seed},
        radius=ball**0.5,
        schedule=(0.1, 200.0, 0.75) if share >= 1 else (0.3, 100.0, 1.0),
    )


def linear_mix(seed: int, manifolds: Sequence[str] = MIX) -> Problem:
    """Three layers in blocks of 4 neurons on a mix of manifolds, and a teacher of the same set."""
    generator = torch.Generator().manual_seed(seed)
    groups = {"manifolds": manifolds, "block_size": 4, "seed": seed}
    model, teacher = (linear((16, 16, 16, 8), generator) for _ in range(2))
    target = product_of(teacher_of(model, teacher, groups))
    return linear_problem(model, target, 0.0, contained=True, groups=groups)


def relu(seed: int, manifold: str, neurons: int, scale: float = 1.0, n: int = 10) -> Problem:
    """Σ_i relu(w_i·x), and a teacher of the same manifold, times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    groups = {"manifolds": [manifold], "block_size": neurons, "seed": seed}
    model, teacher = (linear((n, neurons), generator) for _ in range(2))
    (w,) = model.parameters()
    v = scale * next(teacher_of(model, teacher, groups).parameters())

    def batch(generator: torch.Generator) -> Tensor:
        x = normal(BATCH, n, generator=generator)
        return half_square(((x @ w.mT).relu().sum(1) - (x @ v.mT).relu().sum(1))[:, None])

    return Problem(
        model,
        batch,
        lambda: relu_loss(w, v),
        0.0 if scale == 1 else relu_minimum(neurons, scale),
        contained=scale == 1,
        groups=groups,
        schedule=(0.3, 200.0, 0.75) if scale == 1 else (0.3, 300.0, 1.0),
    )


def cnn(seed: int, readout: str = "fixed", channels: int = 4, outputs: int = 12, images: int = 1024) -> Problem:
    """Convolution, ReLU, pooling, readout on Gaussian images of 6 x 6, kernels on a mix, and a teacher of the same set.

    The readout is ``"fixed"``, ``"learned"`` (on the mix), or ``"free"``: learned, and outside of all groups.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, Any] = {"manifolds": MIX, "block_size": 2, "seed": seed}
    if readout == "free":
        groups["include"] = ["0.weight"]

    def network() -> nn.Module:
        convolution, last = nn.Conv2d(2, channels, 3, bias=False), nn.Linear(4 * channels, outputs, bias=False)
        return gaussian(nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), last), generator)

    model, teacher = network(), network()
    if readout == "fixed":
        teacher[-1] = model[-1].requires_grad_(False)  # type: ignore[index, operator]
    teacher_of(model, teacher, groups)
    x = normal(images, 2, 6, 6, generator=generator)
    y = teacher(x)

    def batch(generator: torch.Generator) -> Tensor:
        index = torch.randint(images, (BATCH,), generator=generator)
        return half_square(model(x[index]) - y[index])

    return Problem(
        model,
        batch,
        lambda: half_square(model(x) - y),
        0.0,
        contained=True,
        groups=groups,
        schedule=(0.3, 200.0, 0.75) if readout == "fixed" else (0.05, 5000.0, 1.0),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x.relu()).relu())


@cache
def _digit_images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def digits(seed: int, manifolds: Sequence[str] = MIX, radius: float = 1.0) -> Problem:
    """A residual network of 5 convolutions on handwritten digits. Of its least loss only a bound is known: 0."""
    x, y = _digit_images()
    stem = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.AvgPool2d(2))
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10, bias=False))
    model = nn.Sequential(*stem, _Residual(8), _Residual(8), *head)
    gaussian(model, torch.Generator().manual_seed(seed)).float()

    def batch(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(x), (BATCH,), generator=generator)
        return nn.functional.cross_entropy(model(x[index]), y[index])

    return Problem(
        model,
        batch,
        lambda: nn.functional.cross_entropy(model(x), y),
        0.0,
        contained=False,
        groups={"manifolds": manifolds, "block_size": 2, "seed": seed},
        radius=radius,
        untrained=math.log(10),
    )


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "linear, Stiefel, A orthogonal": linear_stiefel,
    "linear, Stiefel, A orthogonal, noise": partial(linear_stiefel, noise=0.5),
    "linear, Stiefel, A general": partial(linear_stiefel, general=True),
    "linear, sphere, A inside": partial(linear_sphere, share=1.25),
    "linear, sphere, A outside": partial(linear_sphere, share=0.5),
    "linear, mix": linear_mix,
    "linear, mix with Euclidean": partial(linear_mix, manifolds=(*MIX, "euclidean")),
    "ReLU, one neuron, teacher of norm 2": partial(relu, manifold="sphere", neurons=1, scale=2.0),
    "ReLU, oblique": partial(relu, manifold="oblique", neurons=5),
    "ReLU, oblique, 10 neurons": partial(relu, manifold="oblique", neurons=10),
    "ReLU, Stiefel": partial(relu, manifold="stiefel", neurons=5),
    "ReLU, Stiefel, teacher of norm 1.5": partial(relu, manifold="stiefel", neurons=5, scale=1.5),
    "CNN, mix": cnn,
    "CNN, mix, readout learned": partial(cnn, readout="learned", channels=3),
}

# What the learning rate sweep trains: manifolds that are compact, mixes with Euclidean components, and a free weight.
SWEPT: dict[str, Callable[[int], Problem]] = {
    "linear, mix": PROBLEMS["linear, mix"],
    "CNN, mix": PROBLEMS["CNN, mix"],
    "digits, mix": digits,
    "linear, mix with Euclidean": PROBLEMS["linear, mix with Euclidean"],
    "digits, mix with Euclidean": partial(digits, manifolds=(*MIX, "euclidean"), radius=0.5),
    "CNN, mix, readout free": partial(cnn, readout="free"),
}

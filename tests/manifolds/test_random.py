"""Random points are uniform, by Kolmogorov-Smirnov tests that catch points which are not."""

import pytest
import torch
from scipy import stats

from lightning_fgsgd.manifolds import get_manifold
from tests.manifolds.strategies import CONSTRAINED

COUNT = 4000


def reference(name, n, p):
    """Uniform points from scipy: random directions, or the first columns of a Haar-distributed orthogonal matrix."""
    if name == "sphere":
        return torch.from_numpy(stats.uniform_direction(n * p, seed=1).rvs(COUNT)).reshape(COUNT, n, p)
    if name == "oblique":
        return torch.from_numpy(stats.uniform_direction(n, seed=1).rvs(COUNT * p)).reshape(COUNT, p, n).mT
    return torch.from_numpy(stats.ortho_group(n, seed=1).rvs(COUNT))[..., :p]


def worst_p_value(q, other):
    """Smallest p-value, Bonferroni corrected, of two-sample tests on entries, products and a quartic of the points."""

    def features(x):
        entries = [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]
        m = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        return [*entries, (x * m).sum((1, 2)), x[:, 0].prod(1), x.pow(4).sum((1, 2)), torch.linalg.svdvals(x)[:, 0]]

    pairs = list(zip(features(q), features(other), strict=True))
    values = [stats.ks_2samp(a, b).pvalue for a, b in pairs if a.std() > 1e-9]
    return min(values) * len(values)


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(("n", "p"), [(3, 3), (5, 2), (4, 1)])
def test_random_points_are_distributed_as_scipys_uniform_ones(name, n, p):
    manifold, generator = get_manifold(name), torch.Generator().manual_seed(0)
    q = manifold.random(COUNT, n, p, generator=generator, dtype=torch.float64)
    assert manifold.residual(q).max() < 1e-12
    assert worst_p_value(q, reference(name, n, p)) > 0.01


@pytest.mark.parametrize("name", ["sphere", "oblique"])
def test_a_coordinate_of_a_random_point_has_the_beta_distribution_of_the_sphere(name):
    manifold, n, p = get_manifold(name), 5, 3
    q = manifold.random(COUNT, n, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = n * p if name == "sphere" else n  # the square of a coordinate on S^(d-1) is Beta(1/2, (d-1)/2)
    assert stats.kstest(q[:, 1, 1].square(), stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", CONSTRAINED)
def test_the_test_of_uniformity_catches_points_that_are_not(name):
    manifold, generator = get_manifold(name), torch.Generator().manual_seed(0)
    cube = torch.rand(COUNT, 3, 3, generator=generator, dtype=torch.float64) - 0.5
    assert worst_p_value(manifold.project(cube), reference(name, 3, 3)) < 1e-4
    if name == "stiefel":  # LAPACK's QR without the signs is the classical mistake
        gaussian = torch.randn(COUNT, 3, 3, generator=generator, dtype=torch.float64)
        assert worst_p_value(torch.linalg.qr(gaussian).Q, reference(name, 3, 3)) < 1e-4


@pytest.mark.parametrize("name", CONSTRAINED)
def test_the_generator_decides(name):
    draw = lambda seed: get_manifold(name).random(3, 4, 2, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))

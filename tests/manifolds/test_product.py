import geoopt
import pymanopt.manifolds
import pytest
import torch

from lightning_fgsgd import FGSGD, pom_param_groups
from lightning_fgsgd.manifolds import Product, get_manifold
from lightning_fgsgd.stepsize import step_normalizer
from tests.conftest import TinyNet

NAMES = ["sphere", "oblique", "stiefel", "euclidean"]


def points(shape=(5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = [get_manifold(name).random(4, *shape, generator=generator, dtype=torch.float64) for name in NAMES]
    g = [torch.randn(4, *shape, generator=generator, dtype=torch.float64) for _ in NAMES]
    return q, g


def test_theorem_1_the_norm_is_that_of_the_concatenated_gradient():
    product = Product([get_manifold(name) for name in NAMES])
    q, g = points()
    h = product.tangent(q, g)
    torch.testing.assert_close(product.norm(h), torch.cat(h, dim=-1).flatten(1).norm(dim=1))
    torch.testing.assert_close(product.norm(h).square(), product.inner(h, h))


def test_agrees_with_geoopts_product():
    theirs = geoopt.ProductManifold(
        (geoopt.Sphere(), 15), (geoopt.EuclideanStiefel(), (5, 3)), (geoopt.Euclidean(2), (5, 3))
    )
    mine = Product([get_manifold(name) for name in ("sphere", "stiefel", "euclidean")])
    q, g = points()
    q, g = (q[0], q[2], q[3]), (g[0], g[2], g[3])
    pack = lambda x: torch.cat([y.flatten(1) for y in x], dim=1)  # noqa: E731
    h = mine.tangent(q, g)
    torch.testing.assert_close(pack(h), theirs.proju(pack(q), pack(g)))
    torch.testing.assert_close(mine.inner(h, h), theirs.inner(pack(q), pack(h)))


def test_agrees_with_pymanopts_product():
    theirs = pymanopt.manifolds.Product(
        [
            pymanopt.manifolds.Sphere(5, 3),
            pymanopt.manifolds.Oblique(5, 3),
            pymanopt.manifolds.Stiefel(5, 3, retraction="polar"),
        ]
    )
    mine = Product([get_manifold(name) for name in NAMES[:3]])
    q, g = ([x[0] for x in part[:3]] for part in points())
    h = mine.tangent(q, g)
    x, u = [y.numpy() for y in q], [y.numpy() for y in h]
    assert mine.dim([(5, 3)] * 3) == theirs.dim
    close = lambda a, b: torch.testing.assert_close(a, torch.as_tensor(b), atol=1e-10, rtol=0)  # noqa: E731
    close(mine.norm(h), theirs.norm(x, u))
    close(mine.inner(h, mine.tangent(q, q)), theirs.inner_product(x, u, theirs.projection(x, x)))
    for mapped, other in (
        (h, theirs.projection(x, [y.numpy() for y in g])),
        (mine.retract(q, h), theirs.retraction(x, u)),
        (mine.exp(q, h), theirs.exp(x, u)),
        (mine.transport(mine.retract(q, h), h), theirs.projection(theirs.retraction(x, u), u)),
    ):
        for a, b in zip(mapped, other, strict=True):
            close(a, b)


def test_dimension_distance_and_curvature_are_made_of_the_factors():
    product = Product([get_manifold(name) for name in NAMES])
    assert product.dim([(5, 3)] * 4) == (15 - 1) + 12 + (15 - 6) + 15
    assert product.curvature == (-0.5, 1.0)
    assert Product([get_manifold("sphere")] * 2).curvature == (0.0, 1.0)
    assert Product([get_manifold("euclidean")]).curvature == (0.0, 0.0)
    q, g = points()
    h = [0.2 * x for x in product.tangent(q, g)]
    end = [m.exp(x, y) for m, x, y in zip(product.factors, q, h, strict=True)]
    torch.testing.assert_close(product.dist(q, end), product.norm(h), rtol=1e-6, atol=0)
    for m, x in zip(product.factors, product.retract(q, h), strict=True):
        assert m.residual(x).max() < 1e-12
    with pytest.raises(ValueError, match="factors: a product needs at least one manifold"):
        Product([])


def test_an_fgsgd_step_is_the_step_of_each_groups_product():
    # Algorithm 1 written with Product: the definition, group by group.
    model = TinyNet().double()
    optimizer = FGSGD(pom_param_groups(model, scheme="pi", groups=2, start="project"), lr=0.3, metric="unit")
    p = model.conv.weight
    look = optimizer.pom(p)
    p.grad = torch.randn_like(p)
    grads = optimizer.poms[p].cutting.cut(p.grad)
    expected = look.components.clone()
    for g in range(int(look.group.max()) + 1):
        members = (look.group == g).nonzero()[:, 0]
        product = Product([get_manifold(look.manifold_names[look.manifold[i]]) for i in members])
        q = [look.components[i] for i in members]
        h = product.tangent(q, [grads[i] for i in members])
        step = 0.3 / step_normalizer(product.norm(h), 1.0, product.curvature[1])
        for i, moved in zip(members, product.retract(q, [-step * x for x in h]), strict=True):
            expected[i] = moved
    optimizer.step()
    torch.testing.assert_close(optimizer.pom(p).components, expected, atol=1e-12, rtol=0)

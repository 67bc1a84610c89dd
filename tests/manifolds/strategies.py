"""What hypothesis draws matrices from: shapes, batches, memory layouts and scales."""

import torch
from hypothesis import strategies as st

CONSTRAINED = ["sphere", "oblique", "stiefel"]
SCALES = st.integers(-20, 20)
LAYOUTS = ["contiguous", "transposed", "channels_last", "expanded", "strided"]


@st.composite
def matrices(draw, largest=64, scaled=False):
    """A float64 tensor (*batch, n, p) with 1 <= p <= n <= ``largest``, laid out in memory in one of five ways.

    ``scaled``: from 1e-20 to 1e20.
    """
    n = draw(st.integers(1, largest))
    p = draw(st.one_of(st.just(1), st.just(n), st.integers(1, n)))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(*batch, n, p, generator=generator, dtype=torch.float64) * 10.0 ** (draw(SCALES) if scaled else 0)
    return lay_out(x, draw(st.sampled_from(LAYOUTS)))


def lay_out(x, layout):
    """The same values (``"expanded"``: the first of each batch axis repeated) in another memory layout."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "channels_last":  # the batch runs fastest, as the kernels of a channels_last convolution
        return x.movedim((-2, -1), (0, 1)).contiguous().movedim((0, 1), (-2, -1))
    if layout == "expanded":
        return x[(slice(1),) * (x.ndim - 2)].expand_as(x)
    if layout == "strided":
        return torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
    return x

"""The geometry keeps its precision, whatever is asked of the products around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact", "undisturbed"]

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def undisturbed(weights: Iterable[Tensor]) -> Iterator[None]:
    """The geometry of ``weights`` keeps its precision.

    Also under autocast (a step of manual optimization, a look from a training step), and where float32 products are
    allowed to be rounded (``torch.set_float32_matmul_precision``): manifolds would be left by a thousandth in every step.
    """
    with ExitStack() as stack:
        for device in {p.device.type for p in weights}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_exact_products())
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # torch 2.9 and later refuse the older name once the newer has been used.
    new = [b for b in backends if hasattr(b, "fp32_precision")]
    if not new:
        before = torch.get_float32_matmul_precision()
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    rounded = [(b, _unset(b)) for b in new if b.fp32_precision not in ("ieee", "none")]
    for b, _ in rounded:
        b.fp32_precision = "ieee"
    try:
        yield
    finally:
        for b, own in rounded:
            b.fp32_precision = own


def _unset(backend: Any) -> str:
    """Unset a backend's own precision; what it was: "none" where it told the one for all, which may change later."""
    precision: str = backend.fp32_precision
    backend.fp32_precision = "none"
    return "none" if backend.fp32_precision == precision else precision


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` as it is inside of :func:`undisturbed`, for the tensors among its arguments."""

    @functools.wraps(function)
    def undisturbed_function(*args: P.args, **kwargs: P.kwargs) -> T:
        with undisturbed(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)):
            return function(*args, **kwargs)

    return undisturbed_function

"""What a step is to do to one weight, as its code is told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_fgsgd.pom import POM
from lightning_fgsgd.step import Options

__all__ = ["Job"]


class Job(NamedTuple):
    """What a step is to do to one weight, but for 1/𝔤 of its groups: its momentum None without one."""

    pom: POM
    weight: Tensor
    grad: Tensor
    buffer: Tensor | None
    metric: str
    options: Options
    nesterov: bool

    @property
    def kind(self) -> str:
        """Which function of a step moves the weight."""
        return "move" if self.buffer is None else "nesterov" if self.nesterov else "momentum"

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of the step, and 1/√m of each manifold: kept from the last step where they are the same."""
        layouts, key = self.pom.layouts, (self.metric, self.options)
        if layouts.get("numbers", (None,))[0] != key:
            layouts["numbers"] = key, (*self.options, *(m**-0.5 for m in self.pom.metrics(self.metric)))
        found: tuple[float, ...] = layouts["numbers"][1]
        return found

"""What the callbacks call the layers of a fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_fgsgd.pom import POM

__all__ = ["layer_names"]


def layer_names(model: nn.Module, poms: Mapping[Tensor, POM]) -> dict[Tensor, str]:
    """A name for the layer of each constrained weight, no two the same.

    That which its plan gave it, relative to the model that the plan was drawn from. Where several models, each with a plan
    of its own, have layers of the same name, the names in ``model``, the module that holds them all.
    """
    names = {p: pom.name for p, pom in poms.items()}
    if len(set(names.values())) < len(names):
        within: dict[Tensor, str] = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
        names = {p: within.get(p, name) for p, name in names.items()}
    return {p: name.removesuffix(".weight") for p, name in names.items()}

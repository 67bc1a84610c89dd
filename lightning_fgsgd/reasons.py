"""Why a parameter that is not the weight of a layer stays Euclidean, in a word that a person knows."""

from __future__ import annotations

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["normalizes_weight", "why_euclidean"]

_STANDARDIZING = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
# Of torch.nn.utils.weight_norm, spectral_norm and prune, which compute the weight from these in a hook before each forward.
_HOOKED = ("_g", "_v", "_orig")
_WORDS = (
    ("token", ("token", "latent", "query_embed")),
    ("table", ("table", "rel_pos", "_rel", "attention_bias", "freqs")),
    ("position embedding", ("pos_", "_pos", "position", "pos_embed")),
    ("bias", ("bias", "beta")),
    ("gain", ("gamma", "alpha", "gain", "scale", "temperature", "lambda")),
)


def normalizes_weight(module: nn.Module) -> bool:
    """Whether the forward of a layer standardises its weight, so that a constraint on the weight's norm is void."""
    return isinstance(module, _STANDARDIZING)


def why_euclidean(name: str, p: Tensor, owners: list[nn.Module]) -> str:
    """A reason for a parameter that :func:`~lightning_fgsgd.components.cutting_of` does not take for a weight."""
    attr = name.rpartition(".")[2]
    if any(isinstance(m, torch.jit.ScriptModule) for m in owners):
        return "in TorchScript, which does not say what layer it is of"
    if any(isinstance(m, ParametrizationList) for m in owners) or (
        attr.startswith("weight") and attr.endswith(_HOOKED) and any(m._forward_pre_hooks for m in owners)
    ):
        return "its layer computes the weight from it (parametrization, weight_norm or spectral_norm)"
    if p.numel() == 0:
        return "empty"
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in owners):
        return "embedding"
    if any("Norm" in type(m).__name__ for m in owners):
        return "bias" if attr == "bias" else "norm"
    for reason, words in _WORDS:
        if any(word in f"_{attr}_" or word in attr for word in words):
            return reason
    if p.numel() == max(p.shape, default=1):
        return "gain"  # one number, or one for each channel
    return "no layer says how it is used"

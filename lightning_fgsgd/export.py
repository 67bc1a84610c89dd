"""Out the other side: trained weights as a plain timm state dict, which loads without this package."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from lightning_fgsgd.sharding import whole_of

__all__ = ["export_timm"]


def export_timm(module: nn.Module, path: str | Path, attribute: str = "model") -> Path:
    """Write the weights of a timm model as ``timm.create_model(..., checkpoint_path=path)`` reads them.

    Weights on manifolds are ordinary weights, so nothing is converted: the loaded model computes the same to the last bit.
    Names are those of the model without ``torch.compile``. Of several processes all call it, for sharded weights are put
    together, and the first writes.

    Args:
        module: a timm model, or a LightningModule that holds one.
        path: file to write; ``.safetensors``, or ``.pt``/``.pth`` for a torch file.
        attribute: name of the timm model in ``module``, where it is not one itself.

    Raises:
        ValueError: another suffix, or a module that neither is nor holds a timm model.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path: {path.name!r} must end in .safetensors, .pt or .pth")
    model = module if hasattr(module, "default_cfg") or not hasattr(module, attribute) else getattr(module, attribute)
    if not hasattr(model, "default_cfg"):
        raise ValueError(f"module: {type(module).__name__} is not a timm model, nor is its attribute {attribute!r}")
    # Contiguous, because safetensors stores no strides; channels_last is a matter of the session, not of the weights.
    state = {
        name.replace("_orig_mod.", ""): whole_of(tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path

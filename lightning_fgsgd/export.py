"""Out the other side: trained weights as a plain timm state dict, which loads without this package."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_fgsgd.sharding import whole_of

__all__ = ["export_timm"]


def export_timm(module: nn.Module, path: str | Path, attribute: str = "model") -> Path:
    """Write the weights of a timm model as ``timm.create_model(..., checkpoint_path=path)`` reads them.

    Weights on manifolds are ordinary weights, so nothing is converted: the loaded model computes the same to the last bit.
    Names are those of the model without ``torch.compile``, and without parametrizations and ``torch.nn.utils.prune``, whose
    tensors are written as they come out. Of several processes all call it, for sharded weights are put
    together, and the first writes.

    Args:
        module: a timm model, or a LightningModule that holds one.
        path: file to write; ``.safetensors``, or ``.pt``/``.pth`` for a torch file.
        attribute: name of the timm model in ``module``, where it is not one itself.

    Raises:
        ValueError: another suffix, a module that neither is nor holds a timm model, layers with adapters of PEFT, which are
            to be merged first, or a weight under the older ``torch.nn.utils.weight_norm`` or ``spectral_norm``, which is to
            be removed first.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path: {path.name!r} must end in .safetensors, .pt or .pth")
    model = module if hasattr(module, "default_cfg") or not hasattr(module, attribute) else getattr(module, attribute)
    if any(hasattr(m, "adapter_layer_names") for m in model.modules()):
        raise ValueError(
            "module: its layers have adapters (of PEFT), and timm would not find their weights in the file; give what "
            "merge_and_unload() returns"
        )
    if not hasattr(model, "default_cfg"):
        raise ValueError(f"module: {type(module).__name__} is not a timm model, nor is its attribute {attribute!r}")
    # Contiguous, because safetensors stores no strides; channels_last is a matter of the session, not of the weights.
    state = {
        name.replace("_orig_mod.", ""): whole_of(tensor).cpu().contiguous()
        for name, tensor in _plain_state(model).items()
    }
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the names that the model's own class has."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, held in getattr(module, "parametrizations", {}).items() if is_parametrized(module) else ():
            training = held.training
            held.eval()  # spectral norm takes a step of its power iteration otherwise
            state = {key: x for key, x in state.items() if not key.startswith(f"{prefix}parametrizations.{name}.")}
            state[prefix + name] = getattr(module, name).detach()
            held.train(training)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                state[prefix + name] = hook.apply_mask(module).detach()
                del state[f"{prefix}{name}_orig"], state[f"{prefix}{name}_mask"]
            elif isinstance(hook, WeightNorm | SpectralNorm):
                how = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                raise ValueError(
                    f"module: {prefix}{hook.name} is under torch.nn.utils.{how}, and timm would not find it in the file; "
                    f"call torch.nn.utils.remove_{how} first"
                )
    return state

"""Turn a Lightning checkpoint of ``recipes.finetune`` into plain timm weights.

    python -m recipes.export runs/digits/version_0/checkpoints/last.ckpt model.safetensors

The file loads anywhere with ``timm.create_model(name, num_classes=..., checkpoint_path="model.safetensors")``.
"""

from __future__ import annotations

from jsonargparse import auto_cli

from lightning_fgsgd import export_timm
from recipes.model import LitClassifier


def export(checkpoint: str, output: str) -> str:
    """Write the timm weights of a checkpoint.

    Args:
        checkpoint: a checkpoint that ``recipes.finetune`` wrote.
        output: file to write, .safetensors, .pt or .pth.
    """
    module = LitClassifier.load_from_checkpoint(checkpoint, map_location="cpu", pretrained=False)
    path = export_timm(module, output)
    name, classes = module.hparams["model"], module.hparams["num_classes"]
    # A head of another size, with which the weights came, has been replaced.
    args = {key: value for key, value in (module.hparams["model_args"] or {}).items() if key != "num_classes"}
    further = "".join(f", {key}={value!r}" for key, value in args.items())
    return f"{path}: timm.create_model({name!r}, num_classes={classes}{further}, checkpoint_path={str(path)!r})"


if __name__ == "__main__":
    print(auto_cli(export))

import timm
import torch
from pytorch_lightning import Trainer

from recipes.export import export
from recipes.model import LitClassifier


def test_the_call_that_it_prints_makes_the_model_also_where_the_weights_came_with_another_head(tmp_path):
    module = LitClassifier(
        "test_resnet", pretrained=False, num_classes=7, model_args={"num_classes": 12, "act_layer": "silu"}
    )
    checkpoint = str(tmp_path / "last.ckpt")
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(checkpoint)
    told = export(checkpoint, str(tmp_path / "model.safetensors"))
    path, _, call = told.partition(": ")
    assert path == str(tmp_path / "model.safetensors")
    made = eval(call, {"timm": timm})
    assert made.default_cfg["architecture"] == "test_resnet"
    torch.testing.assert_close(made.state_dict(), module.model.state_dict(), rtol=0, atol=0)
    assert isinstance(made.act1, torch.nn.SiLU)

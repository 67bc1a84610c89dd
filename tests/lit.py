"""A LightningModule and its data for the tests that run a real Trainer."""

import textwrap

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fgsgd import FGSGDMixin
from tests.conftest import TinyNet

QUIET_EPOCH = """
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
"""


class LitBase(LightningModule):
    """TinyNet on 32 random images."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TinyNet()

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))


class LitTiny(FGSGDMixin, LitBase):
    pass


def loader(images: int = 32, batch_size: int = 8, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(images, 4, 6, 6, generator=generator)
    y = torch.randint(3, (images,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(folder, *callbacks, max_epochs=2, **options):
    options = {"enable_checkpointing": False, "logger": False, "accelerator": "cpu", "devices": 1, **options}
    return Trainer(
        default_root_dir=folder,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def config(folder, callbacks: str):
    """A file for LightningCLI: a quiet epoch with these callbacks, a list in YAML."""
    path = folder / "config.yaml"
    path.write_text(QUIET_EPOCH + textwrap.indent(textwrap.dedent(callbacks), "    "))
    return path

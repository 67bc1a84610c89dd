"""Fine-tune a timm model with its weights on products of manifolds.

    python -m recipes.finetune fit                                      # EfficientNet-Lite0 on handwritten digits
    python -m recipes.finetune fit --model.optimizer sgd                # the same run with plain SGD
    python -m recipes.finetune fit --config recipes/configs/few_images.yaml
    python -m recipes.finetune fit --config recipes/configs/cifar10.yaml

Without ``--config``, ``recipes/configs/digits.yaml`` holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_fgsgd import FGSGD, FeatureStdRescaling, NormBoundMonitor, POMGrouping, describe, export_timm
from recipes.data import ImageData
from recipes.model import LitClassifier
from recipes.report import LearningCurve, plot_layers, plot_learning_curve, print_summary

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


class FinetuneCLI(LightningCLI):
    """LightningCLI that tests after it has fitted, and reports."""

    trainer: Any

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data knows the number of classes."""
        parser.link_arguments("data", "model.num_classes", compute_fn=_num_classes, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Remember which model was asked for: Lightning lets a checkpoint's hyperparameters replace it."""
        super().parse_arguments(parser, args)
        self.given = list(sys.argv[1:] if args is None else args)
        self.asked = dict(self.config[self.config["subcommand"]]["model"])

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another architecture, and options that one replaces; say what else it replaces."""
        command = self.config["subcommand"]
        found = self.config[command]["model"]
        replaced = {name: found[name] for name in self.asked if repr(found[name]) != repr(self.asked[name])}
        if "model" in replaced:
            raise ValueError(
                f"ckpt_path: the checkpoint was made with model={found['model']!r}, this run has "
                f"model={self.asked['model']!r}; give --model.model {found['model']} or another checkpoint"
            )
        if command != "fit" or not replaced:
            return
        for name, there in replaced.items():
            if any(arg.partition("=")[0] == f"--model.{name}" for arg in self.given):
                raise ValueError(
                    f"model.{name}: {self.asked[name]!r} was given, but a fit goes on as its checkpoint began, with "
                    f"{there!r}; leave it out, or begin a new fit without --ckpt_path"
                )
        own = ", ".join(f"{name}={value!r}" for name, value in replaced.items())
        rank_zero_warn(
            f"ckpt_path: the fit goes on as its checkpoint began, with {own}, whatever the configuration says"
        )

    def before_fit(self) -> None:
        """Plain SGD has no manifolds: our callbacks are dropped. The learning curve is always kept."""
        self.curve = LearningCurve()
        if self.model.hparams["optimizer"] == "sgd":
            ours = (POMGrouping, FeatureStdRescaling, NormBoundMonitor)
            self.trainer.callbacks[:] = [c for c in self.trainer.callbacks if not isinstance(c, ours)]
        self.trainer.callbacks.insert(0, self.curve)

    def after_fit(self) -> None:
        """Test what was trained, write plots and plain timm weights, and print the report."""
        trainer, model = self.trainer, self.model
        if trainer.fast_dev_run:
            return
        optimizer = trainer.optimizers[0]  # trainer.test lets go of it
        results = trainer.test(model, self.datamodule, verbose=False)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked for by all processes: it is sent round
        if not trainer.is_global_zero:
            return
        weights = export_timm(model, folder / "model.safetensors")  # first: a plot that fails must not cost them
        plots = []
        if self.curve.epochs:
            plots.append(plot_learning_curve(self.curve.epochs, folder / "learning_curve.png"))
        for rescaling in (c for c in trainer.callbacks if isinstance(c, FeatureStdRescaling) and c.history):
            for key, label in (("std", "feature std"), ("radius", "R")):
                plots.append(plot_layers(rescaling.history, key, label, folder / f"{label.replace(' ', '_')}.png"))
        for monitor in (c for c in trainer.callbacks if isinstance(c, NormBoundMonitor) and c.history):
            monitor.plot(folder / "norms.png")
            plots.append(folder / "norms.png")
        files: dict[str, list[Any]] = {
            "checkpoint": [getattr(trainer.checkpoint_callback, "best_model_path", "")],
            "timm weights": [weights],
            "TensorBoard log": [folder],
            "plots": plots,
        }
        console = Console(width=None if sys.stdout.isatty() else 160)
        if isinstance(optimizer, FGSGD):
            console.print(describe(optimizer, quiet=True))
        print_summary(console, optimizer, float(results[0]["test_accuracy"]) if results else None, files)


def _num_classes(data: Any) -> int:
    return int(data.num_classes)


def main(args: Sequence[str] | None = None) -> FinetuneCLI:
    """Run the command line ``args``, those of the process by default."""
    given = sys.argv[1:] if args is None else args
    own_config = any(arg in ("--config", "-c") or arg.startswith("--config=") for arg in given)
    defaults = {"default_config_files": [] if own_config else [str(DEFAULT_CONFIG)]}
    torch.set_float32_matmul_precision("high")
    return FinetuneCLI(
        LitClassifier,
        ImageData,
        subclass_mode_data=True,
        seed_everything_default=0,
        parser_kwargs=dict.fromkeys(("fit", "validate", "test", "predict"), defaults),
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
    # Lightning ends process groups of NCCL alone. One of gloo (CPUs) that outlives the script aborts it now and then.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

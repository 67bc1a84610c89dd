"""``python -m benchmarks.epoch``: whole training steps under a Trainer with our three callbacks, beside plain SGD's.

ResNet-18 on batches of 32 images of 224 x 224, and an epoch of the digits recipe's model. The arms take turns; what a fit
does once (drawing index sets, compiling) is left out, as is the first batch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from lightning_fgsgd import FeatureStdRescaling, NormBoundMonitor, POMGrouping
from recipes.model import LitClassifier

COLUMNS = {"what": "", "arm": "", "ms": ".0f", "ratio": ".3f"}


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Random images and labels: what they show does not matter to the time."""

    def __init__(self, count: int, size: int) -> None:
        self.images = torch.rand(8, 3, size, size)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i % 8], i % 10


class Clock(Callback):
    """Seconds from the start of one training batch to the start of the next, or of an epoch."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch begins."""
        now = time.perf_counter()
        if self.last:
            self.steps.append(now - self.last)
        self.last = now


def fit(optimizer: str, model: str, images: Images, batch: int, device: torch.device) -> Callable[[], list[float]]:
    """A fit of one epoch; gives its steps' seconds, without the first two."""
    ours = [POMGrouping(), FeatureStdRescaling(), NormBoundMonitor()] if optimizer == "fgsgd" else []

    def run() -> list[float]:
        torch.manual_seed(0)
        clock = Clock()
        trainer = Trainer(
            max_epochs=1,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, *ours],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = LitClassifier(model, pretrained=False, optimizer=optimizer, lr=0.01)  # type: ignore[arg-type]
            trainer.fit(module, DataLoader(images, batch))
        return clock.steps[2:]

    return run


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=18)
    args = options.parse_args()
    device = torch.device(args.device)
    found = []
    for what, model, size, batch in (
        ("ResNet-18, batch 32 at 224", "resnet18", 224, 32),
        ("digits recipe: EfficientNet-Lite0, batch 64 at 64", "tf_efficientnet_lite0", 64, 64),
    ):
        images = Images(args.steps * batch, size)
        arms = {name: fit(name, model, images, batch, device) for name in ("sgd", "fgsgd")}
        totals: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(max(2, args.rounds // 5)):
            for name, run in arms.items():
                steps = run()
                # The mean: every n-th batch is read for λ, and that is part of the cost.
                totals[name].append(sum(steps) / len(steps))
        found += harness.rows(totals, "sgd", what=what)
    print(harness.table(found, COLUMNS))
    harness.write(args.out, "epoch", found, harness.environment(device))


if __name__ == "__main__":
    main()

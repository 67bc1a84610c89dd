"""``python -m benchmarks.epoch``: whole training steps under a Trainer with our three callbacks, beside plain SGD's.

On a CPU ResNet-18 on batches of 32 images of 224 x 224, and an epoch of the digits recipe's model; on a GPU ResNet-50 and
ViT-B in bfloat16 on batches of 256 and 128, which lie there already, timed by events. The arms take turns; what a fit does
once (drawing index sets, compiling) is left out, as are the first batches, and what callbacks do between two epochs: a look
of ``NormBoundMonitor``, λ of the epoch, and the rescale.
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

# Steps that are left out: on a GPU, as many as it takes to have seen a batch that is read for λ, too.
_WARM = {False: 2, True: 10}
ON_CPU = (
    ("ResNet-18, batch 32 at 224", "resnet18", 224, 32),
    ("digits recipe: EfficientNet-Lite0, batch 64 at 64", "tf_efficientnet_lite0", 64, 64),
)
ON_GPU = (
    ("ResNet-50, bfloat16, batch 256 at 224", "resnet50", 224, 256),
    ("ViT-B, bfloat16, batch 128 at 224", "vit_base_patch16_224", 224, 128),
)
COLUMNS = {"what": "", "arm": "", "ms": ".0f", "ratio": ".3f"}


class Images(Dataset[Any]):
    """Random images and labels: what they show does not matter to the time. One by one; or batches of them, on a device."""

    def __init__(self, count: int, size: int, batch: int = 0, device: torch.device | None = None) -> None:
        self.images = torch.rand(batch if batch else 8, 3, size, size, device=device)
        self.labels = torch.arange(len(self.images), device=device) % 10
        self.count = count
        self.batched = batch > 0
        if batch:
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return (self.images, self.labels) if self.batched else (self.images[i % 8], i % 10)


class Clock(Callback):
    """Seconds from the start of one training batch to the start of the next, or of an epoch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch begins."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def steps(self) -> list[float]:
        """What was measured."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def fit(optimizer: str, model: str, images: Images, batch: int, device: torch.device) -> Callable[[], list[float]]:
    """A fit of one epoch; gives its steps' seconds, without the first."""
    on_gpu = device.type == "cuda"
    ours = [POMGrouping(), FeatureStdRescaling(), NormBoundMonitor()] if optimizer == "fgsgd" else []

    def run() -> list[float]:
        torch.manual_seed(0)
        clock = Clock(device)
        trainer = Trainer(
            max_epochs=1,
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            benchmark=on_gpu,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, *ours],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"channels_last": not model.startswith("vit")}  # as the recipe has it
            module = LitClassifier(model, pretrained=False, optimizer=optimizer, lr=0.01, **options)  # type: ignore[arg-type]
            trainer.fit(module, DataLoader(images, None if images.batched else batch))
        return clock.steps()[_WARM[on_gpu] :]

    return run


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=18)
    args = options.parse_args()
    device = torch.device(args.device)
    found = []
    for what, model, size, batch in ON_GPU if device.type == "cuda" else ON_CPU:
        if device.type == "cuda":
            images = Images(_WARM[True] + args.steps, size, batch, device)
        else:
            images = Images(args.steps * batch, size)
        arms = {name: fit(name, model, images, batch, device) for name in ("sgd", "fgsgd")}
        totals: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(max(2, args.rounds // 5)):
            for name, run in arms.items():
                steps = run()
                # The mean: every n-th batch is read for λ, and that is part of the cost.
                totals[name].append(sum(steps) / len(steps))
        rows = harness.rows(totals, "sgd", what=what)
        print(harness.table(rows, COLUMNS), flush=True)
        found += rows
    harness.write(args.out, "epoch", found, harness.environment(device))


if __name__ == "__main__":
    main()

"""``python -m benchmarks.epoch``: whole training steps under a Trainer with our three callbacks, beside plain SGD's.

On a CPU ResNet-18 on batches of 32 images of 224 x 224, and whole epochs of the digits recipe; on a GPU ResNet-50 and
ViT-B in bfloat16 on batches of 256 and 128, which lie there already, timed by events. The arms take turns; what a fit does
once (drawing index sets, compiling) is left out, as are the first batches, or the first epoch. An epoch has all that our
callbacks do at its end, a look of ``NormBoundMonitor``, λ and the rescale, and no validation, which costs both the same;
steps are timed without that.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from lightning_fgsgd import FeatureStdRescaling, NormBoundMonitor, POMGrouping
from recipes.data import Digits
from recipes.model import LitClassifier

# Steps that are left out: on a GPU, as many as it takes to have seen a batch that is read for λ, too.
_WARM = {False: 2, True: 10}
_EPOCHS = 3  # that are timed in a fit
ON_CPU = (("ResNet-18, batch 32 at 224, a step", "resnet18", 224, 32),)
ON_GPU = (
    ("ResNet-50, bfloat16, batch 256 at 224, a step", "resnet50", 224, 256),
    ("ViT-B, bfloat16, batch 128 at 224, a step", "vit_base_patch16_224", 224, 128),
)
Arm = Literal["sgd", "fgsgd"]
ARMS: tuple[Arm, ...] = ("sgd", "fgsgd")
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
    """Seconds from the start of one training batch to the start of the next, or of whole epochs."""

    def __init__(self, device: torch.device, epochs: bool = False) -> None:
        self.device = device
        self.epochs = epochs
        self.marks: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch begins."""
        if not self.epochs:
            self._mark()

    def on_train_epoch_start(self, *_: Any) -> None:
        """An epoch begins."""
        if self.epochs:
            self._mark()

    def on_train_end(self, *_: Any) -> None:
        """All that callbacks do at the end of the last epoch is done."""
        if self.epochs:
            self._mark()

    def _mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def times(self) -> list[float]:
        """What was measured."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def steps(optimizer: Arm, model: str, images: Images, batch: int, device: torch.device) -> Callable[[], list[float]]:
    """A fit of one epoch; gives its steps' seconds, without the first."""
    on_gpu = device.type == "cuda"

    def run() -> list[float]:
        clock = Clock(device)
        channels_last = not model.startswith("vit")  # as the recipe has it
        module = classifier(model, optimizer, channels_last=channels_last, lr=0.01)
        _fit(module, DataLoader(images, None if images.batched else batch), clock, [POMGrouping()], 1)
        return clock.times()[_WARM[on_gpu] :]

    return run


def epochs(optimizer: Arm, device: torch.device) -> Callable[[], list[float]]:
    """A fit of the digits recipe; gives its epochs' seconds, without the first."""

    def run() -> list[float]:
        clock = Clock(device, epochs=True)
        data = Digits(image_size=64, batch_size=64)
        data.prepare_data()
        data.setup("fit")
        module = classifier("tf_efficientnet_lite0", optimizer, lr=0.1, bn_momentum=0.1)
        mix = POMGrouping(scheme="pio", manifolds=("sphere", "oblique", "stiefel"), start="preserve")
        _fit(module, data.train_dataloader(), clock, [mix], 1 + _EPOCHS)
        return clock.times()[1:]

    return run


def classifier(model: str, optimizer: Arm, **options: Any) -> LitClassifier:
    """The recipes' module, from scratch: where weights start does not matter to the time."""
    torch.manual_seed(0)
    return LitClassifier(model, pretrained=False, optimizer=optimizer, **options)


def _fit(module: LitClassifier, loader: DataLoader[Any], clock: Clock, grouping: list[Callback], epochs: int) -> None:
    on_gpu = clock.device.type == "cuda"
    ours = [*grouping, FeatureStdRescaling(), NormBoundMonitor()] if module.hparams["optimizer"] == "fgsgd" else []
    trainer = Trainer(
        max_epochs=epochs,
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
        trainer.fit(module, loader)


def main() -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=18)
    args = options.parse_args()
    device = torch.device(args.device)
    rounds = max(2, args.rounds // 5)
    found = []

    def compare(what: str, arm: Callable[[Arm], Callable[[], list[float]]]) -> None:
        arms = {name: arm(name) for name in ARMS}
        totals: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, run in arms.items():
                # The mean: every n-th batch is read for λ, and that is part of the cost.
                totals[name].append(statistics.mean(run()))
        rows = harness.rows(totals, "sgd", what=what)
        print(harness.table(rows, COLUMNS), flush=True)
        found.extend(rows)

    for what, model, size, batch in ON_GPU if device.type == "cuda" else ON_CPU:
        if device.type == "cuda":
            images = Images(_WARM[True] + args.steps, size, batch, device)
        else:
            images = Images(args.steps * batch, size)
        compare(what, partial(steps, model=model, images=images, batch=batch, device=device))
    if device.type == "cpu":
        compare("digits recipe, an epoch", partial(epochs, device=device))
    harness.write(args.out, "epoch", found, harness.environment(device))


if __name__ == "__main__":
    main()

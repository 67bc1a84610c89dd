"""In which metric does SGD's learning rate carry over, and which one trains best? A sweep over all three.

    python -m recipes.metric --root path/to/fashion-mnist

A residual network of 165 000 weights is trained from scratch on part of Fashion-MNIST (a folder of its IDX files): with
plain SGD, and with FGSGD in each metric for each start, at each learning rate; the manifolds are rescaled every epoch. One
CSV row a run: ``excess`` is the test error less that of plain SGD at the same learning rate and seed.
"""

from __future__ import annotations

import csv
import logging
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything

from lightning_fgsgd import FeatureStdRescaling, POMGrouping
from recipes.data import IDXFolder
from recipes.model import LitClassifier

NETWORK = {"channels": (16, 32, 64, 64), "stem_width": 16}


def error_of(data: IDXFolder, seed: int, epochs: int, batches: int, start: str | None, **options: Any) -> float:
    """Test error, in %, of one run; plain SGD where ``start`` is None."""
    seed_everything(seed, verbose=False)
    optimizer: Any = "fgsgd" if start else "sgd"
    model = LitClassifier(
        "resnet10t", False, data.num_classes, optimizer, weight_decay=5e-4, model_args=NETWORK, **options
    )
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[POMGrouping(start=start, seed=seed), FeatureStdRescaling()] if start else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    return 100 * (1 - result["test_accuracy"])


def main(
    root: str,
    lrs: tuple[float, ...] = (0.02, 0.1, 0.5),
    seeds: int = 2,
    epochs: int = 8,
    batches: int = 40,
    output: str = "runs/metric.csv",
) -> Path:
    """Run the sweep.

    Args:
        root: folder with the IDX files of Fashion-MNIST.
        lrs: learning rates.
        seeds: runs of each arm.
        epochs: epochs of a run.
        batches: batches of 128 images in an epoch, drawn anew in each.
        output: where the CSV goes.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data = IDXFolder(root, image_size=28, batch_size=128)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    arms = list(product(("preserve", "project", "random"), ("start", "unit", "embedded")))
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("start", "metric", "lr", "seed", "error", "excess"))
        for seed, lr in product(range(seeds), lrs):
            plain = error_of(data, seed, epochs, batches, None, lr=lr)
            rows.writerow(("", "sgd", lr, seed, f"{plain:.2f}", "0.00"))
            for start, metric in arms:
                error = error_of(data, seed, epochs, batches, start, lr=lr, metric=metric)
                rows.writerow((start, metric, lr, seed, f"{error:.2f}", f"{error - plain:.2f}"))
                file.flush()
    return path


if __name__ == "__main__":
    from jsonargparse import auto_cli

    torch.set_float32_matmul_precision("high")
    print(auto_cli(main, as_positional=False))

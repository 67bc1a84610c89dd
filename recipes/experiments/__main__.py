"""Run an experiment and write its report.

    python -m recipes.experiments recipes/configs/experiments/scratch_10.yaml --root path/to/fashion-mnist

What was run before is read from the experiment's folder and not run again: a run that was cut off goes on. The report is
written anew each time, also from an experiment that is not finished.
"""

from __future__ import annotations

import os
from pathlib import Path

from recipes.experiments.report import write
from recipes.experiments.runner import run_all
from recipes.experiments.spec import load


def main(
    experiment: str,
    root: str = "",
    workers: int | None = None,
    devices: tuple[str, ...] = ("cpu",),
    output: str = "docs/experiments",
    report_only: bool = False,
) -> list[Path]:
    """Run the experiment of a YAML file.

    Args:
        experiment: the YAML file, see recipes/experiments/spec.py.
        root: folder with the IDX files of Fashion-MNIST, where the experiment needs it.
        workers: runs side by side; by default one a core on a CPU, or one a device.
        devices: ``["cpu"]``, or the GPUs to share out: ``["cuda:0", "cuda:1"]``.
        output: folder of all experiments; this one's folder in it has its name.
        report_only: run nothing, write the report of what there is.
    """
    spec = load(experiment)
    folder = Path(output) / spec["name"]
    if not report_only:
        if workers is None:
            workers = (os.cpu_count() or 1) if tuple(devices) == ("cpu",) else len(devices)
        run_all(spec, folder, root, workers, devices)
    return write(folder, spec)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(*auto_cli(main), sep="\n")

"""Timing several things in turn in one process, and writing down where it was."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["copy_bandwidth", "environment", "interleaved", "parser", "table", "write"]

Arms = Mapping[str, Callable[[], Any]]


def interleaved(arms: Arms, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each arm in each round: all arms take their turn in a round, so that a slow moment is slow for all.

    On a GPU a turn is timed by events.
    """
    for arm in arms.values():  # warm up: caches, compiled code, state
        arm()
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(_timed(arm, device))
    return times


def _timed(arm: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        arm()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    arm()
    return time.perf_counter() - begin


def rows(times: Mapping[str, list[float]], baseline: str, **more: Any) -> list[dict[str, Any]]:
    """For each arm its median and spread in ms, and the median of its ratios to the baseline, round by round."""
    found = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        found.append(
            more
            | {
                "arm": name,
                "ms": 1000 * statistics.median(seconds),
                "quartiles_ms": [1000 * low, 1000 * high],
                "ratio": statistics.median(ratios),
            }
        )
    return found


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes read and written in a second by a copy between tensors that no cache holds."""
    a = torch.empty(megabytes * 2**18, device=device).normal_()
    b = torch.empty_like(a)
    seconds = interleaved({"copy": lambda: b.copy_(a)}, 7, device)["copy"]
    return 2 * a.numel() * a.element_size() / statistics.median(seconds)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine."""
    packages = {}
    for name in ("lightning-fgsgd", "torch", "timm", "geoopt", "pytorch-lightning"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "packages": packages,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and the figure"
    )
    options.add_argument("--rounds", type=int, default=15)
    return options


def table(found: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; ``columns`` maps keys to formats."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in found:
        lines.append(
            "| "
            + " | ".join(format(row.get(k, ""), f) if row.get(k) is not None else "" for k, f in columns.items())
            + " |"
        )
    return "\n".join(lines)


def write(folder: Path, name: str, found: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """The results as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"environment": where, "rows": found}, indent=1))

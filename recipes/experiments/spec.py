"""An experiment's YAML file, and the runs that it asks for.

    name: scratch_10                      # of the folder that it writes
    seeds: [0, 1, 2, 3, 4]
    tuning_seeds: [100]                   # of the runs that choose among a grid; no test image is looked at
    reference: SGD                        # the arm that the others are compared with; the first one by default
    against: [L2-SP]                      # arms that they are compared with as well
    common: {epochs: 30, data: {...}, network: {...}}       # options of all arms
    arms:
      SGD: {method: sgd, grid: {lr: [0.05, 0.1, 0.2], weight_decay: [0.0005, 0.002]}}
      PIO Sp+Ob: {method: fgsgd, scheme: pio, manifolds: [sphere, oblique], tuned_as: PIO all}
      ...

An arm with a ``grid`` is first run at each of its points with each of the ``tuning_seeds``; the point with the least mean
validation error is what its final runs use. With ``keep: agreement`` (or ``agreement_recalibrated``) it is, of the points
within one standard error of that, the one whose networks agree most with the pretrained one: errors closer than that cannot
be told apart by so many validation images. ``tuned_as`` takes the point that another arm chose. ``watch: true`` keeps
norms, bounds, λ and R of the run with the first seed; ``turning: true`` how filters turn, epoch by epoch, of every run;
``conditioning: true`` how even the layers' curvature is; ``layout: true`` puts the arm into the table laid out as the
paper's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

# What an arm says of itself, not of its runs.
OF_THE_ARM = ("grid", "tuned_as", "layout", "seeds", "watch")
FIELDS = ("name", "seeds", "tuning_seeds", "reference", "against", "keep", "common", "arms")
KEEPING = ("agreement", "agreement_recalibrated")


@dataclass(frozen=True)
class Run:
    """One run: of an arm, at a point of its grid or at the one that was chosen, with a seed."""

    stage: str
    arm: str
    seed: int
    config: Mapping[str, Any]
    watch: bool = False

    @property
    def key(self) -> str:
        """Names the run: the same arm, seed and configuration have the same key."""
        told = json.dumps([self.stage, self.arm, self.seed, self.config], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def load(path: str | Path) -> dict[str, Any]:
    """Read and check an experiment's YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field or an arm that is not as it should be, by its name.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config: there is no file {str(path)!r}")
    spec = yaml.safe_load(file.read_text())
    if not isinstance(spec, dict):
        raise ValueError(f"{file.name}: it holds no fields; give {', '.join(FIELDS)}")
    for name in spec:
        if name not in FIELDS:
            raise ValueError(f"{file.name}: unknown field {name!r}; choose from {', '.join(FIELDS)}")
    spec = {"tuning_seeds": [], "common": {}, "keep": None, "against": [], **spec}
    for name in ("name", "seeds", "arms"):
        if not spec.get(name):
            raise ValueError(f"{file.name}: {name} is missing")
    for name in ("seeds", "tuning_seeds", "against"):
        if not isinstance(spec[name], list):
            raise ValueError(f"{file.name}: {name}: {spec[name]!r} is not a list")
    for name in ("arms", "common"):
        if not isinstance(spec[name], dict):
            raise ValueError(f"{file.name}: {name}: {spec[name]!r} has no names and values")
    spec["arms"] = {arm: {} if options is None else options for arm, options in spec["arms"].items()}
    spec.setdefault("reference", next(iter(spec["arms"])))
    for name in ("reference", "against"):
        for arm in [spec[name]] if name == "reference" else spec[name]:
            if arm not in spec["arms"]:
                raise ValueError(f"{file.name}: {name}: there is no arm {arm!r}")
    if spec["keep"] is not None and spec["keep"] not in KEEPING:
        raise ValueError(f"{file.name}: keep: {spec['keep']!r} is not one of {', '.join(map(repr, KEEPING))}")
    for name in ("seeds", "tuning_seeds"):
        if len(set(spec[name])) < len(spec[name]):
            raise ValueError(f"{file.name}: {name}: {spec[name]} names a seed twice")
    if set(spec["seeds"]) & set(spec["tuning_seeds"]):
        raise ValueError(
            f"{file.name}: tuning_seeds and seeds share a seed; what is chosen on it would be tested on it"
        )
    for arm in spec["arms"]:
        _check(spec, arm, f"{file.name}: {arm!r}")
    return spec


def _check(spec: Mapping[str, Any], arm: str, who: str) -> None:
    """Refuse an arm that could not be run, or not as it says."""
    options = spec["arms"][arm]
    if not isinstance(options, dict):
        raise ValueError(f"{who}: {options!r} is not a mapping of options to values")
    grid, other, seeds = options.get("grid", {}), options.get("tuned_as"), options.get("seeds", [])
    if grid and not spec["tuning_seeds"]:
        raise ValueError(f"{who} has a grid, but tuning_seeds is missing")
    if "grid" in options and "tuned_as" in options:
        raise ValueError(f"{who} has a grid and is tuned_as another; one of the two")
    if other is not None and not spec["arms"].get(other, {}).get("grid"):
        raise ValueError(f"{who} is tuned_as {other!r}, which is no arm with a grid")
    if not isinstance(grid, dict):
        raise ValueError(f"{who}: grid: {grid!r} is not a mapping of options to lists of values")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{who}: grid: {name} has {values!r} in the place of a list of values")
        if len({json.dumps(value) for value in values}) < len(values):
            raise ValueError(f"{who}: its grid has a value of {name} twice: {values}")
        if _given(options, name):
            raise ValueError(f"{who} has {name} in its grid and beside it; one of the two")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{who}: seeds: {seeds} names one twice")
    if shared := set(seeds) & set(spec["tuning_seeds"]):
        raise ValueError(
            f"{who}: seed {min(shared)} is one of tuning_seeds; what is chosen on it would be tested on it"
        )
    config = _base(spec, arm)
    epochs, every = config.get("epochs", 1), config.get("validate_every", 1)
    if every < 1:
        raise ValueError(f"{who}: validate_every: {every} is less than 1")
    if epochs % every:
        raise ValueError(f"{who}: validate_every {every} leaves out the last of {epochs} epochs")
    if spec["keep"] is not None and grid and "validation" not in config.get("data", {}):
        raise ValueError(f"{who}: keep needs data.validation, the number of validation images")


def tuning_runs(spec: Mapping[str, Any], arm: str) -> Iterator[Run]:
    """The runs that choose among the grid of an arm; none where it has no grid."""
    options = spec["arms"][arm]
    grid = options.get("grid", {})
    if grid:
        for seed, values in product(spec["tuning_seeds"], product(*grid.values())):
            config = _merge(_base(spec, arm), dict(zip(grid, values, strict=True)))
            yield Run("tune", arm, seed, config)


def final_runs(spec: Mapping[str, Any], arm: str, rows: Iterable[Mapping[str, Any]]) -> list[Run] | None:
    """The runs of an arm that count.

    Args:
        spec: the experiment.
        arm: the arm.
        rows: what was run, with ``"key"`` and ``"val_error"``.

    Returns:
        None as long as what they are to be tuned with is not known; an empty list where every point of the grid diverged.
    """
    options = spec["arms"][arm]
    chosen: Mapping[str, Any] | None = {}
    tuned = options.get("tuned_as", arm)
    if spec["arms"][tuned].get("grid"):
        try:
            chosen = choose(spec, tuned, rows)
        except ArithmeticError:
            return []
    if chosen is None:
        return None
    # What the arm says itself holds over what another arm was tuned to.
    config = _merge(_merge(_base(spec, arm), chosen), {k: v for k, v in options.items() if k not in OF_THE_ARM})
    seeds = options.get("seeds", spec["seeds"])
    return [Run("final", arm, seed, config, bool(options.get("watch")) and seed == seeds[0]) for seed in seeds]


def asked_for(spec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Those of the rows that are runs of the experiment as it stands: not those of arms or settings that it had before."""
    keys = {run.key for arm in spec["arms"] for run in tuning_runs(spec, arm)}
    for arm in spec["arms"]:
        keys |= {run.key for run in final_runs(spec, arm, rows) or []}
    return [row for row in rows if row["key"] in keys]


def choose(spec: Mapping[str, Any], arm: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The point of an arm's grid with the least mean validation error; None before all of its points have run.

    With the experiment's ``keep``, the point that keeps most of those within one standard error of the least error p,
    √(p(1 − p)/N) for N validation images of all tuning seeds (the rule of Breiman et al. 1984).

    Raises:
        ArithmeticError: all points diverged.
        ValueError: ``keep``, and runs that did not measure it: the network is not pretrained.
    """
    keep = spec.get("keep")
    found = {row["key"]: row for row in rows}
    grid = spec["arms"][arm]["grid"]
    points: dict[str, list[tuple[float, float]]] = {}
    images = 0
    for run in tuning_runs(spec, arm):
        if run.key not in found:
            return None
        row = found[run.key]
        error, kept = float(row["val_error"]), math.nan
        if keep and math.isfinite(error):
            if row[keep] in ("", None):
                raise ValueError(f"keep: {keep!r} was not measured in the runs of {arm!r}; is its network pretrained?")
            kept = float(row[keep])
        point = json.dumps({name: _get(run.config, name) for name in grid})
        points.setdefault(point, []).append((error, kept))
        if keep:
            images += run.config["data"]["validation"]
    means = {
        point: tuple(map(mean, zip(*values, strict=True)))
        for point, values in points.items()
        if all(math.isfinite(error) for error, _ in values)
    }
    if not means:
        raise ArithmeticError(f"{arm}: every point of its grid diverged; give it smaller learning rates")
    least = min(means, key=lambda point: means[point][0])
    if keep:
        share = means[least][0] / 100
        within = means[least][0] + 100 * math.sqrt(share * (1 - share) * len(points) / images)
        least = max((p for p in means if means[p][0] <= within), key=lambda point: (means[point][1], -means[point][0]))
    return dict(json.loads(least))


def _base(spec: Mapping[str, Any], arm: str) -> dict[str, Any]:
    options = {name: value for name, value in spec["arms"][arm].items() if name not in OF_THE_ARM}
    return _merge(spec["common"], options)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``; mappings are merged, and "data.size" is the entry "size" of "data"."""
    merged = dict(base)
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            merged[first] = _merge(merged.get(first, {}), {rest: value})
        elif isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def _given(options: Mapping[str, Any], name: str) -> bool:
    """Whether an arm says itself what "data.size", say, is."""
    first, _, rest = name.partition(".")
    if name in options:
        return True
    return bool(rest) and isinstance(options.get(first), Mapping) and _given(options[first], rest)


def _get(config: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config

"""The callbacks that an arm's options ask for: FG-SGD's own, and those of the choices that are measured."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback

from lightning_fgsgd import FeatureStdRescaling, NormBoundMonitor, POMGrouping
from lightning_fgsgd.choices import DEFAULT_MANIFOLDS
from recipes.experiments.choices import BySpectrum, Gradually, Later, OtherStdRescaling, Redraw
from recipes.experiments.methods import BASELINES

GROUPING = (
    "scheme", "manifolds", "start", "cutting", "block_size", "groups", "include", "exclude", "overrides", "layer_decay",
    "no_weight_decay",
)  # fmt: skip
RESCALING = ("gamma", "clamp", "limit", "every_n_batches")
OPTIMIZER = ("lr", "momentum", "nesterov", "weight_decay", "rho", "metric")
# Of choices.py.
CHOICES = ("assign", "constrain_after", "gradually", "rates", "redraw", "std_of", "carried")


def callbacks_of(method: str, options: dict[str, Any], seed: int, watch: bool) -> tuple[list[Callback], dict[str, Any]]:
    """The callbacks of FG-SGD, none for the baselines; and the options that are the optimizer's."""
    if method != "fgsgd":
        if method not in BASELINES:
            raise ValueError(
                f"method: unknown method {method!r}; choose from 'fgsgd', {', '.join(map(repr, BASELINES))}"
            )
        return [], options
    options = dict(options)
    rescale = options.pop("rescale", True)
    grouping = {name: options.pop(name) for name in GROUPING if name in options}
    rescaling = {name: options.pop(name) for name in RESCALING if name in options}
    choices = {name: options.pop(name) for name in CHOICES if name in options}
    unknown = [name for name in options if name not in OPTIMIZER]
    if unknown:
        known = (*GROUPING, *RESCALING, *OPTIMIZER, *CHOICES)
        raise ValueError(f"{unknown[0]}: not an option of fgsgd; choose from {', '.join(known)}")
    strange = [name for name in choices.get("rates", {}) if name not in grouping.get("manifolds", DEFAULT_MANIFOLDS)]
    if strange:
        raise ValueError(f"rates: {strange[0]!r} is none of this arm's manifolds")
    own = _grouping(choices, seed=seed, **grouping)
    callbacks: list[Callback] = [own]
    preserves = grouping.get("start", "preserve") == "preserve"
    for name in ("redraw", "std_of"):
        if name in choices and rescale and preserves:
            raise ValueError(
                f"{name}: with R by λ it is for start: project or random; preserve keeps λ of the first epoch"
            )
    if "constrain_after" in choices and rescale:
        raise ValueError("constrain_after: it needs rescale: false; until then there is no R")
    if redraw := choices.get("redraw"):
        if redraw not in ("new", "same"):
            raise ValueError(f"redraw: unknown choice {redraw!r}; choose from 'new', 'same'")
        callbacks.append(Redraw(own, new=redraw == "new"))
    if rescale:
        other = {"std_of": choices["std_of"]} if "std_of" in choices else {}
        callbacks.append(OtherStdRescaling(**other, **rescaling) if other else FeatureStdRescaling(**rescaling))
    if watch:
        callbacks.append(NormBoundMonitor())
    return callbacks, options


def _grouping(choices: dict[str, Any], **settings: Any) -> POMGrouping:
    if "assign" in choices and "constrain_after" in choices:
        raise ValueError("assign: it goes with no constrain_after")
    if choices.get("gradually") and "constrain_after" not in choices:
        raise ValueError("gradually: it goes with constrain_after, the epochs that it takes")
    if "assign" in choices:
        return BySpectrum(choices["assign"], **settings)
    if "constrain_after" in choices:
        return (Gradually if choices.get("gradually") else Later)(choices["constrain_after"], **settings)
    return POMGrouping(**settings)

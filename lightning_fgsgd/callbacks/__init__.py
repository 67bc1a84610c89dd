"""The callbacks to add to a Lightning Trainer."""

from lightning_fgsgd.callbacks.grouping import POMGrouping
from lightning_fgsgd.callbacks.norms import NormBoundMonitor
from lightning_fgsgd.callbacks.projection import POMProjection
from lightning_fgsgd.callbacks.rescaling import FeatureStdRescaling

__all__ = ["FeatureStdRescaling", "NormBoundMonitor", "POMGrouping", "POMProjection"]
